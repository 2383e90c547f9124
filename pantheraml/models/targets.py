"""Which modules and parameters an adapter goes on: names, regular expressions, scopes, layers and experts."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import log
from ..errors import ArgumentError, ConfigError, ConflictError, UnsupportedError, nearest
from . import stacks
from .probe import FOREIGN_ERRORS, stand_in

# A projection that some families store fused under another name.
_FUSED_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", "query_key_value", "Wqkv", "c_attn")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj",)),
}
_VISION = re.compile(r"vision|visual|image|patch|multi_modal|mm_proj|connector|aligner", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech|sound", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|qkv|out)_proj$", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|expert|moe|(^|\.)(gate|up|down|gate_up)_proj$|(^|\.)fc\d$", re.IGNORECASE)
# Linear layers that decide the routing between experts, and heads: never adapted unless named.
_EXCLUDED_LEAVES = frozenset({"router", "gate", "shared_expert_gate", "lm_head", "score", "classifier", "embed_out"})
_EXPERT_LEAVES = {
    "gate_proj": ("gate_up_proj", "gate_proj", "w1"),
    "up_proj": ("gate_up_proj", "up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}
# Code that hands a child's weight to a function or multiplies by it, instead of calling the child.
_READ_WEIGHT = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight(?=\s*(?:,|\)|@))")
_INITIALISES = ("__init__", "_init", "init_", "_reset", "reset_")
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Scopes:
    """The parts of a model that may be adapted."""

    vision: bool = False
    language: bool = True
    attention: bool = True
    mlp: bool = True
    audio: bool = False

    def allow(self, name: str) -> bool:
        """Whether the module ``name`` lies in an allowed part."""
        part = self.audio if _AUDIO.search(name) else self.vision if _VISION.search(name) else self.language
        if not part:
            return False
        is_attention, is_mlp = bool(_ATTENTION.search(name)), bool(_MLP.search(name))
        if is_attention and not is_mlp:
            return self.attention
        if is_mlp and not is_attention:
            return self.mlp
        return self.attention or self.mlp


EVERYTHING = Scopes(vision=True, audio=True)


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter goes on.

    Attributes:
        modules: Names for PEFT's ``target_modules``, or a regular expression.
        matched: Full names of the modules that these reach.
        parameters: Names for PEFT's ``target_parameters``.
        layers: ``layers_to_transform`` for PEFT, or None when ``modules`` already say it.
    """

    modules: list[str] | str
    matched: frozenset[str]
    parameters: list[str]
    layers: list[int] | None


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    # Linear layers of other quantisation packages share no base class, only this shape.
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children())


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model, as they are without adapters."""
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        if re.search(r"\.lora_|\.modules_to_save\.|\.original_module", name):
            continue
        if _is_linear(module):
            names[name.removesuffix(".base_layer")] = None
    return list(names)


def adapted_modules(model: nn.Module) -> frozenset[str]:
    """Names of the modules of a transformers model that carry LoRA."""
    from peft.tuners.lora import LoraLayer

    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and hasattr(module, "r") and module.r
    )


@functools.cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weights a class's own code reads, as fused kernels of state spaces do."""
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not name.startswith(_INITIALISES):
                try:
                    names.update(_READ_WEIGHT.findall(inspect.getsource(method)))
                except (OSError, TypeError):  # made at run time, without a file
                    continue
    return frozenset(names)


def passed_over(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the linear layers ``names`` whose weights the family's code reads: it leaves an adapter on them out."""
    modules = {_plain(path): module for path, module in model.named_modules()}
    return [name for name in names if _leaf(name) in _weights_read(type(modules[name.rpartition(".")[0]]))]


def _maps_rows(module: nn.Module) -> bool:
    """Whether a linear layer that a family wrote itself gives ``[..., out_features]`` for ``[..., in_features]``."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    if module._modules or module._buffers:
        return True  # a plain layer made into another, such as torchao's with fake quantisers or one that clamps
    if type(weight) is not nn.Parameter or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return True  # a packed format's layer: PEFT knows it, or says that it does not
    meta = {name: None if p is None else torch.empty_like(p, device="meta") for name, p in module._parameters.items()}
    clone: Any = stand_in(module, meta, {})
    rows = torch.empty(2, 3, module.in_features, dtype=weight.dtype, device="meta")
    try:
        output = type(module).forward(clone, rows)
    except FOREIGN_ERRORS:
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, 3, module.out_features)


def odd_layers(model: nn.Module) -> list[str]:
    """Names of linear layers that compute something else than a product with the weight, such as one for each group."""
    return [_plain(path) for path, module in model.named_modules() if not _maps_rows(module)]


def _check_chosen(model: nn.Module, matched: Iterable[str]) -> None:
    """Refuse layers that an adapter does not fit, and tell those on which it has no effect."""
    matched = list(matched)
    odd = sorted(set(odd_layers(model)) & set(matched))
    if odd:
        raise UnsupportedError(
            f"LoRA does not fit {odd[0]}" + (f" and {len(odd) - 1} more layers" if odd[1:] else ""),
            where="argument target_modules",
            why=f"{type(model.get_submodule(odd[0])).__name__} is no plain product with its weight",
            hint=f"leave {', '.join(sorted({_leaf(name) for name in odd}))} out, or pass target_modules='all-linear'",
        )
    unused = sorted({_leaf(name) for name in passed_over(model, matched)})
    if unused:
        log.warning(
            f"target_modules: {', '.join(unused)}: {type(model).__name__} reads the weights of these layers itself in "
            "some or all of its calls, and an adapter on them has no effect there"
        )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _layer_of(name: str) -> int | None:
    found = _LAYER_INDEX.search(f".{name}.")
    return int(found.group(1)) if found else None


def choose_layers(
    model: nn.Module, layers_to_transform: int | Sequence[int] | None, last_n: int | None
) -> list[int] | None:
    """Indices of the decoder layers to adapt, or None for all.

    Raises:
        ConflictError: both ways of choosing are used.
        ConfigError: an index is out of range.
        ArgumentError: not whole numbers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr]
    if last_n is not None:
        if layers_to_transform is not None:
            raise ConflictError("finetune_last_n_layers and layers_to_transform contradict each other")
        if isinstance(last_n, bool) or not isinstance(last_n, int):
            raise ArgumentError(f"finetune_last_n_layers must be a whole number, got {last_n!r}")
        if not 0 < last_n <= count:
            raise ConfigError(f"finetune_last_n_layers must lie between 1 and {count}, got {last_n}")
        return list(range(count - last_n, count))
    if layers_to_transform is None:
        return None
    chosen = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ArgumentError(f"layers_to_transform must hold whole numbers, got {index!r}")
        if not 0 <= index < count:
            raise ConfigError(
                f"layers_to_transform names layer {index}, and the model has layers 0 to {count - 1}",
                where="argument layers_to_transform",
            )
    return chosen


def _expert_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that stack the weights of all experts of a layer."""
    return [
        f"{_plain(path)}.{name}"
        for path, module in model.named_modules()
        for name in stacks.shapes(module)
        if "expert" in f"{path}.{name}" and ".lora_" not in path
    ]


def _plain(path: str) -> str:
    """The name of a module as it is without adapters."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def _reach_others(model: nn.Module, suffixes: Iterable[str]) -> bool:
    """Whether a name would reach modules besides linear layers: those in a list are called 0, as the first layer is."""
    return any(
        any(_ends_with(name, suffix) for suffix in suffixes)
        for name, module in model.named_modules()
        if not hasattr(module, "base_layer") and not name.endswith(".base_layer") and not _is_linear(module)
    )


def _reaches(regex: str, name: str) -> bool:
    """Whether a regular expression written for Linear layers reaches the MLP that ``name`` stacks."""
    mlp = name.rpartition(".")[0].removesuffix(".experts")
    return any(re.fullmatch(regex, f"{mlp}.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj"))


def _expert_targets(
    model: nn.Module, wanted: list[str] | str | None, scopes: Scopes, layers: list[int] | None
) -> list[str]:
    """Expert parameters that belong to the asked-for MLP projections; empty for attention-only requests."""
    if isinstance(wanted, str):
        names = [name for name in _expert_parameters(model) if _reaches(wanted, name)]
    else:
        asked = _EXPERT_LEAVES if wanted is None else [name for name in wanted if name in _EXPERT_LEAVES]
        leaves = {leaf for name in asked for leaf in _EXPERT_LEAVES[name]}
        names = [name for name in _expert_parameters(model) if _leaf(name) in leaves and scopes.allow(name)]
    if layers is not None:
        return [name for name in names if _layer_of(name) in layers]
    # One entry serves the same parameter of every layer.
    return sorted({_LAYER_INDEX.split(name, maxsplit=1)[-1] for name in names})


def _named(model: nn.Module, wanted: list[str], extra: Iterable[str]) -> list[str]:
    """Replace names that the family stores fused, and refuse a request in which nothing matches."""
    linears = [*linear_modules(model), *extra]
    experts = _expert_parameters(model)
    leaves = {_leaf(name) for name in linears}
    names: dict[str, None] = {}
    unmatched = []
    for target in wanted:
        if any(_ends_with(name, target) for name in linears):
            names[target] = None
            continue
        fused = next((item for item in _FUSED_NAMES.get(target, ()) if item in leaves), None)
        if fused is not None:
            names[fused] = None
        elif not any(_leaf(name) in _EXPERT_LEAVES.get(target, ()) for name in experts):
            unmatched.append(target)
    reached_experts = len(names) + len(unmatched) < len(set(wanted)) and experts
    candidates = sorted(leaves - _EXCLUDED_LEAVES)
    if not names and not reached_experts:
        close = nearest(wanted[0], candidates) if wanted else None
        raise ConfigError(
            f"no module of {type(model).__name__} is called {', '.join(wanted) or '(nothing)'}",
            where="argument target_modules",
            hint=(f"did you mean {close!r}? " if close else "")
            + f"candidates: {', '.join(candidates)}; or target_modules='all-linear'",
        )
    if unmatched:
        log.info(
            f"target_modules: no module of {type(model).__name__} is called {', '.join(unmatched)} "
            f"(candidates: {', '.join(candidates)})"
        )
    return list(names)


def resolve_targets(
    model: nn.Module,
    wanted: list[str] | str | None,
    *,
    scopes: Scopes,
    layers: list[int] | None = None,
    layers_pattern: str | None = None,
    explicit_parameters: list[str] | None = None,
) -> Targets:
    """Turn a request into names that PEFT takes.

    Args:
        model: The transformers model, with or without an adapter on it.
        wanted: Module names, a regular expression, ``"all-linear"``, or None for every linear layer in scope.
        scopes: The parts of the model that may be adapted; a regular expression and ``"all-linear"`` disregard them.
        layers: Decoder layers to adapt, or None.
        layers_pattern: Name of the list of decoder layers, where PEFT cannot tell.
        explicit_parameters: The caller's ``target_parameters``, which replace the rule for experts.

    Raises:
        ConfigError: nothing matches; the candidates are named.
        ConflictError: a regular expression together with a choice of layers.
        UnsupportedError: a layer that is named computes something that LoRA does not fit.
        ArgumentError: ``wanted`` has the wrong type.
    """
    linears = linear_modules(model)
    if isinstance(wanted, str) and wanted != "all-linear":
        return _by_expression(model, wanted, linears, scopes, layers, explicit_parameters)
    if wanted is None or wanted == "all-linear":
        scopes = EVERYTHING if wanted == "all-linear" else scopes
        unfit = {*passed_over(model, linears), *odd_layers(model)}
        names = [
            name for name in linears if _leaf(name) not in _EXCLUDED_LEAVES and name not in unfit and scopes.allow(name)
        ]
        asked = None
        suffixes = sorted({_leaf(name) for name in names})
        reach = [name for name in linears if _leaf(name) in suffixes]
    else:
        if not isinstance(wanted, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in wanted):
            raise ArgumentError(
                f"target_modules must be a list of names or one string, got {wanted!r}", where="argument target_modules"
            )
        asked = list(dict.fromkeys(wanted))
        suffixes = _named(model, asked, extra=())
        reach = [name for name in linears if any(_ends_with(name, target) for target in suffixes)]
        names = [name for name in reach if scopes.allow(name) or _leaf(name) in _EXCLUDED_LEAVES]
        if 0 < len(names) < len(reach):
            log.info(f"target_modules: {len(reach) - len(names)} of {len(reach)} lie in parts that are not finetuned")
    mixed = any(not Scopes().allow(name) for name in linears)
    if layers is not None and mixed:
        names = [name for name in names if Scopes().allow(name) and _layer_of(name) in layers]
    experts = _expert_targets(model, asked, scopes, layers)
    parameters = list(explicit_parameters) if explicit_parameters is not None else experts
    if not names and not parameters:
        raise ConfigError(
            f"the finetune_* flags leave nothing of {type(model).__name__} to adapt",
            where="argument finetune_language_layers and others",
            hint="switch at least one part and one of attention and mlp on",
        )
    modules = suffixes if len(names) == len(reach) and not _reach_others(model, suffixes) else names
    native_layers = None if mixed else layers
    matched = names
    if native_layers is not None:
        pattern = re.compile(rf"\.{re.escape(layers_pattern)}\.(\d+)\.") if layers_pattern else _LAYER_INDEX
        found = {name: pattern.search(f".{name}.") for name in names}
        matched = [name for name, hit in found.items() if hit and int(hit.group(1)) in native_layers]
    _check_chosen(model, matched)
    return Targets(list(modules), frozenset(matched), parameters, native_layers)


def _by_expression(
    model: nn.Module,
    expression: str,
    linears: list[str],
    scopes: Scopes,
    layers: list[int] | None,
    explicit_parameters: list[str] | None,
) -> Targets:
    if layers is not None:
        raise ConflictError(
            "target_modules as a regular expression and a choice of layers contradict each other",
            hint="write the layers into the expression, or give target_modules as a list",
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"target_modules is no valid regular expression: {expression!r}", where="target_modules", why=str(error)
        ) from error
    matched = [name for name in linears if pattern.fullmatch(name)]
    parameters = _expert_targets(model, expression, scopes, None)
    if not matched and not parameters:
        # A single bare name is a common slip for a list of one.
        named = any(_ends_with(name, expression) for name in linears)
        leaves = sorted({_leaf(name) for name in linears} - _EXCLUDED_LEAVES)
        raise ConfigError(
            f"the regular expression {expression!r} matches no module of {type(model).__name__}",
            where="argument target_modules",
            hint=f"pass [{expression!r}]"
            if named
            else f"it must match whole names such as {linears[0]!r}; candidates: {', '.join(leaves)}",
        )
    _check_chosen(model, matched)
    chosen = list(explicit_parameters) if explicit_parameters is not None else parameters
    return Targets(expression, frozenset(matched), chosen, None)

"""LoRA adapters: checks, the PEFT configuration they become, and what is done to the model around them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import log
from .._compat.peft import answering
from .._compat.peft_four_bit import prepare as prepare_four_bit
from .._compat.peft_four_bit import shown
from ..device import require
from ..errors import ArgumentError, ConfigError, ConflictError, UnsupportedError, unknown_arguments
from ..parallel import parts
from . import qat
from .adapt import adapt
from .checkpointing import check_mode, set_checkpointing
from .inference import attach_generate, for_training
from .methods import attach_methods, write_whole
from .record import ModelRecord, attach_record, record_of
from .targets import Scopes, Targets, adapted_modules, choose_layers, resolve_targets
from .tokenizers import NEW_TOKENS_ATTRIBUTE, is_tied

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BIASES = ("none", "all", "lora_only")
# Initialisations that need nothing but the weights. Others of PEFT read data first.
_INITIALISATIONS = ("gaussian", "loftq", "corda", "pissa", "olora", "orthogonal")
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """Everything that ``get_peft_model`` was asked for; the two public signatures differ only in defaults.

    Attributes:
        scopes: The parts of the model that may be adapted.
        only_embeddings_saved: ``modules_to_save`` may name the embedding and the head only.
        second_call_raises: A model that has LoRA already is refused even for an equal request.
        extra: Further fields of PEFT's ``LoraConfig``.
    """

    r: Any = 16
    target_modules: Any = None
    lora_alpha: Any = 16
    lora_dropout: Any = 0.0
    bias: Any = "none"
    layers_to_transform: Any = None
    layers_pattern: Any = None
    finetune_last_n_layers: Any = None
    use_gradient_checkpointing: Any = "unsloth"
    random_state: Any = 3407
    use_rslora: bool = False
    modules_to_save: Any = None
    init_lora_weights: Any = True
    loftq_config: Any = None
    task_type: Any = "CAUSAL_LM"
    qat_scheme: Any = None
    target_parameters: Any = None
    ensure_weight_tying: bool = False
    scopes: Scopes = field(default_factory=Scopes)
    only_embeddings_saved: bool = True
    second_call_raises: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_values(request: AdapterRequest) -> None:
    if isinstance(request.r, bool) or not isinstance(request.r, int) or request.r <= 0:
        raise ArgumentError(f"the rank r must be a whole number above 0, got {request.r!r}", where="argument r")
    if not _number(request.lora_alpha) or request.lora_alpha <= 0:
        raise ArgumentError(f"lora_alpha must be a number above 0, got {request.lora_alpha!r}", where="lora_alpha")
    if not _number(request.lora_dropout) or not 0 <= request.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must lie in [0, 1), got {request.lora_dropout!r}", where="lora_dropout")
    if request.bias not in _BIASES:
        raise ConfigError(f"unknown bias {request.bias!r}", where="argument bias", hint=f"use {', '.join(_BIASES)}")
    known = {item.name for item in dataclasses.fields(_lora_config_class())}
    if not known >= set(request.extra):
        own = {item.name for item in dataclasses.fields(AdapterRequest)} - {"extra", "scopes"}
        raise unknown_arguments(set(request.extra) - known, known | own, where="get_peft_model")


def _lora_config_class() -> Any:
    from peft import LoraConfig

    return LoraConfig


def _check_initialisation(request: AdapterRequest, quantization: str, *, divided: bool) -> tuple[Any, Any]:
    """Return ``init_lora_weights`` and ``loftq_config`` as PEFT takes them."""
    init, loftq = request.init_lora_weights, request.loftq_config or {}
    is_known = isinstance(init, bool) or init in _INITIALISATIONS or re.fullmatch(r"pissa_niter_\d+", str(init))
    if not is_known:
        raise ConfigError(
            f"unknown init_lora_weights {init!r}",
            where="argument init_lora_weights",
            hint=f"use True, False, {', '.join(map(repr, _INITIALISATIONS))} or 'pissa_niter_N'",
        )
    if loftq and init != "loftq":
        raise ConfigError(
            f"loftq_config was given and init_lora_weights is {init!r}, which does not read it",
            where="argument loftq_config",
            hint="pass init_lora_weights='loftq', or leave loftq_config out",
        )
    if init == "corda" and request.extra.get("corda_config") is None:
        raise ConfigError("init_lora_weights='corda' needs corda_config", where="argument init_lora_weights")
    reads_base = request.extra.get("use_dora") or re.match("pissa|olora|corda", str(init))
    if reads_base and quantization.startswith("fp8_"):
        raise UnsupportedError(
            f"{'use_dora=True' if request.extra.get('use_dora') else f'init_lora_weights={init!r}'} reads the base's "
            "weights, which this model holds in fp8",
            where="get_peft_model",
            hint="use plain LoRA, or load the model in 16 bit or with load_in_4bit=True",
        )
    if divided and (reads_base or init == "loftq"):
        raise UnsupportedError(
            f"{'use_dora=True' if request.extra.get('use_dora') else f'init_lora_weights={init!r}'} reads the base's "
            "weights, of which each rank holds its part",
            where="get_peft_model",
            hint="use plain LoRA, or load the model without multi_gpu_config",
        )
    if init == "loftq":
        if quantization != "none":
            raise ConfigError(
                f"init_lora_weights='loftq' needs unquantised weights, and this model is held in {quantization}",
                where="argument init_lora_weights",
                why="LoftQ computes the quantisation error itself, from the 16-bit weights",
                hint="load the model with load_in_4bit=False",
            )
        require("scipy", what="init_lora_weights='loftq'")
        if not loftq:
            from peft import LoftQConfig

            loftq = LoftQConfig(loftq_bits=4, loftq_iter=1)
            log.once("init_lora_weights='loftq': loftq_config is LoftQConfig(loftq_bits=4, loftq_iter=1)")
    return init, loftq


def _leaf_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The last part of a module's name in ``model``, as it is without adapters."""
    for name, other in model.named_modules():
        if other is module and module is not None:
            plain = re.sub(r"\.(modules_to_save\.[^.]+|original_module|base_layer)$", "", name)
            return plain.rpartition(".")[2]
    return None


def _saved_modules(model: nn.Module, request: AdapterRequest) -> tuple[list[str] | None, Any]:
    """Settle which modules are trained in full, and the target modules that are left for LoRA."""
    embed = _leaf_of(model, model.get_input_embeddings())  # type: ignore[operator]
    head = _leaf_of(model, model.get_output_embeddings()) if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    given = request.modules_to_save
    if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
        raise ArgumentError(f"modules_to_save must be a list of names, got {given!r}", where="modules_to_save")
    names = {"embed_tokens": embed or "embed_tokens", "lm_head": head or "lm_head"}
    saved = [names.get(name, name) for name in given or []]
    allowed = set(names.values())
    if request.only_embeddings_saved and not set(saved) <= allowed:
        refused = sorted(set(saved) - allowed)
        raise ArgumentError(
            f"modules_to_save can name {' and '.join(sorted(allowed))} only, got {', '.join(refused)}",
            where="argument modules_to_save",
            hint="FastModel.get_peft_model takes any module",
        )
    targets = request.target_modules
    if isinstance(targets, list | tuple | set | frozenset) and names["embed_tokens"] in (
        moved := [names.get(name, name) if name == "embed_tokens" else name for name in targets]
    ):
        log.info(f"{names['embed_tokens']} is trained in full (modules_to_save), not through LoRA")
        saved.append(names["embed_tokens"])
        targets = [name for name in moved if name != names["embed_tokens"]]
    if getattr(model, NEW_TOKENS_ATTRIBUTE, 0):
        saved.append(names["embed_tokens"])
        in_targets = isinstance(targets, list | tuple) and names["lm_head"] in targets
        if head is not None and not is_tied(model) and not in_targets:
            saved.append(names["lm_head"])
    if not allowed.isdisjoint(saved) and isinstance(targets, list | tuple) and is_tied(model):
        # The weight that they share is trained in full.
        targets = [name for name in targets if name not in allowed]
    return list(dict.fromkeys(saved)) or None, targets


def _task_type(model: nn.Module, asked: Any) -> Any:
    """PEFT's task type; the default follows the model's head."""
    asked = getattr(asked, "value", asked)
    if asked != "CAUSAL_LM":
        from peft import TaskType

        known = [item.value for item in TaskType]
        if asked is not None and asked not in known:
            raise ConfigError(f"unknown task_type {asked!r}", where="argument task_type", hint=", ".join(known))
        return asked
    for suffix, task in _TASKS:
        if type(model).__name__.endswith(suffix):
            return task
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else asked


def _check_experts(request: AdapterRequest, parameters: list[str]) -> None:
    if parameters and (request.lora_dropout or request.extra.get("use_dora") or request.bias != "none"):
        raise UnsupportedError(
            f"LoRA on stacked expert weights ({', '.join(parameters[:3])}) takes no lora_dropout, use_dora or bias",
            hint="pass lora_dropout=0, bias='none' and use_dora=False, or leave gate_proj, up_proj and down_proj out",
        )


def _lora_config(
    model: nn.Module, request: AdapterRequest, targets: Targets, saved: list[str] | None, quantization: str
) -> Any:
    init, loftq = _check_initialisation(request, quantization, divided=parts.in_parts(model))
    tying = request.ensure_weight_tying
    if saved and not tying and is_tied(model):
        log.once("embedding and head share their weight: they are trained as one (ensure_weight_tying)")
        tying = True
    return _lora_config_class()(
        r=request.r,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        lora_alpha=request.lora_alpha,
        lora_dropout=float(request.lora_dropout),
        bias=request.bias,
        use_rslora=bool(request.use_rslora),
        modules_to_save=saved,
        init_lora_weights=init,
        loftq_config=loftq,
        layers_to_transform=targets.layers,
        layers_pattern=request.layers_pattern if targets.layers is not None else None,
        task_type=_task_type(model, request.task_type),
        ensure_weight_tying=tying,
        **request.extra,
    )


def _differences(old: Any, new: Any, old_modules: frozenset[str], new_modules: frozenset[str]) -> list[str]:
    names = ["r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights", "use_dora", "loftq_config"]
    found = [
        f"{name} ({getattr(old, name)!r} there, {getattr(new, name)!r} asked)"
        for name in names
        if (getattr(old, name) or None) != (getattr(new, name) or None)
    ]
    if old_modules != new_modules:
        found.append(f"target_modules ({len(old_modules)} adapted layers there, {len(new_modules)} asked)")
    for name in ("modules_to_save", "target_parameters"):
        there, asked = set(getattr(old, name) or ()), set(getattr(new, name) or ())
        if there != asked:
            found.append(f"{name} ({sorted(there)} there, {sorted(asked)} asked)")
    return found


def _second_call(model: Any, request: AdapterRequest, mode: bool | str, scheme: str | None) -> Any:
    if request.second_call_raises:
        raise ConflictError(
            "the model already has an adapter",
            hint="train it as it is, or load the base model again for another adapter",
        )
    base = model.get_base_model()
    old = model.peft_config[model.active_adapter]
    if not hasattr(old, "lora_alpha"):
        raise ArgumentError(
            f"the model already has an adapter of another kind ({old.peft_type})", where="get_peft_model"
        )
    new = _plan(base, request)
    different = _differences(old, new[0], adapted_modules(base), new[1].matched)
    known = qat.scheme_of(model)
    if known is not None and known != scheme:
        different.append(f"qat_scheme is {known!r}, not {scheme!r}")
    if different:
        raise ArgumentError(
            f"the model already has LoRA, and it differs: {'; '.join(different)}",
            where="get_peft_model",
            hint="train the adapter that is there (call get_peft_model with its values), or load the base again",
        )
    if scheme is not None and known is None:
        qat.check_model(model, scheme, old)
        qat.prepare(model, scheme)
    log.info("the model already has this LoRA: it is kept, with its weights")
    return finish_adapter(model, mode=mode)


def _plan(model: nn.Module, request: AdapterRequest) -> tuple[Any, Targets]:
    """The PEFT configuration for ``request`` and what it reaches."""
    saved, wanted = _saved_modules(model, request)
    layers = choose_layers(model, request.layers_to_transform, request.finetune_last_n_layers)
    if request.layers_pattern is not None and layers is None:
        raise ConfigError("layers_pattern needs layers_to_transform", where="argument layers_pattern")
    only_saved = isinstance(wanted, list) and not wanted and saved
    targets = (
        Targets([], frozenset(), [], None)
        if only_saved
        else resolve_targets(
            model,
            wanted,
            scopes=request.scopes,
            layers=layers,
            layers_pattern=request.layers_pattern,
            explicit_parameters=request.target_parameters,
        )
    )
    _check_experts(request, targets.parameters)
    record = record_of(model)
    quantization = record.quantization if record else "nf4" if getattr(model, "is_quantized", False) else "none"
    return _lora_config(model, request, targets, saved, quantization), targets


def make_peft_model(model: Any, request: AdapterRequest) -> Any:
    """Put the adapter that ``request`` describes on ``model``.

    Args:
        model: A transformers model, from ``from_pretrained`` or not, or one that has LoRA already.
        request: What is asked for.

    Returns:
        PEFT's wrapper around the model, ready for training; the model itself when it is trained in full.

    Raises:
        ArgumentError: a value of the wrong type or an unknown argument, or a different adapter is there.
        ConfigError: a value that cannot be used, or target modules that match nothing.
        ConflictError: options contradict each other.
        UnsupportedError: something this release or the model cannot do.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"get_peft_model takes a model, got {type(model).__name__}", where="argument model")
    _check_values(request)
    scheme = None
    if request.qat_scheme is not None:
        scheme = qat.check_scheme(request.qat_scheme, getattr(getattr(model, "config", None), "model_type", None))
    mode = check_mode(request.use_gradient_checkpointing)
    record = record_of(model)
    if record is not None and record.full_finetuning:
        log.info("the model is trained in full (full_finetuning=True): no adapter is added")
        return model
    if hasattr(model, "peft_config"):
        return _second_call(model, request, mode, scheme)
    if request.random_state is not None:
        seed_everything(request.random_state)
    config, targets = _plan(model, request)
    if scheme is not None:
        qat.check_model(model, scheme, config)
    if request.lora_dropout:
        log.once("lora_dropout > 0: what is dropped is drawn layer by layer, and training is slower than without")
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    # PEFT copies modules that are trained in full.
    parts.gather([m for name, m in model.named_modules() if name.rpartition(".")[2] in (config.modules_to_save or ())])
    # With checkpointing on PEFT makes the embedding output require gradients, which only reentrant checkpointing needs.
    set_checkpointing(model, False)
    with answering(model), shown(model):
        wrapped = get_peft_model(model, config)
    if scheme is not None:
        qat.prepare(wrapped, scheme)
    reached = sum(isinstance(m, LoraLayer) and not hasattr(m, "parameter_name") for m in wrapped.modules())
    log.info(
        f"LoRA r={request.r} on {reached} layers"
        + (f" and {len(targets.parameters)} expert parameters" if targets.parameters else "")
    )
    return finish_adapter(wrapped, mode=mode)


def seed_everything(value: Any) -> None:
    """Seed Python, NumPy and torch.

    Raises:
        ArgumentError: ``value`` is no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"random_state must be a whole number, got {value!r}", where="argument random_state")
    from transformers import set_seed

    set_seed(value)


def _cast_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(item.to(dtype) if torch.is_tensor(item) and item.is_floating_point() else item for item in args)


def _hold_in_float32(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Train ``module`` in fp32 inside a 16-bit model: it takes and gives the model's dtype.

    A 16-bit weight loses updates smaller than its rounding, which is what embeddings trained at 1e-5 get.
    """
    module.to(torch.float32)
    module.register_forward_pre_hook(_cast_to_weight)
    if isinstance(module, nn.Embedding):
        module.register_forward_hook(lambda _module, _args, output: output.to(compute_dtype))


def upcast_trainable(model: nn.Module) -> None:
    """Hold every weight that the adapter trains in fp32; the frozen base keeps its dtype.

    Args:
        model: A PEFT model.
    """
    from peft.utils import ModulesToSaveWrapper

    for module in list(model.modules()):
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            weight = getattr(copy, "weight", None)
            if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
                _hold_in_float32(copy, weight.dtype)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def finish_adapter(model: Any, *, mode: bool | str) -> Any:
    """Give a PEFT model what models of PantheraML carry, and put it into training.

    Args:
        model: A PEFT model.
        mode: Activation checkpointing, as ``check_mode`` returns it.
    """
    base = model.get_base_model()
    prepare_four_bit(model)
    parts.gather([model], trained_only=True)
    upcast_trainable(model)
    record: ModelRecord | None = record_of(model)
    if record is not None:
        attach_record(model, dataclasses.replace(record, gradient_checkpointing=mode))
    for name in ("max_seq_length", "_saved_temp_tokenizer"):
        if hasattr(base, name):
            for wrapper in (model, model.base_model):
                object.__setattr__(wrapper, name, getattr(base, name))
    adapt(model)
    attach_methods(model)
    if parts.in_parts(model):
        write_whole(model)
    attach_generate(model)
    for_training(model)
    if record is None:
        set_checkpointing(model, mode)
    return model

"""Which modules of a model could play a role that has a fused implementation.

A role is proposed by a declared mark (``kernel_layer_name``, which transformers puts on classes that its kernel hub
serves) or by structure: the parameters, children and attributes that a module has. There is no list of class names;
``probe`` decides whether a candidate computes what its role says.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from . import stacks

# transformers' kernel hub and its own decorators name root mean square norms so.
DECLARED_RMS_NORM = "RMSNorm"
# What families call the projections of their attention; the fourth, back to the hidden size, has many names.
QKV = ("q_proj", "k_proj", "v_proj")
# One projection that makes all three, queries first.
PACKED_QKV = "qkv_proj"
# An epsilon is a float attribute with this in its name, and smaller than this.
EPSILON_MARK = "eps"
LARGEST_EPSILON = 0.1


class Role(StrEnum):
    """What a module does in a decoder, as far as a fused implementation exists or is worth reporting."""

    NORM = "norm"
    GLU_MLP = "glu"
    ATTENTION = "attention"
    LORA = "lora"
    HEAD = "head"
    EXPERTS = "experts"
    LAYER = "layer"


@dataclass(frozen=True)
class Candidate:
    """A module that structure proposes for a role.

    Attributes:
        name: Qualified name in the model it was found in.
        module: The module.
        role: The proposed role.
    """

    name: str
    module: nn.Module
    role: Role


def base_model(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT's wrappers, or ``model`` itself when there are none."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module maps its last dimension from ``in_features`` to ``out_features``.

    Linear layers do, quantised ones too, and PEFT's layers around one.
    """
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def base_layer(module: Any) -> Any:
    """Return the layer that a PEFT layer wraps, or the module itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def splits_packed(up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Whether shapes ``(in, out)`` are those of a packed gate and up projection and of the projection back."""
    return up[1] == 2 * down[0] and up[0] == down[1]


def linear_children(module: nn.Module) -> dict[str, Any]:
    """Return the direct children that are linear layers, by name, in order of definition."""
    return {name: child for name, child in module.named_children() if is_linear(child)}


def epsilon(module: nn.Module) -> float | None:
    """Return the one epsilon among a module's attributes, or None when there is none or more than one."""
    found = {
        value
        for name, value in vars(module).items()
        if EPSILON_MARK in name.lower() and isinstance(value, float) and 0.0 < value < LARGEST_EPSILON
    }
    return found.pop() if len(found) == 1 else None


def looks_like_norm(module: nn.Module) -> bool:
    """One-dimensional ``weight`` (and ``bias``) or none at all, no children, and an epsilon."""
    if next(module.children(), None) is not None or epsilon(module) is None:
        return False
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters:
        # Norms without weights; quantisers and samplers also have an epsilon and nothing else.
        return "norm" in type(module).__name__.lower() and not any(True for _ in module.buffers(recurse=False))
    return parameters.keys() <= {"weight", "bias"} and all(parameter.dim() == 1 for parameter in parameters.values())


def looks_like_glu_mlp(module: nn.Module) -> bool:
    """Two linear layers of one shape and one of the reverse shape, or one onto twice the width and one back."""
    if any(parameter is not None for parameter in module._parameters.values()) or not takes_one_tensor(module):
        return False
    shapes = [(child.in_features, child.out_features) for child in linear_children(module).values()]
    if len(shapes) == 2:
        return splits_packed(*shapes) or splits_packed(*reversed(shapes))
    if len(shapes) == 3:
        # Two of one shape and one of the reverse shape: the odd one out projects back. Three square ones are attention.
        return any(first == second == back[::-1] != back for first, second, back in itertools.permutations(shapes))
    return False


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the class's forward can be called with one positional argument."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(positional) and all(p.default is not p.empty for p in positional[1:])


def qkv_children(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the children that make queries, keys and values, where all linear children but one do."""
    linears = linear_children(module)
    for names in (QKV, (PACKED_QKV,)):
        if all(name in linears for name in names) and len(linears) == len(names) + 1:
            return names
    return None


def looks_like_attention(module: nn.Module) -> bool:
    """Projections of queries, keys and values under their usual names, one more linear layer, and a configuration."""
    return (
        qkv_children(module) is not None
        and isinstance(getattr(module, "head_dim", None), int)
        and hasattr(module, "config")
        and hasattr(module, "layer_idx")
    )


def is_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers around a linear layer."""
    return is_linear(module) and all(
        hasattr(module, name) for name in ("lora_A", "lora_B", "base_layer", "scaling", "active_adapters")
    )


def is_parameter_lora(module: Any) -> bool:
    """Whether a module is PEFT's LoRA on one parameter of the module that it wraps."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A") and hasattr(module, "base_layer")


def looks_like_experts(module: nn.Module) -> bool:
    """Several three-dimensional parameters whose first dimension is a number of experts that the module knows."""
    stacked = [shape[0] for shape in stacks.shapes(module).values()]
    counts = {value for name, value in vars(module).items() if "expert" in name and type(value) is int}
    return len(stacked) >= 2 and len(set(stacked)) == 1 and stacked[0] in counts


def is_declared_norm(module: nn.Module) -> bool:
    """Whether transformers marks the class as a root mean square norm that a kernel may serve."""
    return getattr(type(module), "kernel_layer_name", None) == DECLARED_RMS_NORM


def find_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Find the output head of a model with a language head.

    Args:
        model: The transformers model (not PEFT's wrapper).

    Returns:
        Name and module as ``get_output_embeddings()`` gives it, PEFT's wrapper included; None without a head.
    """
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        head = getter()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(head, nn.Module):
        return None
    for name, module in model.named_modules():
        if module is head:
            return name, head
    return None


def head_modules(name: str, head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forwards are the head: the head itself, or what PEFT's modules_to_save switches between.

    A ``ModulesToSaveWrapper`` only picks the active module, so that the modules inside it are the heads. Every other
    wrapper (LoRA, trainable tokens) changes what is computed and is the head as a whole.
    """
    saved = getattr(head, "modules_to_save", None)
    original = getattr(head, "original_module", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(original, nn.Module):
        yield f"{name}.original_module", original
        for adapter, module in saved.items():
            yield f"{name}.modules_to_save.{adapter}", module
    else:
        yield name, head


def decoder_children(module: nn.Module) -> tuple[str, str, list[str]] | None:
    """Names of a decoder layer's attention, its MLP and its norms; None unless that is all that has parameters."""
    attention, mlp, norms = [], [], []
    if next(module.parameters(recurse=False), None) is not None:
        return None
    for name, child in module.named_children():
        if looks_like_attention(child):
            attention.append(name)
        elif is_declared_norm(child) or looks_like_norm(child):
            norms.append(name)
        elif looks_like_glu_mlp(child):
            mlp.append(name)
        elif next(child.parameters(), None) is not None:
            return None
    if len(attention) != 1 or len(mlp) != 1 or not 1 <= len(norms) <= 4:
        return None
    return attention[0], mlp[0], norms


def looks_like_layer(module: nn.Module) -> bool:
    """One attention and norms, whatever else there is."""
    children = list(module.children())
    return sum(looks_like_attention(child) for child in children) == 1 and any(
        is_declared_norm(child) or looks_like_norm(child) for child in children
    )


def find_roles(model: nn.Module) -> list[Candidate]:
    """Propose a role for every module that has one.

    Args:
        model: A transformers model, or PEFT's wrapper around one.

    Returns:
        Candidates in module order, the head last. Names are those of the inner transformers model.
    """
    inner = base_model(model)
    found: list[Candidate] = []
    head = find_head(inner)
    heads = [] if head is None else [Candidate(name, module, Role.HEAD) for name, module in head_modules(*head)]
    # A head with an adapter is a head first.
    taken = {id(candidate.module) for candidate in heads}
    for name, module in inner.named_modules():
        if id(module) in taken:
            continue
        if is_declared_norm(module) or looks_like_norm(module):
            found.append(Candidate(name, module, Role.NORM))
        elif is_lora(module):
            found.append(Candidate(name, module, Role.LORA))
        elif looks_like_attention(module):
            found.append(Candidate(name, module, Role.ATTENTION))
        elif looks_like_experts(module):
            found.append(Candidate(name, module, Role.EXPERTS))
        elif looks_like_glu_mlp(module):
            found.append(Candidate(name, module, Role.GLU_MLP))
        elif looks_like_layer(module):
            found.append(Candidate(name, module, Role.LAYER))
    return found + heads


def plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stock torch, not a subclass that redefines operations (quantised, fake, functional)."""
    return type(tensor) in (torch.Tensor, nn.Parameter)

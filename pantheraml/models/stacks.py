"""The stacked weights of a mixture's experts, as a module holds them: parameters [experts, ., .], plain or in 4 bits.

In 4 bits they lie as bitsandbytes' ``replace_parameter_4bit`` leaves them: a parametrisation of torch, so that stock
forwards read a dense stack under the old name. Such a read makes the whole stack; nothing in this file does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels.reference.nf4 import Quantized4Bit

# Attribute of a loaded model: the conversions from and to the checkpoint of the dense model.
DENSE_CONVERSIONS = "_pantheraml_dense_conversions"
PARAMETRIZATIONS = "parametrizations"
_HOOKS = "bitsandbytes.nn.parametrize"
_KNOWN = "_pantheraml_stacks"


def four_bit(module: nn.Module) -> dict[str, Any]:
    """The stacks of ``module`` that are in 4 bits by name: torch's list of parametrisations, with the bytes inside."""
    lists: Any = module._modules.get(PARAMETRIZATIONS)
    if lists is None:
        return {}
    return {name: entry for name, entry in lists.items() if getattr(entry[0], "quant_state", None) is not None}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own three-dimensional weights by name, in 4 bits or not."""
    found = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    packed = {name: tuple(entry[0].quant_state.shape) for name, entry in four_bit(module).items()}
    return found | {name: shape for name, shape in packed.items() if len(shape) == 3}


def held(module: Any, name: str) -> torch.Tensor | Quantized4Bit:
    """A stack as it is held; one that is plain, with what others have put on it."""
    entry = four_bit(module).get(name) if PARAMETRIZATIONS in module._modules else None
    if entry is None:
        return getattr(module, name)
    packed = entry.original
    known = module.__dict__.setdefault(_KNOWN, {})
    kept = known.get(name)
    # An address alone may have been freed and given to other bytes in the meantime.
    if kept is None or kept[0] is not packed or kept[1] != packed.data_ptr():
        described = Quantized4Bit.from_quant_state(packed.data, entry[0].quant_state)
        kept = known[name] = (packed, packed.data_ptr(), described)
    return kept[2]


def packed_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the stack whose bytes are the parameter of ``module``; None for other modules."""
    first = module._modules.get("0") if "original" in module._parameters else None
    state = getattr(first, "quant_state", None)
    return None if state is None else tuple(state.shape)


def adapted_by_others(module: nn.Module) -> bool:
    """Whether something besides the dequantisation stands between a stack and who reads it."""
    return any(len(entry) != 1 for entry in four_bit(module).values())


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module calls its forward alone, apart from keeping dequantised stacks for its duration."""
    d = module.__dict__
    if d["_backward_hooks"] or d["_backward_pre_hooks"]:
        return False
    return all(
        getattr(hook, "__module__", None) == _HOOKS
        for hooks in ("_forward_hooks", "_forward_pre_hooks")
        for hook in d[hooks].values()
    )


def count(module: nn.Module) -> tuple[int, int]:
    """How many numbers the stacks of ``module`` hold, and how many of them in 4 bits."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes(module).items()}
    return sum(sizes.values()), sum(sizes[name] for name in four_bit(module))

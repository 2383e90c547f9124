"""The output head: its forward returns logits that nobody has computed yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..roles import is_linear, plain_tensor
from . import lazy_ops as _lazy_ops  # noqa: F401  (registers what lazy logits do)
from .lazy import LazyLogits, Node
from .projection import Projection, eager_heads, wants_lazy
from .slots import Swap, stock_forward


@dataclass(frozen=True)
class HeadPlan:
    """How a head is computed.

    Attributes:
        plain: Whether the head is one product with ``weight`` and ``bias``; otherwise only its own forward, which may
            quantise, add adapters or merge tokens, knows how.
        float32: Whether the product is taken in float32, outside autocast.
    """

    plain: bool
    float32: bool = False

    def linear(self, module: nn.Module) -> tuple[torch.Tensor | Callable[[], torch.Tensor], torch.Tensor | None] | None:
        """Return weight [V, H], or a function that gathers a sharded one, and bias [V]; None when not plain."""
        if not self.plain:
            return None
        weight: Any = module.weight
        bias: Any = module.bias
        if isinstance(weight, DTensor):
            return lambda: weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias
        if not plain_tensor(weight) or weight.dim() != 2:
            return None
        return weight, bias

    def dtype(self, module: nn.Module, hidden: torch.Tensor) -> torch.dtype:
        """Return the dtype of the logits that the head makes of ``hidden`` now."""
        if not self.plain:
            # No rows: costs nothing and draws no random numbers.
            with torch.no_grad(), eager_heads():
                return stock_forward(module, hidden.reshape(-1, hidden.shape[-1])[:0]).dtype
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        return torch.float32 if self.float32 else hidden.dtype


def out_features(module: nn.Module) -> int | None:
    """Size of the vocabulary that a head maps to; None when it is not a linear layer or a wrapper of one."""
    linears: tuple[Any, ...] = (module, getattr(module, "original_module", None))
    for linear in linears:
        if is_linear(linear):
            weight = getattr(linear, "weight", None)
            sizes = {linear.in_features, linear.out_features}
            # Where a head is tied, the copy that PEFT trains has the embedding's sizes the wrong way round.
            stated = not isinstance(weight, torch.Tensor) or weight.dim() != 2 or set(weight.shape) != sizes
            return linear.out_features if stated else weight.shape[0]
    return None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped head: ``hidden [..., H]`` to lazy logits ``[..., V]``.

    Whatever is not a plain call on hidden states outside tracing, and a decoding step, goes to the stock forward.
    """
    hidden = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(hidden, torch.Tensor) or not wants_lazy(hidden) or not _weights_stay(self):
        return stock_forward(self, *args, **kwargs)
    size = out_features(self)
    assert size is not None
    return LazyLogits.of(Node(hidden, Projection.of_call(self, hidden, size)))


def _weights_stay(module: nn.Module) -> bool:
    """Whether the weights are still there after the head's forward has returned."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    if any(getattr(one, "offload", False) for one in hooks):
        return False
    # DeepSpeed's third stage gathers parameters for the time of a forward; it marks them with an id.
    return not any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def plan(module: nn.Module) -> Swap | str:
    """Find out how a head is computed.

    Args:
        module: The module that ``roles`` found as the head.

    Returns:
        What to install, or why the head keeps its forward.
    """
    if not out_features(module):
        return "it is not a linear layer"
    plain = type(module).forward is nn.Linear.forward
    name = "linear_cross_entropy" if plain else "linear_cross_entropy (through the wrapped layer)"
    return Swap("head", name, HeadPlan(plain), forward)

"""The chain of scalar operations that a family applies to its logits, and its form as the kernels know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """One scalar operation on the logits: ``mul``, ``div``, ``tanh`` or ``to``."""

    name: str
    value: Any = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return _APPLY[self.name](x, self.value)


_APPLY: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "mul": lambda x, value: x * value,
    "div": lambda x, value: x / value,
    "tanh": lambda x, _: torch.tanh(x),
    "to": lambda x, value: x.to(value),
}


@dataclass(frozen=True)
class Affine:
    """A chain in the form that the kernels know: ``soft_cap * tanh(logit_scale * x / soft_cap)``."""

    logit_scale: float = 1.0
    soft_cap: float | None = None


def _snap(value: float) -> float:
    """A cap divided by and multiplied with again leaves 1 up to rounding; make that exactly 1."""
    return 1.0 if abs(value - 1.0) < 1e-12 else value


def as_affine(chain: Sequence[Op]) -> Affine | None:
    """Reduce a chain to a scale and a soft cap.

    ``b * tanh(a * x)`` is a soft cap of ``b`` after a scale of ``a * b``. Casts to float32 and above change nothing, as
    the kernels compute in float32 anyway.

    Returns:
        The reduced chain, or None when it has another form.
    """
    before, after, capped = 1.0, 1.0, False
    for op in chain:
        if op.name == "tanh":
            if capped:
                return None
            before, after, capped = after, 1.0, True
        elif op.name == "to":
            if op.value not in (torch.float32, torch.float64):
                return None
        elif op.name == "div" and op.value == 0:
            return None
        else:
            after = after * op.value if op.name == "mul" else after / op.value
    if not capped:
        return Affine(_snap(after))
    return Affine(_snap(before * after), after) if after > 0 else None

"""Gated linear units in eager torch: the specification of ``pantheraml.kernels.glu``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """``act(clamped gate) * (clamped up + up_offset)`` in the dtype of the inputs; see ``pantheraml.kernels.glu``."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    activated = ACTIVATIONS[activation](gate) if alpha is None else gate * torch.sigmoid(alpha * gate)
    return activated * (up + up_offset) if up_offset else activated * up


def split(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of gate and up in a packed ``[..., 2 I]``: halves, or even and odd columns when interleaved."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def packed_glu(
    gate_up: torch.Tensor, activation: str = "silu", *, interleaved: bool = False, **options: Any
) -> torch.Tensor:
    """``glu`` of the two parts of a packed ``[..., 2 I]``; see ``pantheraml.kernels.packed_glu``."""
    return glu(*split(gate_up, interleaved), activation, **options)

"""LayerNorm in eager torch: the specification of ``pantheraml.kernels.layer_norm``."""

from __future__ import annotations

import torch

from .numerics import wide


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise by mean and variance over the last dimension, in float32 or float64, rounded once at the end."""
    x_wide = wide(x)
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype)

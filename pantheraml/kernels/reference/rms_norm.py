"""RMSNorm in eager torch: the specification of ``pantheraml.kernels.rms_norm``."""

from __future__ import annotations

import torch

from .numerics import wide


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "input",
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise by the root mean square over the last dimension, accumulating in float32 (float64 for float64).

    Arguments and result as in ``pantheraml.kernels.rms_norm``; differentiable by autograd. Runs the torch operations
    of the model families it stands for in their order, so it rounds where they round.
    """
    total = x if residual is None else x + residual
    x_wide = wide(total)
    x_hat = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        y = x_hat.to(total.dtype)
    elif casting == "input":
        y = weight * x_hat.to(total.dtype)
    else:
        y = ((offset + wide(weight)) * x_hat).to(total.dtype)
    return y if residual is None else (y, total)

"""What several references share: the accumulation dtype and row-wise fp8 quantisation."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in its accumulation dtype: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def quantize_rows(y: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of the last dimension to fp8 with its own scale.

    Args:
        y: ``[..., D]``, float32 or float64.
        dtype: An fp8 dtype.

    Returns:
        Values ``[..., D]`` in ``dtype`` and scales ``[..., 1]`` in float32, with ``y ≈ values * scales``. The scale is
        the row's largest magnitude divided by the largest finite value of ``dtype``; a row of zeros has scale 1.
    """
    largest = torch.finfo(dtype).max
    amax = y.abs().amax(-1, keepdim=True).float()
    scales = torch.where(amax > 0, amax / largest, 1.0)
    return (y / scales).clamp(-largest, largest).to(dtype), scales

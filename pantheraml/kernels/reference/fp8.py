"""Quantisation of matrices to fp8 and products of them, in plain torch: the specification."""

from __future__ import annotations

import torch

from .numerics import quantize_rows

__all__ = ["dequantize_blocks", "dequantize_rows", "matmul", "quantize_blocks", "quantize_rows"]


def _block_view(x: torch.Tensor, block: int) -> torch.Tensor:
    """Zero-pad [M, N] to whole blocks and view as [M / block, block, N / block, block]."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % block, 0, -rows % block))
    return padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)


def quantize_blocks(x: torch.Tensor, dtype: torch.dtype, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [M, N] with one scale a ``block`` x ``block`` tile, ``x ≈ values * scale``.

    The scale is the tile's largest magnitude divided by the largest finite value of ``dtype``; 1 for a tile of
    zeros.

    Returns:
        Values [M, N] in ``dtype`` and scales [ceil(M / block), ceil(N / block)] in float32.
    """
    largest = torch.finfo(dtype).max
    wide = x if x.dtype == torch.float64 else x.float()
    tiles = _block_view(wide, block)
    amax = tiles.abs().amax(dim=(1, 3)).float()
    scales = torch.where(amax > 0, amax / largest, 1.0)
    values = (tiles / scales[:, None, :, None]).clamp(-largest, largest)
    values = values.reshape(tiles.shape[0] * block, tiles.shape[2] * block)
    return values[: x.shape[0], : x.shape[1]].to(dtype).contiguous(), scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values * scales`` with scales [..., 1], in float32, rounded to ``dtype``."""
    return (values.float() * scales).to(dtype)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: int = 128) -> torch.Tensor:
    """``values * scale`` of each element's tile, in float32, rounded to ``dtype``."""
    spread = scales.repeat_interleave(block, 0)[: values.shape[0]].repeat_interleave(block, 1)[:, : values.shape[1]]
    return (values.float() * spread).to(dtype)


def matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(x * x_scales) @ (weight * weight_scales).T + bias`` in float32, rounded to ``dtype``."""
    y = (x.float() @ weight.float().t()) * x_scales * weight_scales.t()
    return (y if bias is None else y + bias.float()).to(dtype)

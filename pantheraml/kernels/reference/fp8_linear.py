"""Products with frozen fp8 weights, and what prepares their factors, in plain torch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from .nf4 import Quantized4Bit, scales
from .numerics import wide

# Rows whose largest magnitude is below it are quantised as if it were this, so that no reciprocal overflows.
TINY = 1e-30


def _quotient(number: float, divisor: torch.Tensor) -> torch.Tensor:
    """``number / divisor``, rounded once; torch itself multiplies the number with the divisor's rounded inverse."""
    return torch.full_like(divisor, number) / divisor


def joined_rows(
    parts: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of several matrices, each times its factor, side by side and quantised row by row.

    Args:
        parts: [T, O_i] each.
        factors: [O_i] each, float32.
        dtype: An fp8 dtype.

    Returns:
        Values [T, sum of O_i] in ``dtype`` and scales [T, 1] in float32.
    """
    largest = torch.finfo(dtype).max
    joined = torch.cat([wide(part) * factor for part, factor in zip(parts, factors)], dim=1)
    amax = joined.abs().amax(1, keepdim=True).clamp_min(TINY)
    return (joined * _quotient(largest, amax)).to(dtype), (amax / largest).float()


def groups(x: torch.Tensor, dtype: torch.dtype, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [T, I] with one scale for ``group`` elements of a row.

    Returns:
        Values [T, I] in ``dtype`` and scales [ceil(I / group), T] in float32.
    """
    rows, width = x.shape
    largest = torch.finfo(dtype).max
    tiles = functional.pad(wide(x), (0, -width % group)).view(rows, -(-width // group), group)
    amax = tiles.abs().amax(2, keepdim=True).clamp_min(TINY)
    values = (tiles * _quotient(largest, amax)).reshape(rows, tiles.shape[1] * group)[:, :width].to(dtype).contiguous()
    return values, (amax / largest).float().squeeze(2).t().contiguous()


def group_matmul(
    values: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
    group: int,
) -> torch.Tensor:
    """``x @ weight.T`` in float32 of a factor scaled in groups and one scaled in tiles, rounded to ``dtype``.

    Args:
        values: [T, I] fp8.
        row_scales: [ceil(I / group), T].
        weight: [O, I] fp8.
        weight_scales: [ceil(O / group), ceil(I / group)].
        dtype: Dtype of the result.
        group: Edge of a tile and elements of a group.
    """
    spread = row_scales.t().repeat_interleave(group, 1)[:, : values.shape[1]]
    tiles = weight_scales.repeat_interleave(group, 0)[: weight.shape[0]]
    tiles = tiles.repeat_interleave(group, 1)[:, : weight.shape[1]]
    return ((values.float() * spread) @ (weight.float() * tiles).t()).to(dtype)


def nf4_to_fp8(quantized: Quantized4Bit, row_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A 4-bit weight divided by a scale of each row, rounded to fp8 once.

    Element ``(r, i)`` is ``code * (block's scale * (1 / row_scales[r]))`` in float32.

    Args:
        quantized: [O, I] whose rows are whole blocks.
        row_scales: [O, 1] float32.
        dtype: An fp8 dtype.

    Returns:
        [O, I] in ``dtype``.
    """
    rows, width = quantized.shape
    factors = scales(quantized).view(rows, -1) * _quotient(1.0, row_scales)
    packed = quantized.packed.reshape(-1)
    codes = quantized.code[torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).long()]
    return (codes.view(rows, width) * factors.repeat_interleave(quantized.blocksize, 1)).to(dtype)

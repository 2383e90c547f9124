"""LayerNorm over the last dimension: ``y = (x - mean) / sqrt(var + eps) * weight + bias``, forward and backward.

Ba et al., "Layer Normalization", https://arxiv.org/abs/1607.06450. Everything is accumulated in float32. The mean is
taken twice, the second time of what the first left, so that its rounding does not stay in the result where it is large
beside the deviation; the variance is that of the centred values. Means are divided with correct rounding: the fast
division of GPUs is off by up to two units in the last place, which the difference to the mean would show. The gradients
of weight and bias are sums of partial sums in a fixed order, without atomics: the same bits in every run on the same
chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference.layer_norm import layer_norm as layer_norm_reference
from .utils import (
    as_rows,
    cdiv,
    launch_settings,
    persistent_programs,
    require_floating,
    require_same_device,
    require_shape,
)


@jit
def _row_mean(x, width):
    """Mean of each row of a tile whose padding is zero, rounded correctly after the sum."""
    return tl.div_rn(tl.sum(x, axis=1), width * 1.0)


@jit(do_not_specialize=["count"])
def _layer_norm_forward_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``m = mean(x); r = rsqrt(mean((x - m)²) + eps); y = (x - m) * r * weight + bias``; float32 inside."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = i_row < count
    m_col = o_col < width
    mask = m_row[:, None] & m_col[None, :]
    o_x = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[:, None] + o_col[None, :]
    b_x = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    m = _row_mean(b_x, width)
    centred = tl.where(mask, b_x - m[:, None], 0.0)
    rest = _row_mean(centred, width)
    centred = tl.where(mask, centred - rest[:, None], 0.0)
    r = tl.rsqrt(_row_mean(centred * centred, width) + eps)
    tl.store(mean + i_row, m + rest, mask=m_row)
    tl.store(rstd + i_row, r, mask=m_row)
    out = centred * r[:, None]
    if weight is not None:
        out = out * tl.load(weight + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (i_row * width)[:, None] + o_col[None, :], out.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["count", "tiles", "programs"])
def _layer_norm_backward_kernel(
    dy,
    x,
    weight,
    mean,
    rstd,
    dx,
    dweight,
    dbias,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    tiles,
    programs,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``g = dy * weight; dx = r * (g - mean(g) - x̂ * mean(g * x̂))``; partial sums of dy * x̂ and dy per program.

    A program walks over tiles ``program, program + programs, ...``; its partial sums are float32.
    """
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < width
    w = tl.zeros((BLOCK,), tl.float32)
    if weight is not None:
        w = tl.load(weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_dw = tl.zeros((ROWS, BLOCK), tl.float32)
    b_db = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_tile in range(i_program, tiles, programs):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < count
        mask = m_row[:, None] & m_col[None, :]
        o_x = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[:, None] + o_col[None, :]
        o_y = (i_row * width)[:, None] + o_col[None, :]
        g = tl.load(dy + o_y, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(mean + i_row, mask=m_row, other=0.0)
        r = tl.load(rstd + i_row, mask=m_row, other=0.0)
        x_hat = tl.where(mask, (b_x - m[:, None]) * r[:, None], 0.0)
        if dweight is not None:
            b_dw += g * x_hat
        if dbias is not None:
            b_db += g
        if weight is not None:
            g = g * w[None, :]
        mean_g = _row_mean(g, width)
        mean_gx = _row_mean(g * x_hat, width)
        out = (g - mean_g[:, None] - x_hat * mean_gx[:, None]) * r[:, None]
        tl.store(dx + o_y, out.to(dx.dtype.element_ty), mask=mask)
    if dweight is not None:
        tl.store(dweight + i_program * width + o_col, tl.sum(b_dw, axis=0), mask=m_col)
    if dbias is not None:
        tl.store(dbias + i_program * width + o_col, tl.sum(b_db, axis=0), mask=m_col)


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel; returns ``y`` and the float32 ``mean`` and ``rstd`` of each row."""
    width = x.shape[-1]
    settings = launch_settings(width, where="layer_norm")
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows.count, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows.count:
        with on_device(x):
            _layer_norm_forward_kernel[(cdiv(rows.count, settings.rows),)](
                x=rows.tensor,
                weight=None if weight is None else weight.contiguous(),
                bias=None if bias is None else bias.contiguous(),
                y=y,
                mean=mean,
                rstd=rstd,
                count=rows.count,
                width=width,
                inner=rows.inner,
                outer_stride=rows.outer_stride,
                inner_stride=rows.inner_stride,
                eps=eps,
                ROWS=settings.rows,
                BLOCK=settings.block,
                num_warps=settings.num_warps,
            )
    return y, mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    *,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernel; returns dx in the dtype of ``x``, and float32 gradients of weight and bias."""
    width = x.shape[-1]
    settings = launch_settings(width, where="layer_norm")
    rows = as_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = cdiv(rows.count, settings.rows)
    programs = min(persistent_programs(x, settings.num_warps), tiles) if weight_grad or bias_grad else tiles
    dweight, dbias = (
        torch.empty((programs, width), dtype=torch.float32, device=x.device) if wanted else None
        for wanted in (weight_grad, bias_grad)
    )
    if rows.count:
        with on_device(x):
            _layer_norm_backward_kernel[(programs,)](
                dy=dy.contiguous(),
                x=rows.tensor,
                weight=None if weight is None else weight.contiguous(),
                mean=mean,
                rstd=rstd,
                dx=dx,
                dweight=dweight,
                dbias=dbias,
                count=rows.count,
                width=width,
                inner=rows.inner,
                outer_stride=rows.outer_stride,
                inner_stride=rows.inner_stride,
                tiles=tiles,
                programs=programs,
                ROWS=settings.rows,
                BLOCK=settings.block,
                num_warps=settings.num_warps,
                # Fused with a subtraction, products round otherwise than their mean: one element has no gradient, then.
                enable_fp_fusion=False,
            )
    return dx, None if dweight is None else dweight.sum(0), None if dbias is None else dbias.sum(0)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps: float):  # type: ignore[override]
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        dx, dweight, dbias = layer_norm_backward(
            dy, x, weight, mean, rstd, weight_grad=weight_grad, bias_grad=bias_grad
        )
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            None,
        )


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Layer normalisation over the last dimension, in float32, rounded once at the end.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16 (also float64 on the reference), any strides; two row strides and
            a contiguous last dimension are read in place, other layouts are copied. ``D <= 65,536`` on Triton.
        weight: ``[D]`` or None for 1.
        bias: ``[D]`` or None for 0.
        eps: Added to the variance.
        backend: See ``dispatch.resolve``.

    Returns:
        ``[..., D]`` in the dtype of ``x``.

    Raises:
        ConfigError: A shape is wrong.
        ArgumentError: A dtype is not floating point, or the devices differ.
        UnsupportedError: ``D`` is too large for the kernel.

    Deterministic. Saves x, the weight and two float32 a row for the backward.
    """
    require_floating("layer_norm", x=x, weight=weight, bias=bias)
    require_same_device("layer_norm", x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_shape("layer_norm", name, tensor, (x.shape[-1],))
    if dispatch.resolve("layer_norm", x, backend) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    integers = dict.fromkeys(("count", "width", "inner", "outer_stride", "inner_stride"), "i32")
    settings = launch_settings(4096)
    tile = {"ROWS": settings.rows, "BLOCK": settings.block}
    statistics = {"mean": "*fp32", "rstd": "*fp32"}
    for dtype in ("fp16", "bf16", "fp32"):
        p, minimum, representative = f"*{dtype}", bfloat16_minimum(dtype), dtype == "bf16"
        yield Variant(
            f"layer_norm_forward-{dtype}",
            _layer_norm_forward_kernel,
            {"x": p, "weight": p, "bias": p, "y": p, **statistics, **integers, "eps": "fp32"},
            tile,
            settings.num_warps,
            minimum=minimum,
            representative=representative,
        )
        yield Variant(
            f"layer_norm_backward-{dtype}",
            _layer_norm_backward_kernel,
            {"dy": p, "x": p, "weight": p, **statistics, "dx": p, "dweight": "*fp32", "dbias": "*fp32", **integers}
            | {"tiles": "i32", "programs": "i32"},
            tile,
            settings.num_warps,
            minimum=minimum,
            representative=representative,
        )

"""RMSNorm over the last dimension: ``y = x / sqrt(mean(x²) + eps) * weight``, forward and backward.

Zhang & Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467. Everything is accumulated in
float32. The gradient of the weight is a float32 sum of partial sums in a fixed order, without atomics, rounded once:
the same bits in every run on the same chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch

from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from ._row_pieces import chips, columns_of, load_parameter, mask_of, row_pieces, store_partial, sum_partials
from ._triton import Launch, jit, remembered, tl
from ._variants import Variant, bfloat16_minimum
from .reference.numerics import quantize_rows
from .reference.rms_norm import rms_norm as rms_norm_reference
from .utils import (
    as_rows,
    cdiv,
    fp8_dtype,
    launch_settings,
    require_floating,
    require_same_device,
    require_shape,
    require_width,
)

CASTINGS = ("input", "float32")


@jit(do_not_specialize=["count"])
def _rms_norm_forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    scale,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    eps,
    offset,
    CAST_TO_INPUT: tl.constexpr,
    FP8_MAX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``h = x [+ residual]; r = rsqrt(mean(h²) + eps); y = h * r * (offset + weight)``; float32 inside."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = i_row < count
    mask = m_row[:, None] & (o_col < width)[None, :]
    o_x = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[:, None] + o_col[None, :]
    o_y = (i_row * width)[:, None] + o_col[None, :]

    h = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    h_type = x.dtype.element_ty
    if residual is not None:
        h += tl.load(residual + o_x, mask=mask, other=0.0).to(tl.float32)
        h_type = total.dtype.element_ty
        h = h.to(h_type)
        tl.store(total + o_y, h, mask=mask)
        h = h.to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)
    if rstd is not None:
        tl.store(rstd + i_row, r, mask=m_row)
    out = h * r[:, None]
    if CAST_TO_INPUT:
        out = out.to(h_type).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + o_col, mask=o_col < width, other=0.0).to(tl.float32)
        out = out * (w + offset)[None, :]
    if scale is not None:
        amax = tl.max(tl.abs(out), axis=1)
        s = tl.where(amax > 0.0, amax / FP8_MAX, 1.0)
        tl.store(scale + i_row, s, mask=m_row)
        out = tl.clamp(out / s[:, None], -FP8_MAX, FP8_MAX)
    tl.store(y + o_y, out.to(y.dtype.element_ty), mask=mask)


@jit
def _rms_norm_backward_tile(
    dy,
    dtotal,
    h,
    weight,
    rstd,
    dx,
    i_tile,
    w_0,
    w_1,
    dw_0,
    dw_1,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    offset,
    TRAINED: tl.constexpr,
    EVICTION: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """Gradient of one tile; returns the sums of dy * x̂ of its pieces with this tile's.

    The weight comes in registers where tiles follow each other, and is loaded here where there is one.
    """
    i_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = i_row < count
    o_h = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[None, :, None]
    o_y = (i_row * width)[None, :, None]
    c_0 = columns_of(0, N, P)
    m_0 = mask_of(m_row, c_0, width, FULL_N)
    g_0 = tl.load(dy + (o_y + c_0), mask=m_0, other=0.0, eviction_policy=EVICTION)
    x_0 = tl.load(h + (o_h + c_0), mask=m_0, other=0.0, eviction_policy=EVICTION)
    c_1, m_1, g_1, x_1 = c_0, m_0, g_0, x_0
    if M > 0:
        c_1 = columns_of(N * P, M, P)
        m_1 = mask_of(m_row, c_1, width, FULL_M)
        g_1 = tl.load(dy + (o_y + c_1), mask=m_1, other=0.0, eviction_policy=EVICTION)
        x_1 = tl.load(h + (o_h + c_1), mask=m_1, other=0.0, eviction_policy=EVICTION)
    r = tl.load(rstd + i_row, mask=m_row, other=0.0)[None, :, None]
    if weight is not None and not TRAINED:
        w_0 = load_parameter(weight, c_0, width, ROWS, FULL_N) + offset
        if M > 0:
            w_1 = load_parameter(weight, c_1, width, ROWS, FULL_M) + offset

    g_0 = g_0.to(tl.float32)
    x_0 = x_0.to(tl.float32) * r
    if TRAINED:
        dw_0 += g_0 * x_0
    if weight is not None:
        g_0 = g_0 * w_0
    total = tl.sum(g_0 * x_0, axis=0, keep_dims=True)
    if M > 0:
        g_1 = g_1.to(tl.float32)
        x_1 = x_1.to(tl.float32) * r
        if TRAINED:
            dw_1 += g_1 * x_1
        if weight is not None:
            g_1 = g_1 * w_1
        total += tl.sum(g_1 * x_1, axis=0, keep_dims=True)
    mean = tl.sum(total, axis=2, keep_dims=True) / width

    out = (g_0 - x_0 * mean) * r
    if dtotal is not None:
        out += tl.load(dtotal + (o_y + c_0), mask=m_0, other=0.0).to(tl.float32)
    tl.store(dx + (o_y + c_0), out.to(dx.dtype.element_ty), mask=m_0)
    if M > 0:
        out = (g_1 - x_1 * mean) * r
        if dtotal is not None:
            out += tl.load(dtotal + (o_y + c_1), mask=m_1, other=0.0).to(tl.float32)
        tl.store(dx + (o_y + c_1), out.to(dx.dtype.element_ty), mask=m_1)
    return dw_0, dw_1


@jit(do_not_specialize=["count", "tiles", "programs"])
def _rms_norm_backward_kernel(
    dy,
    dtotal,
    h,
    weight,
    rstd,
    dx,
    dweight,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    offset,
    tiles,
    programs,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """``g = dy * (offset + weight); dx = r * (g - x̂ * mean(g * x̂)) [+ dtotal]``; ``dweight[program] = sum dy * x̂``.

    Without dweight a program takes one tile. With it, it walks over tiles ``program, program + programs, ...``, and its
    partial sum is float32.
    """
    i_program = tl.program_id(0).to(tl.int64)
    w_0 = 0.0
    w_1 = 0.0
    dw_0 = 0.0
    dw_1 = 0.0
    if dweight is None:
        _rms_norm_backward_tile(
            dy,
            dtotal,
            h,
            weight,
            rstd,
            dx,
            i_program,
            w_0,
            w_1,
            dw_0,
            dw_1,
            count,
            width,
            inner,
            outer_stride,
            inner_stride,
            offset,
            False,
            "",
            ROWS,
            N,
            M,
            P,
            FULL_N,
            FULL_M,
        )
    else:
        dw_0 = tl.zeros((N, ROWS, P), tl.float32)
        w_0 = load_parameter(weight, columns_of(0, N, P), width, ROWS, FULL_N) + offset
        if M > 0:
            dw_1 = tl.zeros((M, ROWS, P), tl.float32)
            w_1 = load_parameter(weight, columns_of(N * P, M, P), width, ROWS, FULL_M) + offset
        for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
            dw_0, dw_1 = _rms_norm_backward_tile(
                dy,
                dtotal,
                h,
                weight,
                rstd,
                dx,
                i_tile,
                w_0,
                w_1,
                dw_0,
                dw_1,
                count,
                width,
                inner,
                outer_stride,
                inner_stride,
                offset,
                True,
                "evict_first",
                ROWS,
                N,
                M,
                P,
                FULL_N,
                FULL_M,
            )
        p_dweight = dweight + i_program * width
        store_partial(p_dweight, dw_0, 0, width, N, P, FULL_N)
        if M > 0:
            store_partial(p_dweight, dw_1, N * P, width, M, P, FULL_M)


class Forward(NamedTuple):
    """What the forward launcher returns.

    Attributes:
        y: Normalised rows ``[..., D]``; fp8 when asked for.
        total: ``x + residual``, or ``x`` itself.
        rstd: ``[rows]`` float32, what the backward needs beside ``total`` and the weight; None when not asked for.
        scales: ``[..., 1]`` float32 for fp8 output, else None.
    """

    y: torch.Tensor
    total: torch.Tensor
    rstd: torch.Tensor | None
    scales: torch.Tensor | None


@remembered
def _forward_launch(
    count: int,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    width: int,
    eps: float,
    offset: float,
    casting: str,
    fp8: torch.dtype | None,
) -> Launch:
    settings = launch_settings(width, where="rms_norm")
    return Launch(
        _rms_norm_forward_kernel,
        (cdiv(count, settings.rows),),
        ("x", "residual", "weight", "y", "total", "rstd", "scale"),
        count=count,
        width=width,
        inner=inner,
        outer_stride=outer_stride,
        inner_stride=inner_stride,
        eps=eps,
        offset=offset,
        CAST_TO_INPUT=casting == "input",
        FP8_MAX=torch.finfo(fp8).max if fp8 is not None else 0.0,
        ROWS=settings.rows,
        BLOCK=settings.block,
        num_warps=settings.num_warps,
    )


@remembered
def _backward_launch(
    count: int,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    width: int,
    offset: float,
    programs: int,
    fetched: int | None,
) -> Launch:
    """``fetched`` bytes an element of the operands are in flight; None where a program takes one tile."""
    pieces = row_pieces(width, where="rms_norm")
    return Launch(
        _rms_norm_backward_kernel,
        (programs,),
        ("dy", "dtotal", "h", "weight", "rstd", "dx", "dweight"),
        count=count,
        width=width,
        inner=inner,
        outer_stride=outer_stride,
        inner_stride=inner_stride,
        offset=offset,
        tiles=cdiv(count, pieces.rows),
        programs=programs,
        STAGES=1 if fetched is None else pieces.stages(fetched),
        **pieces.constants,
        num_warps=pieces.num_warps,
    )


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    casting: str,
    residual: torch.Tensor | None = None,
    *,
    fp8: torch.dtype | None = None,
    save: bool = True,
) -> Forward:
    """Launch the forward kernel; see ``rms_norm``. ``save`` keeps ``rstd``. For hand-written backward passes."""
    width = x.shape[-1]
    require_width(width, "rms_norm")
    if residual is not None and x.stride() != residual.stride():
        x, residual = x.contiguous(), residual.contiguous()
    rows = as_rows(x)
    if residual is not None:
        residual = as_rows(residual).tensor
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    else:
        total = x
    out_dtype = total.dtype
    if weight is not None:
        weight = weight.contiguous()
        if casting == "input" and weight.dtype != out_dtype:
            out_dtype = torch.promote_types(out_dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=fp8 or out_dtype, device=x.device)
    rstd = torch.empty(rows.count, dtype=torch.float32, device=x.device) if save else None
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if fp8 is not None else None
    if rows.count:
        launch = _forward_launch(
            rows.count, rows.inner, rows.outer_stride, rows.inner_stride, width, eps, offset, casting, fp8
        )
        launch(rows.tensor, residual, weight, y, total if residual is not None else None, rstd, scales)
    return Forward(y, total, rstd, scales)


def rms_norm_backward(
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    dtotal: torch.Tensor | None = None,
    *,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernel.

    Args:
        dy: Gradient of the normalised output ``[..., D]``.
        total: What was normalised ``[..., D]``.
        weight: ``[D]`` or None.
        rstd: ``[rows]`` float32 from the forward.
        offset: As in the forward.
        dtotal: Gradient that reaches ``total`` on the residual path, added to the result.
        weight_grad: Whether to compute the gradient of the weight.

    Returns:
        Gradient of ``total`` in its dtype, and of the weight in its dtype or None.
    """
    width = total.shape[-1]
    pieces = row_pieces(width, where="rms_norm")
    rows = as_rows(total)
    dy = dy.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    trained = weight is not None and weight_grad
    tiles = cdiv(rows.count, pieces.rows)
    programs = pieces.programs(total, tiles) if trained else tiles
    partial = torch.empty((programs, width), dtype=torch.float32, device=total.device) if trained else None
    fetched = sum(x.element_size() for x in (dy, dtotal, total) if x is not None) if trained else None
    if rows.count:
        launch = _backward_launch(
            rows.count, rows.inner, rows.outer_stride, rows.inner_stride, width, offset, programs, fetched
        )
        launch(dy, dtotal, rows.tensor, weight, rstd, dx, partial)
    if partial is None or weight is None:
        return dx, None
    return dx, sum_partials([partial], [weight.dtype])[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, residual, eps: float, offset: float, casting: str):  # type: ignore[override]
        result = rms_norm_forward(x, weight, eps, offset, casting, residual)
        ctx.save_for_backward(result.total, weight, result.rstd)
        ctx.offset = offset
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return result.y if residual is None else (result.y, result.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dtotal=None):  # type: ignore[override]
        total, weight, rstd = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        dweight = None
        if dy is None:
            dx = dtotal
        else:
            dx, dweight = rms_norm_backward(
                dy, total, weight, rstd, ctx.offset, dtotal, weight_grad=ctx.needs_input_grad[1]
            )
        dx_of_x = dx_of_residual = None
        if dx is not None:
            dx_of_x = dx.to(x_dtype) if ctx.needs_input_grad[0] else None
            dx_of_residual = dx.to(residual_dtype) if ctx.needs_input_grad[2] else None
        return dx_of_x, dweight, dx_of_residual, None, None, None


def _check(op: str, x: torch.Tensor, weight, residual, offset: float, casting: str) -> None:
    require_floating(op, x=x, weight=weight, residual=residual)
    require_same_device(op, x=x, weight=weight, residual=residual)
    if casting not in CASTINGS:
        raise ConfigError(f"unknown casting {casting!r}", where=f"argument casting of {op}", hint="input or float32")
    if offset and casting == "input":
        raise ConfigError(
            f"{op} adds the offset to a float32 weight only",
            where=f"arguments offset={offset} and casting='input' of {op}",
            hint="use casting='float32', as the model families with an offset do",
        )
    if weight is not None:
        require_shape(op, "weight", weight, (x.shape[-1],))
    if residual is not None:
        require_shape(op, "residual", residual, tuple(x.shape))


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["input", "float32"] = "input",
    residual: None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["input", "float32"] = "input",
    residual: torch.Tensor,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["input", "float32"] = "input",
    residual: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square normalisation over the last dimension, with an optional residual addition before it.

    With ``h = x`` or ``x + residual`` and ``x̂ = h * rsqrt(mean(h²) + eps)`` in float32:

    - ``casting="input"`` (Llama, Qwen, Mistral): ``weight * x̂.to(h.dtype)``
    - ``casting="float32"`` (Gemma with ``offset=1.0``; OLMo 2 and gpt-oss with 0.0): ``((offset + weight) *
      x̂).to(h.dtype)``

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16 (also float64 on the reference), any strides; two row strides and
            a contiguous last dimension are read in place, other layouts are copied. ``D <= 65,536`` on Triton.
        weight: ``[D]`` or None for 1. Its gradient is computed only when it requires one.
        eps: Added to the mean square.
        offset: Added to the weight in float32; needs ``casting="float32"``.
        casting: Where the result is rounded, see above.
        residual: ``[..., D]``, added to ``x`` first.
        backend: See ``dispatch.resolve``.

    Returns:
        ``y`` of the shape of ``x``; with ``residual``, ``(y, x + residual)``. ``y`` has the dtype of ``h``, promoted
        with the weight's under ``casting="input"``.

    Raises:
        ConfigError: A shape or ``casting`` is wrong.
        ArgumentError: A dtype is not floating point, or the devices differ.
        UnsupportedError: ``D`` is too large for the kernel.

    Deterministic. Saves ``h``, the weight and one float32 a row for the backward.
    """
    _check("rms_norm", x, weight, residual, offset, casting)
    if dispatch.resolve("rms_norm", x, backend) == "reference":
        return rms_norm_reference(x, weight, eps, offset=offset, casting=casting, residual=residual)
    return _RMSNorm.apply(x, weight, residual, eps, offset, casting)


class Fp8Norm(NamedTuple):
    """Result of ``rms_norm_fp8``.

    Attributes:
        values: ``[..., D]`` fp8.
        scales: ``[..., 1]`` float32; ``values * scales`` is the normalised tensor.
        total: ``x + residual``, or ``x`` itself.
        rstd: ``[rows]`` float32 for ``rms_norm_backward``.
    """

    values: torch.Tensor
    scales: torch.Tensor
    total: torch.Tensor
    rstd: torch.Tensor


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["input", "float32"] = "input",
    residual: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> Fp8Norm:
    """RMSNorm whose output is quantised row by row to fp8, for a following fp8 matrix product.

    The float32 result is quantised without rounding to the input's dtype in between: ``scale = max|y| / fp8_max``,
    ``values = (y / scale).to(fp8)``. Deterministic. Arguments as in ``rms_norm``, x being [..., D]. It has no autograd
    of its own: call it where gradients are off, as inside a hand-written ``autograd.Function``, and use
    ``rms_norm_backward`` there.

    Returns:
        See ``Fp8Norm``. The fp8 dtype is e4m3fn, or e4m3fnuz on AMD's gfx94x.

    Raises:
        UnsupportedError: An input requires a gradient while gradients are recorded.
    """
    op = "rms_norm_fp8"
    _check(op, x, weight, residual, offset, casting)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, residual)):
        raise UnsupportedError(
            f"{op} is not differentiable by autograd", hint="call it under torch.no_grad() with rms_norm_backward"
        )
    fp8 = fp8_dtype(x.device)
    if dispatch.resolve(op, x, backend, fp8=True) == "triton":
        result = rms_norm_forward(x, weight, eps, offset, casting, residual, fp8=fp8)
        assert result.scales is not None
        assert result.rstd is not None
        return Fp8Norm(result.y, result.scales, result.total, result.rstd)
    total = x if residual is None else x + residual
    # Widening first keeps the result unrounded; the rounding of x̂ that "input" asks for is repeated by hand.
    wide = total.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    x_hat = wide * rstd
    if casting == "input":
        x_hat = x_hat.to(total.dtype).float()
    y = x_hat if weight is None else x_hat * (offset + weight.float())
    return Fp8Norm(*quantize_rows(y, fp8), total, rstd.reshape(-1))


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    integers = dict.fromkeys(("count", "width", "inner", "outer_stride", "inner_stride"), "i32")
    settings = launch_settings(4096)
    tile = {"ROWS": settings.rows, "BLOCK": settings.block}
    for dtype in ("fp16", "bf16", "fp32"):
        pointer = f"*{dtype}"
        forward = {
            "x": pointer,
            "weight": pointer,
            "y": pointer,
            "rstd": "*fp32",
            **integers,
            "eps": "fp32",
            "offset": "fp32",
        }
        minimum = bfloat16_minimum(dtype)
        for form, arguments, constants in (
            ("llama", {}, {"residual": None, "total": None, "scale": None, "CAST_TO_INPUT": True, "FP8_MAX": 0.0}),
            (
                "gemma-residual",
                {"residual": pointer, "total": pointer},
                {"scale": None, "CAST_TO_INPUT": False, "FP8_MAX": 0.0},
            ),
        ):
            yield Variant(
                f"rms_norm_forward-{dtype}-{form}",
                _rms_norm_forward_kernel,
                forward | arguments,
                constants | tile,
                settings.num_warps,
                minimum=minimum,
                representative=form == "gemma-residual" and dtype == "bf16",
            )
        backward = dict.fromkeys(("dy", "h", "weight", "dx"), pointer)
        backward |= {"rstd": "*fp32", **integers, "offset": "fp32", "tiles": "i32", "programs": "i32"}
        size = 4 if dtype == "fp32" else 2
        for form, width, operands, arguments, constants in (
            ("frozen", 2560, 0, {}, {"dtotal": None, "dweight": None}),
            ("trained", 2304, 2, {"dweight": "*fp32"}, {"dtotal": None}),
            ("trained-residual", 8192, 3, {"dtotal": pointer, "dweight": "*fp32"}, {}),
        ):
            for suffix, lanes, chosen in chips(minimum):
                pieces = row_pieces(width, lanes=lanes)
                stages = pieces.stages(operands * size) if operands else 1
                yield Variant(
                    f"rms_norm_backward-{dtype}-{form}{suffix}",
                    _rms_norm_backward_kernel,
                    backward | arguments,
                    constants | pieces.constants | {"STAGES": stages},
                    pieces.num_warps,
                    representative=form != "frozen" and dtype == "bf16",
                    **chosen,
                )
    for fp8, least, amd, largest in (("fp8e4nv", 89, (), 448.0), ("fp8e4b8", None, ("gfx942",), 240.0)):
        yield Variant(
            f"rms_norm_forward-bf16-{fp8}",
            _rms_norm_forward_kernel,
            {"x": "*bf16", "weight": "*bf16", "y": f"*{fp8}", "rstd": "*fp32", "scale": "*fp32", **integers}
            | {"eps": "fp32", "offset": "fp32"},
            {"residual": None, "total": None, "CAST_TO_INPUT": True, "FP8_MAX": largest} | tile,
            settings.num_warps,
            minimum=least,
            amd=amd,
        )

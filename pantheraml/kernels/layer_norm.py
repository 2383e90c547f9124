"""LayerNorm over the last dimension: ``y = (x - mean) / sqrt(var + eps) * weight + bias``, forward and backward.

Ba et al., "Layer Normalization", https://arxiv.org/abs/1607.06450. Everything is accumulated in float32. The mean is
taken twice, the second time of what the first left, so that its rounding does not stay in the result where it is large
beside the deviation; the variance is the mean square of what the first mean left, less the square of its mean, which is
of the size of that rounding. Means are divided with correct rounding: the fast division of GPUs is off by up to two
units in the last place, which the difference to the mean would show. The gradients of weight and bias are float32 sums
of partial sums in a fixed order, without atomics, rounded once: the same bits in every run on the same chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import dispatch
from ._once import once_differentiable
from ._row_pieces import chips, columns_of, load_parameter, mask_of, row_pieces, store_partial, sum_partials
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference.layer_norm import layer_norm as layer_norm_reference
from .utils import (
    as_rows,
    cdiv,
    require_floating,
    require_same_device,
    require_shape,
)


@jit
def _two_means(x, y, width):
    """Means over the last axis of two tiles of row sums, crossing lanes once for both, rounded correctly afterwards."""
    x, y = tl.split(tl.sum(tl.join(x, y), axis=2, keep_dims=True))
    return tl.div_rn(x, width * 1.0), tl.div_rn(y, width * 1.0)


@jit
def _centred(x, mean, columns, width, FULL: tl.constexpr):
    """``x - mean``, zero where there is no column."""
    x = x - mean
    if not FULL:
        x = tl.where(columns < width, x, 0.0)
    return x


@jit
def _scaled(x, weight, bias, columns, width, ROWS: tl.constexpr, FULL: tl.constexpr):
    """``x * weight + bias``; loaded here, after the statistics, they take no registers before."""
    if weight is not None:
        x = x * load_parameter(weight, columns, width, ROWS, FULL)
    if bias is not None:
        x += load_parameter(bias, columns, width, ROWS, FULL)
    return x


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
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """``m = mean(x); d = mean(x - m); r = rsqrt(mean((x - m)²) - d² + eps); y = (x - m - d) * r * weight + bias``.

    In float32; ``m + d`` is stored as the mean.
    """
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < count
    o_x = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[None, :, None]
    o_y = (i_row * width)[None, :, None]
    c_0 = columns_of(0, N, P)
    m_0 = mask_of(m_row, c_0, width, FULL_N)
    x_0 = tl.load(x + (o_x + c_0), mask=m_0, other=0.0, eviction_policy="evict_first").to(tl.float32)
    total = tl.sum(x_0, axis=0, keep_dims=True)
    c_1, m_1, x_1 = c_0, m_0, x_0
    if M > 0:
        c_1 = columns_of(N * P, M, P)
        m_1 = mask_of(m_row, c_1, width, FULL_M)
        x_1 = tl.load(x + (o_x + c_1), mask=m_1, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total += tl.sum(x_1, axis=0, keep_dims=True)
    m = tl.div_rn(tl.sum(total, axis=2, keep_dims=True), width * 1.0)

    x_0 = _centred(x_0, m, c_0, width, FULL_N)
    total = tl.sum(x_0, axis=0, keep_dims=True)
    squares = tl.sum(x_0 * x_0, axis=0, keep_dims=True)
    if M > 0:
        x_1 = _centred(x_1, m, c_1, width, FULL_M)
        total += tl.sum(x_1, axis=0, keep_dims=True)
        squares += tl.sum(x_1 * x_1, axis=0, keep_dims=True)
    rest, variance = _two_means(total, squares, width)
    r = tl.rsqrt(tl.maximum(variance - rest * rest, 0.0) + eps)
    tl.store(mean + i_row[None, :, None], m + rest, mask=m_row[None, :, None])
    tl.store(rstd + i_row[None, :, None], r, mask=m_row[None, :, None])

    out = _scaled((x_0 - rest) * r, weight, bias, c_0, width, ROWS, FULL_N)
    tl.store(y + (o_y + c_0), out.to(y.dtype.element_ty), mask=m_0)
    if M > 0:
        out = _scaled((x_1 - rest) * r, weight, bias, c_1, width, ROWS, FULL_M)
        tl.store(y + (o_y + c_1), out.to(y.dtype.element_ty), mask=m_1)


@jit
def _layer_norm_backward_tile(
    dy,
    x,
    weight,
    mean,
    rstd,
    dx,
    i_tile,
    w_0,
    w_1,
    dw_0,
    dw_1,
    db_0,
    db_1,
    count,
    width,
    inner,
    outer_stride,
    inner_stride,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EVICTION: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """Gradient of one tile; returns the sums of dy * x̂ and of dy of its pieces with this tile's.

    The weight comes in registers where tiles follow each other, and is loaded here where there is one.
    """
    i_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = i_row < count
    o_x = ((i_row // inner) * outer_stride + (i_row % inner) * inner_stride)[None, :, None]
    o_y = (i_row * width)[None, :, None]
    c_0 = columns_of(0, N, P)
    m_0 = mask_of(m_row, c_0, width, FULL_N)
    g_0 = tl.load(dy + (o_y + c_0), mask=m_0, other=0.0, eviction_policy=EVICTION)
    x_0 = tl.load(x + (o_x + c_0), mask=m_0, other=0.0, eviction_policy=EVICTION)
    c_1, m_1, g_1, x_1 = c_0, m_0, g_0, x_0
    if M > 0:
        c_1 = columns_of(N * P, M, P)
        m_1 = mask_of(m_row, c_1, width, FULL_M)
        g_1 = tl.load(dy + (o_y + c_1), mask=m_1, other=0.0, eviction_policy=EVICTION)
        x_1 = tl.load(x + (o_x + c_1), mask=m_1, other=0.0, eviction_policy=EVICTION)
    m = tl.load(mean + i_row, mask=m_row, other=0.0)[None, :, None]
    r = tl.load(rstd + i_row, mask=m_row, other=0.0)[None, :, None]
    if weight is not None and not (WEIGHT_GRAD or BIAS_GRAD):
        w_0 = load_parameter(weight, c_0, width, ROWS, FULL_N)
        if M > 0:
            w_1 = load_parameter(weight, c_1, width, ROWS, FULL_M)

    g_0 = g_0.to(tl.float32)
    x_0 = _centred(x_0.to(tl.float32), m, c_0, width, FULL_N) * r
    if WEIGHT_GRAD:
        dw_0 += g_0 * x_0
    if BIAS_GRAD:
        db_0 += g_0
    if weight is not None:
        g_0 = g_0 * w_0
    total = tl.sum(g_0, axis=0, keep_dims=True)
    total_x = tl.sum(g_0 * x_0, axis=0, keep_dims=True)
    if M > 0:
        g_1 = g_1.to(tl.float32)
        x_1 = _centred(x_1.to(tl.float32), m, c_1, width, FULL_M) * r
        if WEIGHT_GRAD:
            dw_1 += g_1 * x_1
        if BIAS_GRAD:
            db_1 += g_1
        if weight is not None:
            g_1 = g_1 * w_1
        total += tl.sum(g_1, axis=0, keep_dims=True)
        total_x += tl.sum(g_1 * x_1, axis=0, keep_dims=True)
    mean_g, mean_gx = _two_means(total, total_x, width)

    out = (g_0 - mean_g - x_0 * mean_gx) * r
    tl.store(dx + (o_y + c_0), out.to(dx.dtype.element_ty), mask=m_0)
    if M > 0:
        out = (g_1 - mean_g - x_1 * mean_gx) * r
        tl.store(dx + (o_y + c_1), out.to(dx.dtype.element_ty), mask=m_1)
    return dw_0, dw_1, db_0, db_1


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
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """``g = dy * weight; dx = r * (g - mean(g) - x̂ * mean(g * x̂))``; partial sums of dy * x̂ and dy per program.

    Without dweight and dbias a program takes one tile. With one of them, it walks over tiles ``program, program +
    programs, ...``, and its partial sums are float32.
    """
    i_program = tl.program_id(0).to(tl.int64)
    w_0 = 0.0
    w_1 = 0.0
    dw_0 = 0.0
    dw_1 = 0.0
    db_0 = 0.0
    db_1 = 0.0
    if dweight is None and dbias is None:
        _layer_norm_backward_tile(
            dy,
            x,
            weight,
            mean,
            rstd,
            dx,
            i_program,
            w_0,
            w_1,
            dw_0,
            dw_1,
            db_0,
            db_1,
            count,
            width,
            inner,
            outer_stride,
            inner_stride,
            False,
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
        if weight is not None:
            w_0 = load_parameter(weight, columns_of(0, N, P), width, ROWS, FULL_N)
            if M > 0:
                w_1 = load_parameter(weight, columns_of(N * P, M, P), width, ROWS, FULL_M)
        if dweight is not None:
            dw_0 = tl.zeros((N, ROWS, P), tl.float32)
            if M > 0:
                dw_1 = tl.zeros((M, ROWS, P), tl.float32)
        if dbias is not None:
            db_0 = tl.zeros((N, ROWS, P), tl.float32)
            if M > 0:
                db_1 = tl.zeros((M, ROWS, P), tl.float32)
        for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
            dw_0, dw_1, db_0, db_1 = _layer_norm_backward_tile(
                dy,
                x,
                weight,
                mean,
                rstd,
                dx,
                i_tile,
                w_0,
                w_1,
                dw_0,
                dw_1,
                db_0,
                db_1,
                count,
                width,
                inner,
                outer_stride,
                inner_stride,
                dweight is not None,
                dbias is not None,
                "evict_first",
                ROWS,
                N,
                M,
                P,
                FULL_N,
                FULL_M,
            )
        if dweight is not None:
            p_dweight = dweight + i_program * width
            store_partial(p_dweight, dw_0, 0, width, N, P, FULL_N)
            if M > 0:
                store_partial(p_dweight, dw_1, N * P, width, M, P, FULL_M)
        if dbias is not None:
            p_dbias = dbias + i_program * width
            store_partial(p_dbias, db_0, 0, width, N, P, FULL_N)
            if M > 0:
                store_partial(p_dbias, db_1, N * P, width, M, P, FULL_M)


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel; returns ``y`` and the float32 ``mean`` and ``rstd`` of each row."""
    width = x.shape[-1]
    pieces = row_pieces(width, where="layer_norm")
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows.count, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows.count:
        with on_device(x):
            _layer_norm_forward_kernel[(cdiv(rows.count, pieces.rows),)](
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
                **pieces.constants,
                num_warps=pieces.num_warps,
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
    bias_grad: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernel.

    Args:
        dy: Gradient of the output ``[..., D]``.
        x: Input of the forward ``[..., D]``.
        weight: ``[D]`` or None.
        mean: ``[rows]`` float32 from the forward.
        rstd: ``[rows]`` float32 from the forward.
        weight_grad: Whether to compute the gradient of the weight.
        bias_grad: Dtype of the gradient of the bias, None to leave it out.

    Returns:
        Gradients of ``x`` and of the weight in their dtypes, and of the bias; None for what was not asked for.
    """
    width = x.shape[-1]
    pieces = row_pieces(width, where="layer_norm")
    rows = as_rows(x)
    dy = dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wanted = weight.dtype if weight is not None and weight_grad else None, bias_grad
    trained = any(dtype is not None for dtype in wanted)
    tiles = cdiv(rows.count, pieces.rows)
    programs = pieces.programs(x, tiles) if trained else tiles
    dweight, dbias = (
        None if dtype is None else torch.empty((programs, width), dtype=torch.float32, device=x.device)
        for dtype in wanted
    )
    if rows.count:
        with on_device(x):
            _layer_norm_backward_kernel[(programs,)](
                dy=dy,
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
                STAGES=pieces.stages(dy.element_size() + x.element_size()) if trained else 1,
                **pieces.constants,
                num_warps=pieces.num_warps,
                # Fused with a subtraction, products round otherwise than their mean: one element has no gradient, then.
                enable_fp_fusion=False,
            )
    if not trained:
        return dx, None, None
    sums = iter(
        sum_partials(
            [partial for partial in (dweight, dbias) if partial is not None],
            [dtype for dtype in wanted if dtype is not None],
        )
    )
    return dx, None if dweight is None else next(sums), None if dbias is None else next(sums)


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
        bias_dtype = ctx.bias_dtype if bias_grad else None
        return *layer_norm_backward(dy, x, weight, mean, rstd, weight_grad=weight_grad, bias_grad=bias_dtype), None


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
    statistics = {"mean": "*fp32", "rstd": "*fp32"}
    for dtype in ("fp16", "bf16", "fp32"):
        p, representative, size = f"*{dtype}", dtype == "bf16", 4 if dtype == "fp32" else 2
        backward = {"dy": p, "x": p, "weight": p, **statistics, "dx": p, **integers, "tiles": "i32", "programs": "i32"}
        for suffix, lanes, chosen in chips(bfloat16_minimum(dtype)):
            pieces = row_pieces(2304, lanes=lanes)
            yield Variant(
                f"layer_norm_forward-{dtype}{suffix}",
                _layer_norm_forward_kernel,
                {"x": p, "weight": p, "bias": p, "y": p, **statistics, **integers, "eps": "fp32"},
                pieces.constants,
                pieces.num_warps,
                representative=representative,
                **chosen,
            )
            for form, width, arguments, constants in (
                ("frozen", 2560, {}, {"dweight": None, "dbias": None}),
                ("bias", 128, {"dbias": "*fp32"}, {"dweight": None}),
                ("trained", 8192, {"dweight": "*fp32", "dbias": "*fp32"}, {}),
            ):
                pieces = row_pieces(width, lanes=lanes)
                yield Variant(
                    f"layer_norm_backward-{dtype}-{form}{suffix}",
                    _layer_norm_backward_kernel,
                    backward | arguments,
                    constants | pieces.constants | {"STAGES": pieces.stages(2 * size) if arguments else 1},
                    pieces.num_warps,
                    representative=representative and form == "trained",
                    **chosen,
                )

"""The kernels of ``lora_glu``: a gated activation with the thin products of the adapters around it."""

from __future__ import annotations

from ._triton import jit, tl
from .glu import activation_and_slope


@jit
def lora_glu_forward_kernel(
    gate,
    up,
    thin,
    gate_factor,
    up_factor,
    down_factor,
    out,
    sums,
    rows,
    width,
    rank,
    down_rank,
    tiles,
    scaling,
    gate_stride,
    up_stride,
    thin_stride,
    up_thin,
    factor_width,
    factor_rank,
    down_stride,
    out_stride,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out = act(g) * (u + up_offset)`` over ``tiles`` tiles of COLUMNS, see ``lora_glu``.

    With a down factor, ``sums[part, i, r] = sum_j out[i, j] down_factor[r, j]`` over the part's columns.
    """
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    i_part = tl.program_id(1)
    # Offsets inside of a tile have 32 bits: they take half the registers.
    o_row, o_col = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    o_rank, o_down = tl.arange(0, RANK), tl.arange(0, DOWN_RANK)
    m_row, m_rank, m_down = i_row + o_row < rows, o_rank < rank, o_down < down_rank
    p_thin = thin + i_row * thin_stride + (o_row[:, None] * thin_stride + o_rank[None, :])
    m_thin = m_row[:, None] & m_rank[None, :]
    b_gate_thin = tl.load(p_thin, mask=m_thin, other=0.0)
    b_up_thin = tl.load(p_thin + up_thin, mask=m_thin, other=0.0)
    b_sum = tl.zeros((ROWS, DOWN_RANK), tl.float32)
    for i in tl.range(tiles, num_stages=STAGES):
        i_col = (i_part * tiles + i) * COLUMNS
        m_col = i_col + o_col < width
        mask = m_row[:, None] & m_col[None, :]
        p_gate = gate + i_row * gate_stride + i_col
        p_up = up + i_row * up_stride + i_col
        g = tl.load(p_gate + (o_row[:, None] * gate_stride + o_col[None, :]), mask=mask, other=0.0).to(tl.float32)
        u = tl.load(p_up + (o_row[:, None] * up_stride + o_col[None, :]), mask=mask, other=0.0).to(tl.float32)
        o_factor = i_col.to(tl.int64) * factor_width + (o_rank[:, None] * factor_rank + o_col[None, :] * factor_width)
        m_factor = m_rank[:, None] & m_col[None, :]
        b_gate = tl.load(gate_factor + o_factor, mask=m_factor, other=0.0).to(b_gate_thin.dtype)
        b_up = tl.load(up_factor + o_factor, mask=m_factor, other=0.0).to(b_gate_thin.dtype)
        g += tl.dot(b_gate_thin, b_gate) * scaling
        u += tl.dot(b_up_thin, b_up) * scaling
        if HAS_LIMIT:
            # comparisons let NaN through
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        value, _ = activation_and_slope(g, alpha, ACTIVATION)
        result = (value * (u + up_offset)).to(gate.dtype.element_ty)
        if out is not None:
            p_out = out + i_row * out_stride + i_col
            tl.store(p_out + (o_row[:, None] * out_stride + o_col[None, :]), result, mask=mask)
        if down_factor is not None:
            p_down = down_factor + i_col + (o_down[None, :] * down_stride + o_col[:, None])
            b_down = tl.load(p_down, mask=m_down[None, :] & m_col[:, None], other=0.0).to(result.dtype)
            b_sum = tl.dot(result, b_down, b_sum)
    if down_factor is not None:
        p_sum = sums + (i_part.to(tl.int64) * rows + i_row) * down_rank
        b_sum = b_sum.to(sums.dtype.element_ty)
        tl.store(p_sum + (o_row[:, None] * down_rank + o_down[None, :]), b_sum, mask=m_row[:, None] & m_down[None, :])


@jit
def lora_glu_backward_kernel(
    dout,
    gate,
    up,
    thin,
    gate_factor,
    up_factor,
    down_thin,
    down_factor,
    sums,
    rows,
    width,
    rank,
    down_rank,
    tiles,
    scaling,
    dout_stride,
    gate_stride,
    up_stride,
    thin_stride,
    up_thin,
    factor_width,
    factor_rank,
    down_thin_stride,
    down_stride,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gate and up become their gradients for COLUMNS columns and ``tiles`` tiles of ROWS rows, see ``lora_glu``.

    With a down factor, ``sums[part, j, r] = sum_i out[i, j] down_thin[i, r]`` over the part's rows, float32.
    """
    i_col = tl.program_id(0) * COLUMNS
    i_part = tl.program_id(1).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    o_rank, o_down = tl.arange(0, RANK), tl.arange(0, DOWN_RANK)
    m_col, m_rank, m_down = i_col + o_col < width, o_rank < rank, o_down < down_rank
    dtype = gate.dtype.element_ty
    o_factor = i_col.to(tl.int64) * factor_width + (o_rank[:, None] * factor_rank + o_col[None, :] * factor_width)
    m_factor = m_rank[:, None] & m_col[None, :]
    b_gate = tl.load(gate_factor + o_factor, mask=m_factor, other=0.0).to(dtype)
    b_up = tl.load(up_factor + o_factor, mask=m_factor, other=0.0).to(dtype)
    b_down = None
    if down_factor is not None:
        p_down = down_factor + i_col + (o_down[:, None] * down_stride + o_col[None, :])
        b_down = tl.load(p_down, mask=m_down[:, None] & m_col[None, :], other=0.0).to(dtype)
    b_sum = tl.zeros((COLUMNS, DOWN_RANK), tl.float32)
    # Offsets inside of a tile have 32 bits: they take half the registers.
    o_gate = o_row[:, None] * gate_stride + o_col[None, :]
    o_up = o_row[:, None] * up_stride + o_col[None, :]
    o_dout = o_row[:, None] * dout_stride + o_col[None, :]
    o_thin = o_row[:, None] * thin_stride + o_rank[None, :]
    o_down_thin = o_row[:, None] * down_thin_stride + o_down[None, :]
    for i in tl.range(tiles, num_stages=STAGES):
        i_row = (i_part * tiles + i) * ROWS
        m_row = i_row + o_row < rows
        mask = m_row[:, None] & m_col[None, :]
        p_gate = gate + i_row * gate_stride + i_col
        p_up = up + i_row * up_stride + i_col
        p_dout = dout + i_row * dout_stride + i_col
        g = tl.load(p_gate + o_gate, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(p_up + o_up, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(p_dout + o_dout, mask=mask, other=0.0).to(tl.float32)
        p_thin = thin + i_row * thin_stride + o_thin
        m_thin = m_row[:, None] & m_rank[None, :]
        g += tl.dot(tl.load(p_thin, mask=m_thin, other=0.0), b_gate) * scaling
        u += tl.dot(tl.load(p_thin + up_thin, mask=m_thin, other=0.0), b_up) * scaling
        b_down_thin = None
        if down_factor is not None:
            p_down_thin = down_thin + i_row * down_thin_stride + o_down_thin
            b_down_thin = tl.load(p_down_thin, mask=m_row[:, None] & m_down[None, :], other=0.0)
            d += tl.dot(b_down_thin, b_down)
        d_g = d
        d_u = d
        if HAS_LIMIT:
            d_g = tl.where(g > limit, 0.0, d)
            d_u = tl.where((u > limit) | (u < -limit), 0.0, d)
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        u += up_offset
        value, slope = activation_and_slope(g, alpha, ACTIVATION)
        tl.store(p_gate + o_gate, (d_g * u * slope).to(dtype), mask=mask)
        tl.store(p_up + o_up, (d_u * value).to(dtype), mask=mask)
        if down_factor is not None:
            # Rows beyond the last are zero in down_thin.
            b_sum = tl.dot(tl.trans((value * u).to(dtype)), b_down_thin, b_sum)
    if down_factor is not None:
        p_sum = sums + (i_part * width + i_col) * down_rank
        tl.store(p_sum + (o_col[:, None] * down_rank + o_down[None, :]), b_sum, mask=m_col[:, None] & m_down[None, :])

"""The kernels of ``low_rank``; up to three jobs, which are projections of one input, share a launch."""

from __future__ import annotations

from ._triton import jit, tl


@jit
def narrow_kernel(
    x,
    A,
    out,
    rows,
    width,
    rank,
    x_stride,
    A_stride,
    out_split,
    out_stride,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """``out[split, i, r] = sum_k x[i, k] A[r, k]`` over the split's ``tiles`` tiles of COLUMNS."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_split = tl.program_id(1).to(tl.int64)
    o_rank = tl.arange(0, RANK)
    m_row = (o_row < rows)[:, None]
    m_rank = (o_rank < rank)[:, None]
    first = i_split * tiles * COLUMNS
    o_column = first + tl.arange(0, COLUMNS)
    p_x = x + o_row[:, None] * x_stride + o_column[None, :]
    p_A = A + o_rank[:, None].to(tl.int64) * A_stride + o_column[None, :]
    b_sum = tl.zeros((ROWS, RANK), tl.float32)
    for i in range(tiles):
        m_column = (o_column + i * COLUMNS < width)[None, :]
        b_x = tl.load(p_x, mask=m_row & m_column, other=0.0)
        b_A = tl.load(p_A, mask=m_rank & m_column, other=0.0).to(b_x.dtype)
        b_sum = tl.dot(b_x, tl.trans(b_A), b_sum)
        p_x += COLUMNS
        p_A += COLUMNS
    p_out = out + i_split * out_split + o_row[:, None] * out_stride + o_rank[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_row & (o_rank < rank)[None, :])


@jit
def _pick(i_job, first, second, third):
    """The pointer of one of two or three jobs."""
    p = first
    if i_job == 1:
        p = second
    if third is not None:  # noqa: SIM102 - known when compiling, and the pointer is then left out
        if i_job == 2:
            p = third
    return p


@jit
def _job_of(i_block, first_end, second_end):
    """Which of three jobs, that end at these blocks, has a block, and its first one."""
    i_job = (i_block >= first_end).to(tl.int32) + (i_block >= second_end).to(tl.int32)
    return i_job, _of_job(i_job, 0, first_end, second_end)


@jit
def _of_job(i_job, first, second, third):
    return tl.where(i_job == 0, first, tl.where(i_job == 1, second, third))


@jit
def widen_kernel(
    thin,
    total,
    base,
    factor,
    out,
    second_factor,
    second_out,
    third_factor,
    third_out,
    rows,
    width,
    second_width,
    third_width,
    rank,
    scaling,
    thin_split,
    thin_stride,
    total_stride,
    factor_width,
    factor_rank,
    base_stride,
    out_stride,
    first_end,
    second_end,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """``out[i, j] = scaling * sum_r t[i, r] factor[j, r] [+ base[i, j]]`` with ``t = sum_split thin[split]``.

    ``t`` is rounded once, to the dtype of ``out``, and goes to ``total`` when there is one. The second and the third
    factor are for the columns of thin that follow; their column blocks begin at ``first_end`` and ``second_end``, and
    all results are contiguous then.
    """
    i_block = tl.program_id(0)
    o_row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_rank = tl.arange(0, RANK)
    if second_factor is not None:
        i_job, begin = _job_of(i_block, first_end, second_end)
        i_block -= begin
        factor = _pick(i_job, factor, second_factor, third_factor)
        out = _pick(i_job, out, second_out, third_out)
        width = _of_job(i_job, width, second_width, third_width)
        out_stride = width
        thin += i_job * rank
        if total is not None:
            total += i_job * rank
    o_column = i_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_column, m_rank = o_row < rows, o_column < width, o_rank < rank
    m_thin = m_row[:, None] & m_rank[None, :]
    p_thin = thin + o_row[:, None] * thin_stride + o_rank[None, :]
    b_thin = tl.load(p_thin, mask=m_thin, other=0.0)
    for i in tl.static_range(1, SPLITS):
        b_thin += tl.load(p_thin + i * thin_split, mask=m_thin, other=0.0)
    b_thin = b_thin.to(out.dtype.element_ty)
    if total is not None:  # noqa: SIM102 - known when compiling
        if i_block == 0:
            tl.store(total + o_row[:, None] * total_stride + o_rank[None, :], b_thin, mask=m_thin)
    p_factor = factor + o_rank[:, None] * factor_rank + o_column[None, :] * factor_width
    b_factor = tl.load(p_factor, mask=m_rank[:, None] & m_column[None, :], other=0.0).to(b_thin.dtype)
    b_out = tl.dot(b_thin, b_factor) * scaling
    mask = m_row[:, None] & m_column[None, :]
    if base is not None:
        p_base = base + o_row[:, None] * base_stride + o_column[None, :]
        b_out += tl.load(p_base, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + o_row[:, None] * out_stride + o_column[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@jit
def gradients_kernel(
    dy,
    factor,
    second_dy,
    second_factor,
    third_dy,
    third_factor,
    skinny,
    sums,
    rows,
    width,
    second_width,
    third_width,
    rank,
    tiles,
    dy_stride,
    second_stride,
    third_stride,
    factor_width,
    factor_rank,
    skinny_stride,
    first_end,
    second_end,
    gradient_start,
    gradient_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """For COLUMNS columns and ``tiles`` tiles of ROWS rows, float32 parts of both sums.

    ``thin[column block, i, r] = sum_j dy[i, j] factor[j, r]`` over the block's columns, when there is a factor, from
    the beginning of ``sums``; ``gradient[row block, j, r] = sum_i dy[i, j] skinny[i, r]`` over the block's rows, when
    there is a skinny, from ``gradient_start``. The second and the third dy are for the columns of skinny that follow;
    their column blocks begin at ``first_end`` and ``second_end``, and their rows of the gradient follow.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1).to(tl.int64)
    o_rank = tl.arange(0, RANK)
    p_thin = sums + i_block * rows * rank
    p_gradient = sums + gradient_start + i_part * gradient_split
    if second_dy is not None:
        i_job, begin = _job_of(i_block, first_end, second_end)
        i_block -= begin
        p_gradient += _of_job(i_job, 0, width, width + second_width) * rank
        dy = _pick(i_job, dy, second_dy, third_dy)
        dy_stride = _of_job(i_job, dy_stride, second_stride, third_stride)
        width = _of_job(i_job, width, second_width, third_width)
        if factor is not None:
            factor = _pick(i_job, factor, second_factor, third_factor)
        if skinny is not None:
            skinny += i_job * rank
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    m_column, m_rank = o_column < width, o_rank < rank
    o_row = i_part * tiles * ROWS + tl.arange(0, ROWS)
    b_factor = None
    if factor is not None:
        p_factor = factor + o_column[:, None] * factor_width + o_rank[None, :] * factor_rank
        b_factor = tl.load(p_factor, mask=m_column[:, None] & m_rank[None, :], other=0.0).to(dy.dtype.element_ty)
    b_sum = tl.zeros((COLUMNS, RANK), tl.float32)
    for i in range(tiles):
        o_i = o_row + i * ROWS
        m_row = o_i < rows
        b_dy = tl.load(
            dy + o_i[:, None] * dy_stride + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
        )
        m_skinny = m_row[:, None] & m_rank[None, :]
        if factor is not None:
            b_thin = tl.dot(b_dy, b_factor)
            tl.store(p_thin + o_i[:, None] * rank + o_rank[None, :], b_thin, mask=m_skinny)
        if skinny is not None:
            b_skinny = tl.load(skinny + o_i[:, None] * skinny_stride + o_rank[None, :], mask=m_skinny, other=0.0)
            b_sum = tl.dot(tl.trans(b_dy), b_skinny, b_sum)
    if skinny is not None:
        p_gradient += o_column[:, None] * rank + o_rank[None, :]
        tl.store(p_gradient, b_sum, mask=m_column[:, None] & m_rank[None, :])


@jit
def _combine(parts, out, i_tile, count, rows, rank, scaling, out_row, out_rank, TILE: tl.constexpr):
    """``out[i, r] = scaling * sum_part parts[part, i, r]`` for ``count`` parts."""
    o_flat = i_tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = o_flat < rows * rank
    p_part = parts + o_flat
    b_sum = tl.zeros((TILE,), tl.float32)
    for _ in range(count):
        b_sum += tl.load(p_part, mask=mask, other=0.0)
        p_part += rows * rank
    o_out = (o_flat // rank) * out_row + (o_flat % rank) * out_rank
    tl.store(out + o_out, (b_sum * scaling).to(out.dtype.element_ty), mask=mask)


@jit
def combine_kernel(
    sums,
    thin,
    gradient,
    rows,
    rank,
    thin_row,
    thin_column,
    first_end,
    second_end,
    third_end,
    job_programs,
    thin_programs,
    gradient_start,
    gradient_parts,
    gradient_rows,
    gradient_row,
    gradient_column,
    scaling,
    TILE: tl.constexpr,
):
    """Add up what ``gradients_kernel`` or ``narrow_kernel`` leave: parts of up to three jobs' thin, and a gradient."""
    i_program = tl.program_id(0)
    if thin is not None:  # noqa: SIM102 - known when compiling
        if i_program < thin_programs:
            i_job = i_program // job_programs
            begin = _of_job(i_job, 0, first_end, second_end).to(tl.int64)
            count = _of_job(i_job, first_end, second_end, third_end) - begin
            _combine(
                sums + begin * rows * rank,
                thin + i_job * rank * thin_column,
                i_program % job_programs,
                count,
                rows,
                rank,
                scaling,
                thin_row,
                thin_column,
                TILE,
            )
    if gradient is not None:  # noqa: SIM102 - known when compiling
        if i_program >= thin_programs:
            _combine(
                sums + gradient_start,
                gradient,
                i_program - thin_programs,
                gradient_parts,
                gradient_rows,
                rank,
                scaling,
                gradient_row,
                gradient_column,
                TILE,
            )

"""Products with a thin factor, at the speed at which the wide one is read: what adapters of low rank cost.

With x [T, W], factors [W, r] of small r, all in one dtype with float32 sums::

    narrow:     s = x @ A.T                               reads x once, for all adapters of x
    widen:      y = scaling * s @ B.T [+ base]            writes y once
    gradients:  thin = scaling * dy @ B                   both in one pass over dy
                dB = scaling * dy.T @ s

Partial sums of programs are float32, kept apart and added in a fixed order: the same bits in every run on the same
chip. A small model waits for the host, so up to three projections of one input share a launch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ._triton import Launch, jit, remembered, tl
from ._variants import Variant, bfloat16_minimum
from .utils import cdiv, next_power_of_2, processors_of

# Matrix units contract and emit at least 16 columns; wider factors are ordinary matrix products.
MIN_RANK, MAX_RANK = 16, 128
DTYPES = (torch.float16, torch.bfloat16)
# Programs an SM that fill the memory pipeline.
NARROW_PROGRAMS = 2
GRADIENT_PROGRAMS = 2
COMBINE_TILE = 1024
# Programs of ``narrow`` that share a sum: ``widen`` adds up what they leave for each of its tiles.
NARROW_SPLITS = 4
# Projections that share a launch, and what their partial sums of a thin product may take at once: larger ones come of
# launches that are long enough for the host.
JOBS = 3
SUMS_BYTES = 32 * 2**20
# Shared memory of a program that every chip has, that the largest have, and what a kernel keeps besides its stages.
LEAST_SHARED, MOST_SHARED = 64 * 1024, 227 * 1024
SHARED_RESERVE = 8 * 1024


class Tile(NamedTuple):
    """Shape of a program's tile.

    Attributes:
        rows: Rows of the wide factor.
        columns: Columns of the wide factor.
        num_warps: Warps a program.
        num_stages: Tiles in flight.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


NARROW = Tile(64, 128, 4, 4)
WIDEN = {16: Tile(64, 256, 8, 1), 32: Tile(64, 256, 8, 1), 64: Tile(64, 128, 8, 1), 128: Tile(64, 64, 4, 1)}
# By the padded rank, whose sums over COLUMNS stay in registers.
GRADIENTS = {16: Tile(32, 256, 4, 4), 32: Tile(32, 256, 8, 4), 64: Tile(32, 128, 8, 4), 128: Tile(32, 64, 8, 3)}


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


def serves(x: torch.Tensor, rank: int) -> bool:
    """Whether the kernels take this wide factor at this rank: 16-bit dtypes, contiguous rows, a thin other factor."""
    return x.dtype in DTYPES and 0 < rank <= MAX_RANK and x.dim() == 2 and x.stride(1) == 1 and x.numel() > 0


def _block(rank: int) -> int:
    return max(next_power_of_2(rank), MIN_RANK)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return LEAST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED) or LEAST_SHARED


def narrow_stages(tile: Tile, rank: int, itemsize: int, limit: int) -> int:
    """As many of the tile's stages as fit into ``limit`` bytes of shared memory; the thin factor has ``itemsize``."""
    stage = tile.columns * (2 * tile.rows + itemsize * _block(rank))
    return max(min(tile.num_stages, (limit - SHARED_RESERVE) // stage), 1)


def gradient_stages(tile: Tile, rank: int, limit: int) -> int:
    """The same for ``gradients``, where the factor stays and dy and skinny stream."""
    stage = 2 * tile.rows * (tile.columns + _block(rank))
    kept = SHARED_RESERVE + 2 * tile.columns * _block(rank)
    return max(min(tile.num_stages, (limit - kept) // stage), 1)


@remembered
def _combination(
    rows: int,
    rank: int,
    thin: tuple[int, ...] | None,
    ends: tuple[int, ...],
    gradient: tuple[int, ...] | None,
    start: int,
    parts: int,
    height: int,
    scaling: float,
) -> Launch:
    """``thin`` and ``gradient`` are strides of what is filled."""
    job_programs = cdiv(rows * rank, COMBINE_TILE)
    programs = 0 if thin is None else job_programs * len(ends)
    first_end, second_end, third_end = (*ends, *(0,) * JOBS)[:JOBS]
    thin_row, thin_column = thin or (0, 0)
    gradient_row, gradient_column = gradient or (0, 0)
    return Launch(
        combine_kernel,
        (programs + (0 if gradient is None else cdiv(height * rank, COMBINE_TILE)),),
        ("sums", "thin", "gradient"),
        rows=rows,
        rank=rank,
        thin_row=thin_row,
        thin_column=thin_column,
        first_end=first_end,
        second_end=second_end,
        third_end=third_end,
        job_programs=job_programs,
        thin_programs=programs,
        gradient_start=start,
        gradient_parts=parts,
        gradient_rows=height,
        gradient_row=gradient_row,
        gradient_column=gradient_column,
        scaling=scaling,
        TILE=COMBINE_TILE,
        num_warps=4,
    )


@remembered
def _narrowing(
    rows: int,
    width: int,
    rank: int,
    x_stride: int,
    A_stride: int,
    itemsize: int,
    tile: Tile,
    splits: int | None,
    device: torch.device,
) -> tuple[Launch, int]:
    """The launch and how many programs share the sum; A has elements of ``itemsize`` bytes."""
    columns = min(tile.columns, max(next_power_of_2(width), 16))
    row_blocks, tiles = cdiv(rows, tile.rows), cdiv(width, columns)
    if splits is None:
        splits = min(max(NARROW_PROGRAMS * processors_of(device) // row_blocks, 1), tiles, NARROW_SPLITS)
    tiles = cdiv(tiles, splits)
    splits = cdiv(cdiv(width, columns), tiles)
    launch = Launch(
        narrow_kernel,
        (row_blocks, splits),
        ("x", "A", "out"),
        rows=rows,
        width=width,
        rank=rank,
        x_stride=x_stride,
        A_stride=A_stride,
        out_split=rows * rank,
        out_stride=rank,
        tiles=tiles,
        ROWS=tile.rows,
        COLUMNS=columns,
        RANK=_block(rank),
        num_warps=tile.num_warps,
        num_stages=narrow_stages(tile, rank, itemsize, _shared_memory(device)),
    )
    return launch, splits


def narrow_parts(x: torch.Tensor, A: torch.Tensor, *, tile: Tile = NARROW, splits: int | None = None) -> torch.Tensor:
    """What the programs that share the sum leave of ``x @ A.T``; arguments as in ``narrow``.

    Returns:
        [splits, T, r], contiguous, whose sum is meant: float32, or of one part the result in the dtype of ``x``.
    """
    rows, width = x.shape
    rank = A.shape[0]
    launch, splits = _narrowing(rows, width, rank, x.stride(0), A.stride(0), A.itemsize, tile, splits, x.device)
    parts = torch.empty((splits, rows, rank), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    launch(x, A, parts)
    return parts


def narrow(x: torch.Tensor, A: torch.Tensor, *, tile: Tile = NARROW, splits: int | None = None) -> torch.Tensor:
    """``x @ A.T`` in the dtype of ``x`` for few rows of ``A``.

    Args:
        x: [T, W], float16 or bfloat16, contiguous rows.
        A: [r, W], contiguous rows; cast to the dtype of ``x`` as it is read.
        tile: Launch settings.
        splits: Programs that share the sum over W. Default None: as many as fill the GPU, up to four.

    Returns:
        [T, r], contiguous.
    """
    parts = narrow_parts(x, A, tile=tile, splits=splits)
    splits, rows, rank = parts.shape
    if splits == 1:
        return parts[0]
    out = torch.empty((rows, rank), dtype=x.dtype, device=x.device)
    _combination(rows, rank, out.stride(), (splits,), None, 0, 0, 0, 1.0)(parts, out, None)
    return out


def _ends(widths: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """Where the column blocks of each job end."""
    return tuple(itertools.accumulate(cdiv(width, columns) for width in widths))


@remembered
def _widening(
    rows: int,
    widths: tuple[int, ...],
    rank: int,
    scaling: float,
    splits: int,
    thin_strides: tuple[int, ...],
    total_stride: int,
    factor_strides: tuple[int, ...],
    base_stride: int,
    out_stride: int,
    tile: Tile | None,
) -> Launch:
    tile = tile or WIDEN[_block(rank)]
    ends = _ends(widths, tile.columns)
    first_end, second_end, _ = (*ends, ends[-1], ends[-1])[:JOBS]
    width, second_width, third_width = (*widths, 0, 0)[:JOBS]
    thin_split, thin_stride, _ = thin_strides if len(thin_strides) == 3 else (0, *thin_strides)
    return Launch(
        widen_kernel,
        (ends[-1], cdiv(rows, tile.rows)),
        ("thin", "total", "base", "factor", "out", "second_factor", "second_out", "third_factor", "third_out"),
        rows=rows,
        width=width,
        second_width=second_width,
        third_width=third_width,
        rank=rank,
        scaling=scaling,
        thin_split=thin_split,
        thin_stride=thin_stride,
        total_stride=total_stride,
        factor_width=factor_strides[0],
        factor_rank=factor_strides[1],
        base_stride=base_stride,
        out_stride=out_stride,
        first_end=first_end,
        second_end=second_end,
        SPLITS=splits,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        RANK=_block(rank),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def widen(
    thin: torch.Tensor,
    factor: torch.Tensor,
    scaling: float = 1.0,
    *,
    base: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``scaling * thin @ factor.T [+ base]`` for a thin factor of few columns.

    Args:
        thin: [T, r], float16 or bfloat16, contiguous rows; or [splits, T, r] as ``narrow_parts`` leaves them.
        factor: [W, r], any strides; cast to the dtype of the result as it is read.
        scaling: Factor of the product.
        base: [T, W] to add, contiguous rows, or None.
        out: [T, W] to fill, contiguous rows; may be ``base``. Default None: allocated.
        total: [T, r] to fill with the sum of the parts, contiguous rows, or None. With float32 parts it or ``out``
            says what dtype is meant.
        tile: Launch settings. Default None: by the rank.

    Returns:
        [T, W] in the dtype of ``thin``, or ``total``: ``out`` when given.
    """
    splits = 1 if thin.dim() == 2 else thin.shape[0]
    (rows, rank), width = thin.shape[-2:], factor.shape[0]
    if out is None:
        out = torch.empty((rows, width), dtype=(thin if total is None else total).dtype, device=thin.device)
    launch = _widening(
        rows,
        (width,),
        rank,
        scaling,
        splits,
        thin.stride(),
        0 if total is None else total.stride(0),
        factor.stride(),
        0 if base is None else base.stride(0),
        out.stride(0),
        tile,
    )
    launch(thin, total, base, factor, out, None, None, None, None)
    return out


def widen_each(
    thin: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scaling: float = 1.0,
    *,
    total: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> list[torch.Tensor]:
    """``widen`` for two or three factors in one launch.

    Args:
        thin: As in ``widen``, with the columns of all factors side by side.
        factors: [W, r] each, of one dtype, rank and strides.
        scaling: As in ``widen``.
        total: As in ``widen``.
        tile: As in ``widen``.

    Returns:
        The product of each, contiguous.
    """
    splits = 1 if thin.dim() == 2 else thin.shape[0]
    rows, widths = thin.shape[-2], tuple([factor.shape[0] for factor in factors])
    dtype = (thin if total is None else total).dtype
    outs = [torch.empty((rows, width), dtype=dtype, device=thin.device) for width in widths]
    first = factors[0]
    total_stride = 0 if total is None else total.stride(0)
    launch = _widening(
        rows, widths, first.shape[1], scaling, splits, thin.stride(), total_stride, first.stride(), 0, widths[0], tile
    )
    pairs = [x for pair in zip(factors, outs) for x in pair]
    launch(thin, total, None, *pairs, *(None,) * (2 * (JOBS - len(factors))))
    return outs


class _Gradients(NamedTuple):
    """The launch, where the jobs' column blocks end, how many programs share a sum over rows, and where those begin."""

    launch: Launch
    ends: tuple[int, ...]
    parts: int
    start: int


@remembered
def _differentiation(
    rows: int,
    widths: tuple[int, ...],
    rank: int,
    dy_strides: tuple[int, ...],
    factor_strides: tuple[int, ...] | None,
    skinny_stride: int,
    tile: Tile | None,
    parts: int | None,
    device: torch.device,
) -> _Gradients:
    tile = tile or GRADIENTS[_block(rank)]
    columns = min(tile.columns, max(next_power_of_2(max(widths)), 16))
    ends, tiles = _ends(widths, columns), cdiv(rows, tile.rows)
    if parts is None:
        parts = min(max(GRADIENT_PROGRAMS * processors_of(device) // ends[-1], 1), tiles)
    tiles = cdiv(tiles, parts)
    parts = cdiv(cdiv(rows, tile.rows), tiles)
    start = 0 if factor_strides is None else ends[-1] * rows * rank
    first_end, second_end, _ = (*ends, ends[-1], ends[-1])[:JOBS]
    width, second_width, third_width = (*widths, 0, 0)[:JOBS]
    dy_stride, second_stride, third_stride = (*dy_strides, 0, 0)[:JOBS]
    factor_width, factor_rank = factor_strides or (0, 0)
    launch = Launch(
        gradients_kernel,
        (ends[-1], parts),
        ("dy", "factor", "second_dy", "second_factor", "third_dy", "third_factor", "skinny", "sums"),
        rows=rows,
        width=width,
        second_width=second_width,
        third_width=third_width,
        rank=rank,
        tiles=tiles,
        dy_stride=dy_stride,
        second_stride=second_stride,
        third_stride=third_stride,
        factor_width=factor_width,
        factor_rank=factor_rank,
        skinny_stride=skinny_stride,
        first_end=first_end,
        second_end=second_end,
        gradient_start=start,
        gradient_split=sum(widths) * rank,
        ROWS=tile.rows,
        COLUMNS=columns,
        RANK=_block(rank),
        num_warps=tile.num_warps,
        num_stages=gradient_stages(tile, rank, _shared_memory(device)),
    )
    return _Gradients(launch, ends, parts, start)


def gradients(
    dys: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor] | None,
    skinny: torch.Tensor | None,
    scaling: float = 1.0,
    *,
    thin: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> None:
    """Fill ``thin = scaling * dy @ factor`` and ``gradient = scaling * dy.T @ skinny`` in one pass over ``dy``.

    Up to three such jobs are done at once, in one launch where their partial sums are small.

    Args:
        dys: [T, W] each, float16 or bfloat16, contiguous rows.
        factors: For each dy [W, r], of one dtype, rank and strides; None without ``thin``.
        skinny: [T, r] of the dtype of ``dy``, contiguous rows, or None without ``gradient``. Of several jobs the
            columns are side by side.
        scaling: Factor of both products.
        thin: [T, r] to fill, any strides and dtype, or None; columns as in ``skinny``.
        gradient: [W, r] to fill, any strides and dtype, or None. Of several jobs the rows follow one another.
        tile: Launch settings. Default None: by the rank.
        parts: Programs that share the sum over T. Default None: as many as fill the GPU.
    """
    dy, jobs = dys[0], len(dys)
    given = thin if thin is not None else skinny
    assert given is not None
    rows, rank = dy.shape[0], given.shape[1] // jobs
    widths = tuple([x.shape[1] for x in dys])
    if thin is None:
        factors = None
    if gradient is None:
        skinny = None
    launch, ends, parts, start = _differentiation(
        rows,
        widths,
        rank,
        tuple([x.stride(0) for x in dys]),
        None if factors is None else factors[0].stride(),
        0 if skinny is None else skinny.stride(0),
        tile,
        parts,
        dy.device,
    )
    if jobs > 1 and 4 * start > SUMS_BYTES:
        end = 0
        for i, (x, width) in enumerate(zip(dys, widths)):
            columns, rows_of, end = slice(i * rank, (i + 1) * rank), slice(end, end + width), end + width
            gradients(
                [x],
                None if factors is None else [factors[i]],
                None if skinny is None else skinny[:, columns],
                scaling,
                thin=None if thin is None else thin[:, columns],
                gradient=None if gradient is None else gradient[rows_of],
                tile=tile,
            )
        return
    height = 0 if gradient is None else sum(widths)
    sums = torch.empty(start + parts * height * rank, dtype=torch.float32, device=dy.device)
    pairs = [x for pair in zip(dys, factors or (None,) * jobs) for x in pair]
    launch(*pairs, *(None,) * (2 * (JOBS - jobs)), skinny, sums)
    thin_strides = None if thin is None else thin.stride()
    gradient_strides = None if gradient is None else gradient.stride()
    combination = _combination(rows, rank, thin_strides, ends, gradient_strides, start, parts, height, scaling)
    combination(sums, thin, gradient)


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time: with the least and the most shared memory of any chip."""
    sizes = {"rows": "i32", "width": "i32", "rank": "i32"}
    for dtype in ("fp16", "bf16"):
        p, least = f"*{dtype}", bfloat16_minimum(dtype)
        for rank, masters in ((16, p), (128, "*fp32")):
            itemsize = 2 if masters == p else 4
            representative = dtype == "bf16" and rank == MIN_RANK
            for minimum, limit, amd in ((least, LEAST_SHARED, ("gfx90a", "gfx942")), (90, MOST_SHARED, ())):
                form = f"{dtype}-{masters[1:]}-r{rank}-{limit // 1024}k"
                common = {"minimum": minimum, "amd": amd, "representative": representative and amd != ()}
                yield Variant(
                    f"low_rank_narrow-{form}",
                    narrow_kernel,
                    {"x": p, "A": masters, "out": "*fp32", **sizes}
                    | {"x_stride": "i64", "A_stride": "i64", "out_split": "i64", "out_stride": "i32", "tiles": "i32"},
                    {"ROWS": NARROW.rows, "COLUMNS": NARROW.columns, "RANK": rank},
                    NARROW.num_warps,
                    narrow_stages(NARROW, rank, itemsize, limit),
                    **common,
                )
                tile = GRADIENTS[rank]
                integers = ("tiles", "first_end", "second_end", "second_width", "third_width")
                names = ("dy_stride", "factor_width", "skinny_stride", "gradient_start", "gradient_split")
                for jobs, more in (("", {}), ("-three", _more("dy", p, masters))):
                    yield Variant(
                        f"low_rank_gradients-{form}{jobs}",
                        gradients_kernel,
                        {"dy": p, "factor": masters, "skinny": p, "sums": "*fp32", **sizes, **more}
                        | {"second_stride": "i64", "third_stride": "i64"}
                        | dict.fromkeys(integers, "i32")
                        | dict.fromkeys(names, "i64"),
                        {"factor_rank": 1, "ROWS": tile.rows, "COLUMNS": tile.columns, "RANK": rank}
                        | ({} if more else _NO_MORE_DY),
                        tile.num_warps,
                        gradient_stages(tile, rank, limit),
                        **common,
                    )
            names = ("thin_split", "thin_stride", "total_stride", "factor_width", "base_stride", "out_stride")
            for jobs, splits, more in (("", 1, {"base": p}), ("-three", 2, {"total": p} | _more("out", p, masters))):
                yield Variant(
                    f"low_rank_widen-{dtype}-{masters[1:]}-r{rank}{jobs}",
                    widen_kernel,
                    {"thin": p if splits == 1 else "*fp32", "factor": masters, "out": p, **sizes, "scaling": "fp32"}
                    | more
                    | dict.fromkeys(("second_width", "third_width", "first_end", "second_end"), "i32")
                    | dict.fromkeys(names, "i64"),
                    {"factor_rank": 1, "ROWS": WIDEN[rank].rows, "COLUMNS": WIDEN[rank].columns, "RANK": rank}
                    | {"SPLITS": splits}
                    | ({"base": None} if splits > 1 else {"total": None, **_NO_MORE_OUT}),
                    WIDEN[rank].num_warps,
                    WIDEN[rank].num_stages,
                    minimum=least,
                    representative=representative,
                )
        integers = ("rows", "rank", "thin_row", "thin_column", "first_end", "second_end", "third_end")
        more = ("job_programs", "thin_programs", "gradient_parts", "gradient_rows", "gradient_row", "gradient_column")
        yield Variant(
            f"low_rank_combine-{dtype}",
            combine_kernel,
            {"sums": "*fp32", "thin": p, "gradient": "*fp32", "gradient_start": "i64", "scaling": "fp32"}
            | dict.fromkeys((*integers, *more), "i32"),
            {"TILE": COMBINE_TILE},
            minimum=least,
            representative=dtype == "bf16",
        )


def _more(of: str, pointer: str, masters: str) -> dict[str, str]:
    """The pointers of a second and a third job."""
    return {f"{job}_{name}": kind for job in ("second", "third") for name, kind in ((of, pointer), ("factor", masters))}


_NO_MORE_DY = dict.fromkeys(("second_dy", "second_factor", "third_dy", "third_factor"))
_NO_MORE_OUT = dict.fromkeys(("second_factor", "second_out", "third_factor", "third_out"))

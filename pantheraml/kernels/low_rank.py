"""Products with a thin factor, at the speed at which the wide one is read: what adapters of low rank cost.

With x [T, W], factors [W, r] of small r, all in one dtype with float32 sums::

    narrow:     s = x @ A.T                               reads x once, for all adapters of x
    widen:      y = scaling * s @ B.T [+ base]            writes y once
    gradients:  thin = scaling * dy @ B                   both in one pass over dy
                dB = scaling * dy.T @ s

Partial sums of programs are float32, kept apart and added in a fixed order: the same bits in every run on the same
chip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._triton import Launch, jit, remembered, tl
from ._variants import Variant, bfloat16_minimum
from .utils import cdiv, next_power_of_2, processors

# Matrix units contract and emit at least 16 columns; wider factors are ordinary matrix products.
MIN_RANK, MAX_RANK = 16, 128
DTYPES = (torch.float16, torch.bfloat16)
# Programs an SM that fill the memory pipeline.
NARROW_PROGRAMS = 2
GRADIENT_PROGRAMS = 2
COMBINE_TILE = 1024
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
def widen_kernel(
    thin,
    factor,
    base,
    out,
    rows,
    width,
    rank,
    scaling,
    thin_stride,
    factor_width,
    factor_rank,
    base_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """``out[i, j] = scaling * sum_r thin[i, r] factor[j, r] [+ base[i, j]]``."""
    o_row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    o_rank = tl.arange(0, RANK)
    m_row, m_column, m_rank = o_row < rows, o_column < width, o_rank < rank
    b_thin = tl.load(
        thin + o_row[:, None] * thin_stride + o_rank[None, :], mask=m_row[:, None] & m_rank[None, :], other=0.0
    )
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
    skinny,
    thin,
    gradient,
    rows,
    width,
    rank,
    tiles,
    dy_stride,
    factor_width,
    factor_rank,
    skinny_stride,
    thin_split,
    thin_stride,
    gradient_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """For COLUMNS columns and ``tiles`` tiles of ROWS rows, float32 parts of both sums.

    ``thin[column block, i, r] = sum_j dy[i, j] factor[j, r]`` over the block's columns, when there is a factor;
    ``gradient[row block, j, r] = sum_i dy[i, j] skinny[i, r]`` over the block's rows, when there is a skinny.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1).to(tl.int64)
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    o_rank = tl.arange(0, RANK)
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
            tl.store(thin + i_block * thin_split + o_i[:, None] * thin_stride + o_rank[None, :], b_thin, mask=m_skinny)
        if skinny is not None:
            b_skinny = tl.load(skinny + o_i[:, None] * skinny_stride + o_rank[None, :], mask=m_skinny, other=0.0)
            b_sum = tl.dot(tl.trans(b_dy), b_skinny, b_sum)
    if skinny is not None:
        p_gradient = gradient + i_part * gradient_split + o_column[:, None] * rank + o_rank[None, :]
        tl.store(p_gradient, b_sum, mask=m_column[:, None] & m_rank[None, :])


@jit
def _combine(parts, out, i_program, splits, split_stride, rows, rank, scaling, out_row, out_rank, TILE: tl.constexpr):
    o_flat = i_program.to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = o_flat < rows * rank
    b_sum = tl.zeros((TILE,), tl.float32)
    for i in range(splits):
        b_sum += tl.load(parts + i * split_stride + o_flat, mask=mask, other=0.0)
    o_out = (o_flat // rank) * out_row + (o_flat % rank) * out_rank
    tl.store(out + o_out, (b_sum * scaling).to(out.dtype.element_ty), mask=mask)


@jit
def combine_kernel(
    first,
    first_out,
    second,
    second_out,
    first_splits,
    first_stride,
    first_rows,
    first_rank,
    first_row,
    first_column,
    second_splits,
    second_stride,
    second_rows,
    second_rank,
    second_row,
    second_column,
    scaling,
    programs,
    TILE: tl.constexpr,
):
    """``out[i, r] = scaling * sum_split parts[split, i, r]`` for one or two stacks of parts."""
    i_program = tl.program_id(0)
    if i_program < programs:
        _combine(
            first,
            first_out,
            i_program,
            first_splits,
            first_stride,
            first_rows,
            first_rank,
            scaling,
            first_row,
            first_column,
            TILE,
        )
    elif second is not None:
        _combine(
            second,
            second_out,
            i_program - programs,
            second_splits,
            second_stride,
            second_rows,
            second_rank,
            scaling,
            second_row,
            second_column,
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


@functools.cache
def _narrow_stages_on(tile: Tile, rank: int, itemsize: int, device: torch.device) -> int:
    return narrow_stages(tile, rank, itemsize, _shared_memory(device))


@functools.cache
def _gradient_stages_on(tile: Tile, rank: int, device: torch.device) -> int:
    return gradient_stages(tile, rank, _shared_memory(device))


class _Sum(NamedTuple):
    """A stack of partial sums [splits, rows, rank], and the strides of what their sum fills."""

    splits: int
    rows: int
    rank: int
    row: int
    column: int


_FIRST, _SECOND = (
    tuple(job + part for part in ("_splits", "_stride", "_rows", "_rank", "_row", "_column"))
    for job in ("first", "second")
)


@remembered
def _combination(first: _Sum, second: _Sum | None, scaling: float) -> Launch:
    programs = cdiv(first.rows * first.rank, COMBINE_TILE)
    more = 0 if second is None else cdiv(second.rows * second.rank, COMBINE_TILE)
    sizes: dict[str, int] = {}
    for names, job in ((_FIRST, first), (_SECOND, second)):
        values = (0,) * 6 if job is None else (job.splits, job.rows * job.rank, *job[1:])
        sizes |= zip(names, values)
    return Launch(
        combine_kernel,
        (programs + more,),
        ("first", "first_out", "second", "second_out"),
        **sizes,
        scaling=scaling,
        programs=programs,
        TILE=COMBINE_TILE,
        num_warps=4,
    )


def _add_up(jobs: list[tuple[torch.Tensor, torch.Tensor]], scaling: float) -> None:
    """Sum the parts of one or two jobs, each given with what it fills, in one launch."""
    sums = [_Sum(*parts.shape, *out.stride()) for parts, out in jobs]
    second = jobs[1] if len(jobs) == 2 else (None, None)
    _combination(sums[0], sums[1] if len(sums) == 2 else None, scaling)(*jobs[0], *second)


@remembered
def _narrowing(
    rows: int,
    width: int,
    rank: int,
    x_stride: int,
    A_stride: int,
    tile: Tile,
    splits: int | None,
    programs: int,
    stages: int,
) -> tuple[Launch, int]:
    """The launch and how many programs share the sum."""
    columns = min(tile.columns, max(next_power_of_2(width), 16))
    row_blocks, tiles = cdiv(rows, tile.rows), cdiv(width, columns)
    if splits is None:
        splits = min(max(programs // row_blocks, 1), tiles)
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
        num_stages=stages,
    )
    return launch, splits


def narrow(x: torch.Tensor, A: torch.Tensor, *, tile: Tile = NARROW, splits: int | None = None) -> torch.Tensor:
    """``x @ A.T`` in the dtype of ``x`` for few rows of ``A``.

    Args:
        x: [T, W], float16 or bfloat16, contiguous rows.
        A: [r, W], contiguous rows; cast to the dtype of ``x`` as it is read.
        tile: Launch settings.
        splits: Programs that share the sum over W. Default None: as many as fill the GPU.

    Returns:
        [T, r], contiguous.
    """
    rows, width = x.shape
    rank = A.shape[0]
    programs, stages = NARROW_PROGRAMS * processors(x), _narrow_stages_on(tile, rank, A.itemsize, x.device)
    launch, splits = _narrowing(rows, width, rank, x.stride(0), A.stride(0), tile, splits, programs, stages)
    out = torch.empty((rows, rank), dtype=x.dtype, device=x.device)
    parts = torch.empty((splits, rows, rank), dtype=torch.float32, device=x.device) if splits > 1 else None
    launch(x, A, out if parts is None else parts)
    if parts is not None:
        _add_up([(parts, out)], 1.0)
    return out


@remembered
def _widening(
    rows: int,
    width: int,
    rank: int,
    scaling: float,
    thin_stride: int,
    factor_width: int,
    factor_rank: int,
    base_stride: int,
    out_stride: int,
    tile: Tile,
) -> Launch:
    return Launch(
        widen_kernel,
        (cdiv(width, tile.columns), cdiv(rows, tile.rows)),
        ("thin", "factor", "base", "out"),
        rows=rows,
        width=width,
        rank=rank,
        scaling=scaling,
        thin_stride=thin_stride,
        factor_width=factor_width,
        factor_rank=factor_rank,
        base_stride=base_stride,
        out_stride=out_stride,
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
    tile: Tile | None = None,
) -> torch.Tensor:
    """``scaling * thin @ factor.T [+ base]`` for a thin factor of few columns.

    Args:
        thin: [T, r], float16 or bfloat16, contiguous rows.
        factor: [W, r], any strides; cast to the dtype of ``thin`` as it is read.
        scaling: Factor of the product.
        base: [T, W] to add, contiguous rows, or None.
        out: [T, W] to fill, contiguous rows; may be ``base``. Default None: allocated.
        tile: Launch settings. Default None: by the rank.

    Returns:
        [T, W] in the dtype of ``thin``: ``out`` when given.
    """
    (rows, rank), width = thin.shape, factor.shape[0]
    tile = tile or WIDEN[_block(rank)]
    if out is None:
        out = torch.empty((rows, width), dtype=thin.dtype, device=thin.device)
    base_stride = 0 if base is None else base.stride(0)
    strides = (thin.stride(0), *factor.stride(), base_stride, out.stride(0))
    _widening(rows, width, rank, scaling, *strides, tile)(thin, factor, base, out)
    return out


class _Gradients(NamedTuple):
    """The launch, and how many programs share the sums over columns and over rows."""

    launch: Launch
    blocks: int
    parts: int


@remembered
def _differentiation(
    rows: int,
    width: int,
    rank: int,
    dy_stride: int,
    factor_width: int,
    factor_rank: int,
    skinny_stride: int,
    tile: Tile,
    parts: int | None,
    programs: int,
    stages: int,
) -> _Gradients:
    columns = min(tile.columns, max(next_power_of_2(width), 16))
    blocks, tiles = cdiv(width, columns), cdiv(rows, tile.rows)
    if parts is None:
        parts = min(max(programs // blocks, 1), tiles)
    tiles = cdiv(tiles, parts)
    parts = cdiv(cdiv(rows, tile.rows), tiles)
    launch = Launch(
        gradients_kernel,
        (blocks, parts),
        ("dy", "factor", "skinny", "thin", "gradient"),
        rows=rows,
        width=width,
        rank=rank,
        tiles=tiles,
        dy_stride=dy_stride,
        factor_width=factor_width,
        factor_rank=factor_rank,
        skinny_stride=skinny_stride,
        thin_split=rows * rank,
        thin_stride=rank,
        gradient_split=width * rank,
        ROWS=tile.rows,
        COLUMNS=columns,
        RANK=_block(rank),
        num_warps=tile.num_warps,
        num_stages=stages,
    )
    return _Gradients(launch, blocks, parts)


def gradients(
    dy: torch.Tensor,
    factor: torch.Tensor | None,
    skinny: torch.Tensor | None,
    scaling: float = 1.0,
    *,
    thin: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> None:
    """Fill ``thin = scaling * dy @ factor`` and ``gradient = scaling * dy.T @ skinny`` in one pass over ``dy``.

    Args:
        dy: [T, W], float16 or bfloat16, contiguous rows.
        factor: [W, r], any strides, or None without ``thin``.
        skinny: [T, r] of the dtype of ``dy``, contiguous rows, or None without ``gradient``.
        scaling: Factor of both products.
        thin: [T, r] to fill, any strides and dtype, or None.
        gradient: [W, r] to fill, any strides and dtype, or None.
        tile: Launch settings. Default None: by the rank.
        parts: Programs that share the sum over T. Default None: as many as fill the GPU.
    """
    rows, width = dy.shape
    given = factor if factor is not None else skinny
    assert given is not None
    rank = given.shape[1]
    tile = tile or GRADIENTS[_block(rank)]
    strides = (
        dy.stride(0),
        *((0, 0) if factor is None else factor.stride()),
        0 if skinny is None else skinny.stride(0),
    )
    programs, stages = GRADIENT_PROGRAMS * processors(dy), _gradient_stages_on(tile, rank, dy.device)
    launch, blocks, parts = _differentiation(rows, width, rank, *strides, tile, parts, programs, stages)
    wide = {"dtype": torch.float32, "device": dy.device}
    thin_parts = None if thin is None else torch.empty((blocks, rows, rank), **wide)
    gradient_parts = None if gradient is None else torch.empty((parts, width, rank), **wide)
    launch(dy, None if thin is None else factor, None if gradient is None else skinny, thin_parts, gradient_parts)
    pairs = ((thin_parts, thin), (gradient_parts, gradient))
    _add_up([(part, out) for part, out in pairs if part is not None and out is not None], scaling)


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
                names = ("dy_stride", "factor_width", "skinny_stride", "thin_split", "gradient_split")
                yield Variant(
                    f"low_rank_gradients-{form}",
                    gradients_kernel,
                    {"dy": p, "factor": masters, "skinny": p, "thin": "*fp32", "gradient": "*fp32", **sizes}
                    | {"tiles": "i32", "thin_stride": "i32", **dict.fromkeys(names, "i64")},
                    {"factor_rank": 1, "ROWS": tile.rows, "COLUMNS": tile.columns, "RANK": rank},
                    tile.num_warps,
                    gradient_stages(tile, rank, limit),
                    **common,
                )
            names = ("thin_stride", "factor_width", "base_stride", "out_stride")
            yield Variant(
                f"low_rank_widen-{dtype}-{masters[1:]}-r{rank}",
                widen_kernel,
                {"thin": p, "factor": masters, "base": p, "out": p, **sizes, "scaling": "fp32"}
                | dict.fromkeys(names, "i64"),
                {"factor_rank": 1, "ROWS": WIDEN[rank].rows, "COLUMNS": WIDEN[rank].columns, "RANK": rank},
                WIDEN[rank].num_warps,
                WIDEN[rank].num_stages,
                minimum=least,
                representative=representative,
            )
        jobs = {"first_out": p, "second_out": "*fp32", "scaling": "fp32", "programs": "i32"}
        for job in ("first", "second"):
            names = ("splits", "stride", "rows", "rank", "row", "column")
            jobs |= {job: "*fp32"} | {f"{job}_{name}": "i32" for name in names}
        yield Variant(
            f"low_rank_combine-{dtype}",
            combine_kernel,
            jobs,
            {"TILE": COMBINE_TILE},
            minimum=least,
            representative=dtype == "bf16",
        )

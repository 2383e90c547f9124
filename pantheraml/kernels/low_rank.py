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

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ._low_rank_kernels import combine_kernel, gradients_kernel, narrow_kernel, widen_kernel
from ._triton import Launch, remembered
from ._variants import Variant, bfloat16_minimum
from .utils import LEAST_SHARED, cdiv, next_power_of_2, processors_of, shared_memory

# Matrix units contract and emit at least 16 columns; wider factors are ordinary matrix products.
MIN_RANK, MAX_RANK = 16, 128
DTYPES = (torch.float16, torch.bfloat16)
# Programs an SM that fill the memory pipeline.
NARROW_PROGRAMS = 2
GRADIENT_PROGRAMS = 2
COMBINE_TILE = 1024
# Programs of ``narrow`` that share a sum.
NARROW_SPLITS = 4
# What ``widen`` may read of their parts beyond what it would of the sum: it adds them up for each of its tiles, which
# on an H100 takes 5 us for as much, the time of a launch that adds them up first.
FOLDED_BYTES = 20 * 2**20
# Projections that share a launch, and what their partial sums of a thin product may take at once: larger ones come of
# launches that are long enough for the host.
JOBS = 3
SUMS_BYTES = 32 * 2**20
# Shared memory of a program that the largest chips have, and what a kernel keeps besides its stages.
MOST_SHARED = 227 * 1024
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
# For wide tensors, where the shared memory is there: half as many parts of the thin product. On an H100 two of 8,192 x
# 14,336 take 220 us for 336, two of 8,192 x 8,192 131 for 140; narrower ones leave processors idle.
WIDE = 8192
WIDE_GRADIENTS = {16: Tile(32, 512, 8, 3), 32: Tile(32, 512, 8, 3)}


def serves(x: torch.Tensor, rank: int) -> bool:
    """Whether the kernels take this wide factor at this rank: 16-bit dtypes, contiguous rows, a thin other factor."""
    return x.dtype in DTYPES and 0 < rank <= MAX_RANK and x.dim() == 2 and x.stride(1) == 1 and x.numel() > 0


def padded_rank(rank: int) -> int:
    """Columns that a program has for this rank."""
    return max(next_power_of_2(rank), MIN_RANK)


def narrow_stages(tile: Tile, rank: int, itemsize: int, limit: int) -> int:
    """As many of the tile's stages as fit into ``limit`` bytes of shared memory; the thin factor has ``itemsize``."""
    stage = tile.columns * (2 * tile.rows + itemsize * padded_rank(rank))
    return max(min(tile.num_stages, (limit - SHARED_RESERVE) // stage), 1)


def gradient_stages(tile: Tile, rank: int, limit: int) -> int:
    """The same for ``gradients``, where the factor stays and dy and skinny stream."""
    stage = 2 * tile.rows * (tile.columns + padded_rank(rank))
    kept = SHARED_RESERVE + 2 * tile.columns * padded_rank(rank)
    return max(min(tile.num_stages, (limit - kept) // stage), 1)


def gradient_tile(rank: int, width: int, limit: int) -> Tile:
    """The tile of ``gradients`` for a padded rank and the largest width, with ``limit`` bytes of shared memory."""
    wide = WIDE_GRADIENTS.get(rank)
    if wide is None or width < WIDE or gradient_stages(wide, rank, limit) < 2:
        return GRADIENTS[rank]
    return wide


@remembered
def combination(
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
    """The launch that adds up what programs leave in ``sums``: (sums, thin or None, gradient or None).

    Args:
        rows: Rows T of thin.
        rank: Columns of each job's parts.
        thin: Strides of thin [T, jobs * r], or None without it.
        ends: How many parts [T, r] there are up to the end of each job's.
        gradient: Strides of the gradient [height, r], or None without it.
        start: Where its parts begin in ``sums``.
        parts: How many there are.
        height: Rows of the gradient.
        scaling: Factor of both.
    """
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
        RANK=padded_rank(rank),
        num_warps=tile.num_warps,
        num_stages=narrow_stages(tile, rank, itemsize, shared_memory(device)),
    )
    return launch, splits


def reading(rank: int, width: int) -> int:
    """Numbers of each row of the thin factor that ``widen`` reads for results of this width."""
    return cdiv(width, WIDEN[padded_rank(rank)].columns) * rank


def narrow_parts(
    x: torch.Tensor, A: torch.Tensor, *, read: int | None, tile: Tile = NARROW, splits: int | None = None
) -> torch.Tensor:
    """What the programs that share the sum leave of ``x @ A.T``; arguments as in ``narrow``.

    Args:
        x: As in ``narrow``.
        A: As in ``narrow``.
        read: Numbers of each row that ``widen`` will read, see ``reading``: where it would take longer over the parts,
            they are added up at once. None adds them up whatever it takes.
        tile: As in ``narrow``.
        splits: As in ``narrow``.

    Returns:
        [splits, T, r], contiguous, whose sum is meant: float32, or of one part the result in the dtype of ``x``.
    """
    rows, width = x.shape
    rank = A.shape[0]
    launch, splits = _narrowing(rows, width, rank, x.stride(0), A.stride(0), A.itemsize, tile, splits, x.device)
    parts = torch.empty((splits, rows, rank), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    launch(x, A, parts)
    more = parts.itemsize * splits - x.itemsize
    if read is not None and rows * read * more <= FOLDED_BYTES:
        return parts
    return added(parts, x.dtype).unsqueeze(0)


def added(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum [T, r] of parts [parts, T, r] as ``narrow_parts`` leaves them, in the dtype of what was multiplied."""
    splits, rows, rank = parts.shape
    if splits == 1:
        return parts[0]
    out = torch.empty((rows, rank), dtype=dtype, device=parts.device)
    combination(rows, rank, out.stride(), (splits,), None, 0, 0, 0, 1.0)(parts, out, None)
    return out


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
    return narrow_parts(x, A, read=None, tile=tile, splits=splits)[0]


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
    tile = tile or WIDEN[padded_rank(rank)]
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
        RANK=padded_rank(rank),
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
    limit = shared_memory(device)
    tile = tile or gradient_tile(padded_rank(rank), max(widths), limit)
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
        RANK=padded_rank(rank),
        num_warps=tile.num_warps,
        num_stages=gradient_stages(tile, rank, limit),
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
    combine = combination(rows, rank, thin_strides, ends, gradient_strides, start, parts, height, scaling)
    combine(sums, thin, gradient)


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time: with the least and the most shared memory of any chip."""
    sizes = {"rows": "i32", "width": "i32", "rank": "i32"}
    for dtype in ("fp16", "bf16"):
        p, least = f"*{dtype}", bfloat16_minimum(dtype)
        for rank, masters in ((MIN_RANK, p), (MAX_RANK, "*fp32")):
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
                integers = ("tiles", "first_end", "second_end", "second_width", "third_width")
                names = ("dy_stride", "factor_width", "skinny_stride", "gradient_start", "gradient_split")
                for jobs, width, more in (("", WIDE, {}), ("-three", 1, _more("dy", p, masters))):
                    tile = gradient_tile(rank, width, limit)
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

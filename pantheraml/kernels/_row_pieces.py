"""Rows held in pieces of equal width, so that a width just above a power of two wastes few lanes; sums over programs.

A row is N pieces of P columns, N the largest power of two that fits, and M pieces for what is left (0 for none). A
tile is ``[N, ROWS, P]`` and ``[M, ROWS, P]``. A thread holds the same columns of every piece, so sums over pieces stay
within it; one reduction over the last axis then crosses lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .utils import (
    ELEMENTS_PER_WARP,
    LANES,
    MAX_THREADS,
    SHORT_TILE,
    cdiv,
    next_power_of_2,
    persistent_programs,
    require_width,
)

# Elements of a row that a thread holds at most, unless it takes all threads of a program: three loads of 16 bytes of a
# 2-byte dtype. As float32, with the accumulators of one or two parameters, they fit into 255 registers.
ELEMENTS_PER_THREAD = 24
# Elements that a multiprocessor's programs hold together at least, while they sum. Many more would not fit into its
# 65,536 registers at once, and each program adds a row of partial sums.
RESIDENT_ELEMENTS = 6144
# Tiles are fetched into shared memory two ahead, where that takes no more of a multiprocessor's than every chip with
# asynchronous copies has; fetching one ahead is slower than not to.
AHEAD = 2
SHARED_BYTES = 96 << 10
# Rows and columns that a program of the kernel that adds partial sums reads at once, and its warps.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 256, 16, 8


class Pieces(NamedTuple):
    """How rows are cut and launched.

    Attributes:
        n: Pieces of the first part, a power of two.
        m: Pieces of the second part, a smaller power of two or 0.
        columns: Width of a piece, a power of two.
        rows: Rows a program holds at once.
        num_warps: Warps a program.
        full: Whether the columns of the first, and of the second part all exist.
    """

    n: int
    m: int
    columns: int
    rows: int
    num_warps: int
    full: tuple[bool, bool]

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernels."""
        return {
            "ROWS": self.rows,
            "N": self.n,
            "M": self.m,
            "P": self.columns,
            "FULL_N": self.full[0],
            "FULL_M": self.full[1],
        }

    @property
    def elements(self) -> int:
        """Elements of a tile, with those that do not exist."""
        return (self.n + self.m) * self.columns * self.rows

    @property
    def resident(self) -> int:
        """Programs of a multiprocessor while they sum."""
        return cdiv(RESIDENT_ELEMENTS, self.elements)

    def programs(self, tensor: torch.Tensor, tiles: int) -> int:
        """Programs that walk over the tiles while they sum: fixed by the chip, but for fewer tiles."""
        return min(persistent_programs(tensor, self.resident), tiles)

    def stages(self, element_bytes: int) -> int:
        """Stages of the loop over tiles; ``element_bytes`` are those of all operands' elements together."""
        held = AHEAD * self.resident * self.elements * element_bytes
        return AHEAD + 1 if held <= SHARED_BYTES else 1


@functools.cache
def row_pieces(
    width: int,
    *,
    where: str = "a row-wise kernel",
    lanes: int = LANES,
    elements: int = ELEMENTS_PER_THREAD,
    adjacent: int = 8,
) -> Pieces:
    """Pieces, rows and warps for rows of ``width`` elements; short rows share a program, each in one piece.

    Args:
        width: Elements of a row.
        where: The op, for messages.
        lanes: Threads of a warp.
        elements: Those of a row that a thread holds at most, unless it takes all threads of a program.
        adjacent: Columns of a piece that a thread holds: 16 bytes of the narrowest tensor that is read or written.

    Raises:
        UnsupportedError: the row does not fit into the registers of one program.
    """
    require_width(width, where)
    whole = next_power_of_2(width)
    rows = max(SHORT_TILE // whole, 1)
    if rows > 1:
        warps = max(whole * rows // ELEMENTS_PER_WARP, 1)
        return Pieces(1, 0, whole, rows, warps, (whole == width, whole == width))
    threads = max(min(next_power_of_2(cdiv(width, elements)), MAX_THREADS), lanes)
    columns = adjacent * threads
    count = cdiv(width, columns)
    n = 1 << (count.bit_length() - 1)
    m = next_power_of_2(count - n) if count > n else 0
    if m == n:
        n, m = 2 * n, 0
    return Pieces(n, m, columns, 1, threads // lanes, (n * columns <= width, (n + m) * columns <= width))


@jit
def columns_of(START: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Columns ``[N, 1, P]`` of the pieces from ``START`` on."""
    return START + (tl.arange(0, N) * P)[:, None, None] + tl.arange(0, P)[None, None, :]


@jit
def mask_of(m_row, columns, width, FULL: tl.constexpr):
    """What exists of a tile."""
    mask = m_row[None, :, None]
    if not FULL:
        mask = mask & (columns < width)
    return mask


@jit
def load_parameter(p, columns, width, ROWS: tl.constexpr, FULL: tl.constexpr):
    """A weight or bias in float32, in the layout of a tile: repeated for its rows."""
    columns = tl.broadcast_to(columns, (columns.shape[0], ROWS, columns.shape[2]))
    if FULL:
        return tl.load(p + columns, eviction_policy="evict_last").to(tl.float32)
    else:
        return tl.load(p + columns, mask=columns < width, other=0.0, eviction_policy="evict_last").to(tl.float32)


@jit
def store_partial(p, total, START: tl.constexpr, width, N: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr):
    """Add the rows of a program's accumulator and store their sum at ``p + columns``."""
    columns = START + (tl.arange(0, N) * P)[:, None] + tl.arange(0, P)[None, :]
    total = tl.sum(total, axis=1)
    if FULL:
        tl.store(p + columns, total)
    else:
        tl.store(p + columns, total, mask=columns < width)


@jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    first, second, out_first, out_second, programs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``out = sum of partial over programs`` in float32; the second pair on the second axis of the grid."""
    o_col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_col = o_col < width
    partial = first
    out = out_first
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if second is not None:  # noqa: SIM102 - known when compiling, and the pointers are then left out
        if tl.program_id(1) == 1:
            partial = second
            out = out_second
    for start in range(0, programs, ROWS):
        i_row = start + tl.arange(0, ROWS)
        mask = (i_row < programs)[:, None] & m_col[None, :]
        total += tl.load(partial + i_row[:, None] * width + o_col[None, :], mask=mask, other=0.0)
    tl.store(out + o_col, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=m_col)


def sum_partials(partials: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """Sums of one or two ``[programs, D]`` float32 over programs, each rounded once to its dtype; 0 of no programs.

    The order is fixed, without atomics: the same bits in every run on the same chip.
    """
    if len(set(dtypes)) > 1:
        return [sum_partials([partial], [dtype])[0] for partial, dtype in zip(partials, dtypes)]
    programs, width = partials[0].shape
    sums = [torch.empty(width, dtype=dtypes[0], device=partial.device) for partial in partials]
    two = len(partials) == 2
    with on_device(partials[0]):
        _sum_partials_kernel[(cdiv(width, SUM_COLUMNS), len(partials))](
            first=partials[0],
            second=partials[1] if two else None,
            out_first=sums[0],
            out_second=sums[1] if two else None,
            programs=programs,
            width=width,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
            num_warps=SUM_WARPS,
        )
    return sums


def chips(minimum: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Suffix of a variant's name, lanes of a warp, and what chips have them, for ahead-of-time compilation."""
    yield "", 32, {"minimum": minimum, "amd": ()}
    yield "-amd", 64, {"minimum": None}


def variants() -> Iterator[Variant]:
    """Forms of the kernel for ahead-of-time compilation."""
    for dtype in ("fp16", "bf16", "fp32"):
        for form, second in (("one", None), ("two", f"*{dtype}")):
            two = {"second": "*fp32", "out_second": second} if second else {}
            yield Variant(
                f"_row_pieces-sum-{dtype}-{form}",
                _sum_partials_kernel,
                {"first": "*fp32", "out_first": f"*{dtype}", "programs": "i32", "width": "i32", **two},
                {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS} | ({} if second else {"second": None, "out_second": None}),
                SUM_WARPS,
                minimum=bfloat16_minimum(dtype),
                representative=dtype == "bf16",
            )

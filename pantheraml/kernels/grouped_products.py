"""Products of groups of rows with a matrix each: kernels, and which of them or of torch's own serves.

torch's grouped product serves bfloat16 on Hopper and later, where it has the chip's own instructions; the kernels below
serve 16-bit dtypes on other GPUs, and everywhere what is added to a product that is there already, and thin gradients.
Both read where groups end on the device. What is left (other dtypes, a CPU) runs one product a group. Sums are float32.
Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .utils import cdiv, next_power_of_2, shared_memory

# torch._grouped_mm reads rows in 16-byte pieces.
ALIGNMENT_BYTES = 16
GROUPED_CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)
# Matrix units contract and emit at least 16 columns.
LEAST_TILE = 16


class Tile(NamedTuple):
    """Shape of a program's tile.

    Attributes:
        rows: Rows of the output.
        columns: Columns of the output.
        depth: What is contracted at a time.
        num_warps: Warps a program.
        num_stages: Tiles in flight.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Its stages fit into the shared memory that every chip has.
TILE = Tile(64, 128, 32, 4, 4)
# For products of which no side is thin, on chips with as much shared memory as it takes: twice as fast there.
LARGE, LARGE_SHARED = Tile(128, 256, 64, 8, 3), 160 * 1024
# Fewer columns than this are the thin side of an adapter, and the product is as fast as its other factor is read.
THIN = 128


@jit
def rows_kernel(
    x,
    matrices,
    ends,
    bias,
    base,
    out,
    rows,
    width,
    columns,
    groups,
    scaling,
    x_stride,
    matrix_group,
    matrix_row,
    matrix_column,
    base_stride,
    out_stride,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``out[i] = scaling * x[i] @ matrices[g] [+ base[i]] [+ bias[g]]`` for ROWS rows of one group.

    No tile spans two groups. Which group and which of its tiles a program has follows from all ``ends``; programs
    beyond the last tile do nothing.
    """
    i_tile = tl.program_id(0)
    o_group = tl.arange(0, GROUPS)
    m_group = o_group < groups
    b_end = tl.load(ends + o_group, mask=m_group, other=0)
    b_start = tl.load(ends + o_group - 1, mask=m_group & (o_group > 0), other=0)
    b_tiles = (b_end - b_start + ROWS - 1) // ROWS
    b_passed = tl.cumsum(b_tiles, 0) <= i_tile
    i_group = tl.sum(b_passed.to(tl.int32), 0)
    if i_group < groups:
        i_first = tl.sum(tl.where(b_passed, b_tiles, 0), 0)
        i_start = tl.sum(tl.where(o_group == i_group, b_start, 0), 0) + (i_tile - i_first) * ROWS
        i_end = tl.sum(tl.where(o_group == i_group, b_end, 0), 0)
        o_row = i_start.to(tl.int64) + tl.arange(0, ROWS)
        o_column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        o_depth = tl.arange(0, DEPTH)
        m_row, m_column = (o_row < i_end)[:, None], (o_column < columns)[None, :]
        p_x = x + o_row[:, None] * x_stride + o_depth[None, :]
        p_matrix = matrices + i_group.to(tl.int64) * matrix_group
        p_matrix += o_depth[:, None].to(tl.int64) * matrix_row + o_column[None, :] * matrix_column
        b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width, DEPTH):
            m_depth = o_depth < width - start
            b_x = tl.load(p_x, mask=m_row & m_depth[None, :], other=0.0)
            b_matrix = tl.load(p_matrix, mask=m_depth[:, None] & m_column, other=0.0)
            b_sum = tl.dot(b_x, b_matrix, b_sum)
            p_x += DEPTH
            p_matrix += DEPTH * matrix_row
        b_sum *= scaling
        mask = m_row & m_column
        if base is not None:
            b_base = tl.load(base + o_row[:, None] * base_stride + o_column[None, :], mask=mask, other=0.0)
            b_sum += b_base.to(tl.float32)
        if bias is not None:
            p_bias = bias + i_group.to(tl.int64) * columns + o_column[None, :]
            b_sum += tl.load(p_bias, mask=m_column, other=0.0).to(tl.float32)
        p_out = out + o_row[:, None] * out_stride + o_column[None, :]
        tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=mask)


@jit
def columns_kernel(
    left,
    right,
    ends,
    out,
    rows,
    columns,
    scaling,
    left_stride,
    right_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``out[g, p, q] = scaling * sum_i left[i, p] * right[i, q]`` over the rows i of g, for one tile of p and q."""
    i_group = tl.program_id(0)
    i_start = tl.load(ends + i_group - 1, mask=i_group > 0, other=0)
    i_end = tl.load(ends + i_group)
    o_row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.program_id(2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    o_depth = i_start.to(tl.int64) + tl.arange(0, DEPTH)
    m_row, m_column = (o_row < rows)[None, :], (o_column < columns)[None, :]
    p_left = left + o_depth[:, None] * left_stride + o_row[None, :]
    p_right = right + o_depth[:, None] * right_stride + o_column[None, :]
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(i_start, i_end, DEPTH):
        m_depth = (start + tl.arange(0, DEPTH) < i_end)[:, None]
        b_left = tl.load(p_left, mask=m_depth & m_row, other=0.0)
        b_right = tl.load(p_right, mask=m_depth & m_column, other=0.0)
        b_sum = tl.dot(tl.trans(b_left), b_right, b_sum)
        p_left += DEPTH * left_stride
        p_right += DEPTH * right_stride
    p_out = out + i_group.to(tl.int64) * rows * columns + o_row[:, None] * columns + o_column[None, :]
    tl.store(p_out, (b_sum * scaling).to(out.dtype.element_ty), mask=(o_row < rows)[:, None] & m_column)


def _one_launch(*tensors: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these factors: bf16 on a Hopper GPU or later, in 16-byte pieces."""
    first = tensors[0]
    if not first.is_cuda or torch.version.hip is not None or not hasattr(torch, "_grouped_mm"):
        return False
    if torch.cuda.get_device_capability(first.device) < GROUPED_CAPABILITY:
        return False
    for tensor in tensors:
        strides = tensor.stride()
        contiguous = strides[-1] == 1 or strides[-2] == 1
        rest = [stride for stride, size in zip(strides, tensor.shape) if stride != 1 and size != 1]
        aligned = all(stride * tensor.itemsize % ALIGNMENT_BYTES == 0 for stride in rest)
        if tensor.dtype != torch.bfloat16 or not contiguous or not aligned or tensor.data_ptr() % ALIGNMENT_BYTES:
            return False
    return first.shape[0] > 0


def _by_kernel(backend: dispatch.Backend, *tensors: torch.Tensor) -> bool:
    """Whether the kernels above take these factors: one 16-bit dtype."""
    first = tensors[0]
    if any(tensor.dtype != first.dtype or tensor.dtype not in DTYPES for tensor in tensors):
        return False
    return dispatch.resolve("grouped_gemm", first, backend) == "triton"


def _tile(x: torch.Tensor, *sides: int) -> Tile:
    """The tile for a product of ``x`` whose columns and depth are ``sides``."""
    return LARGE if min(sides) >= THIN and shared_memory(x.device) >= LARGE_SHARED else TILE


def _side(size: int, most: int) -> int:
    return min(max(next_power_of_2(size), LEAST_TILE), most)


def _launch_rows(
    x: torch.Tensor,
    matrices: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, width), (groups, _, columns) = x.shape, matrices.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device) if base is None else base
    tile = _tile(x, width, columns)
    tile_columns = _side(columns, tile.columns)
    if out.numel():
        with on_device(x):
            # Each group may end with a tile that is not full.
            rows_kernel[(rows // tile.rows + groups, cdiv(columns, tile_columns))](
                x=x,
                matrices=matrices,
                ends=ends,
                bias=bias,
                base=base,
                out=out,
                rows=rows,
                width=width,
                columns=columns,
                groups=groups,
                scaling=scaling,
                x_stride=x.stride(0),
                matrix_group=matrices.stride(0),
                matrix_row=matrices.stride(1),
                matrix_column=matrices.stride(2),
                base_stride=0 if base is None else base.stride(0),
                out_stride=out.stride(0),
                GROUPS=next_power_of_2(groups),
                ROWS=tile.rows,
                COLUMNS=tile_columns,
                DEPTH=_side(width, tile.depth),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out


def rows_times(
    x: torch.Tensor,
    matrices: torch.Tensor,
    ends: torch.Tensor,
    *,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``scaling * x[i] @ matrices[g] + base[i] + bias[g]`` for the rows of each group.

    Args:
        x: [M, K].
        matrices: [G, K, N], any strides.
        ends: [G].
        scaling: Factor of the product.
        bias: [G, N], contiguous, or None.
        base: [M, N] with contiguous rows, which receives the result, or None.
        backend: ``"triton"`` for the kernels alone.
    """
    plain = scaling == 1.0 and bias is None and base is None
    if plain and backend == "auto" and _one_launch(x, matrices):
        return torch._grouped_mm(x, matrices, offs=ends)
    if _by_kernel(backend, x, matrices):
        return _launch_rows(x, matrices, ends, scaling, bias, base)
    out = x.new_empty((x.shape[0], matrices.shape[2])) if base is None else base
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            rows = out[start:end]
            torch.addmm(rows, x[start:end], matrices[group], alpha=scaling, beta=0 if base is None else 1, out=rows)
            if bias is not None:
                rows += bias[group]
        start = end
    return out


def columns_times(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
    *,
    scaling: float = 1.0,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``scaling * left[rows of g].T @ right[rows of g]`` in ``dtype``: [G, P, Q] from [M, P] and [M, Q]."""
    groups, shape = ends.shape[0], (left.shape[1], right.shape[1])
    by_kernel = _by_kernel(backend, left, right)
    if backend == "auto" and not (by_kernel and min(shape) < THIN) and _one_launch(left, right):
        product = torch._grouped_mm(left.t(), right, offs=ends)
        return (product if scaling == 1.0 else product.mul_(scaling)).to(dtype)
    if by_kernel:
        left, right = (t if t.stride(1) == 1 else t.contiguous() for t in (left, right))
        out = torch.empty((groups, *shape), dtype=dtype, device=left.device)
        sides = _side(shape[0], TILE.rows), _side(shape[1], TILE.columns)
        if out.numel():
            with on_device(left):
                columns_kernel[(groups, cdiv(shape[0], sides[0]), cdiv(shape[1], sides[1]))](
                    left=left,
                    right=right,
                    ends=ends,
                    out=out,
                    rows=shape[0],
                    columns=shape[1],
                    scaling=scaling,
                    left_stride=left.stride(0),
                    right_stride=right.stride(0),
                    ROWS=sides[0],
                    COLUMNS=sides[1],
                    DEPTH=TILE.depth,
                    num_warps=TILE.num_warps,
                    num_stages=TILE.num_stages,
                )
        return out
    out = left.new_zeros((groups, *shape))
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.addmm(out[group], left[start:end].t(), right[start:end], alpha=scaling, beta=0, out=out[group])
        start = end
    return out.to(dtype)


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    for dtype in ("fp16", "bf16"):
        p = f"*{dtype}"
        common: dict[str, Any] = {"minimum": bfloat16_minimum(dtype), "representative": dtype == "bf16"}
        # Only chips that have the shared memory run it.
        large: dict[str, Any] = {"minimum": 80, "amd": ()}
        sizes = dict.fromkeys(("rows", "width", "columns", "groups", "x_stride", "base_stride", "out_stride"), "i32")
        for form, strides, added in (
            ("plain", {"matrix_row": 1, "matrix_column": "i32"}, ()),
            ("update", {"matrix_row": "i32", "matrix_column": 1}, ("base", "bias")),
        ):
            dynamic = {name: kind for name, kind in strides.items() if isinstance(kind, str)}
            fixed = {name: value for name, value in strides.items() if not isinstance(value, str)}
            for size, tile, options in (("", TILE, common), ("-large", LARGE, large)):
                sides = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
                yield Variant(
                    f"grouped_gemm_rows-{dtype}-{form}{size}",
                    rows_kernel,
                    {"x": p, "matrices": p, "ends": "*i32", "out": p, **dict.fromkeys(added, p), **sizes, **dynamic}
                    | {"matrix_group": "i64", "scaling": "fp32"},
                    {"GROUPS": 128, **sides, **fixed, **{n: None for n in ("base", "bias") if n not in added}},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    **options,
                )
        yield Variant(
            f"grouped_gemm_columns-{dtype}",
            columns_kernel,
            {"left": p, "right": p, "ends": "*i32", "out": "*fp32", "scaling": "fp32"}
            | dict.fromkeys(("rows", "columns", "left_stride", "right_stride"), "i32"),
            {"ROWS": TILE.rows, "COLUMNS": TILE.columns, "DEPTH": TILE.depth},
            num_warps=TILE.num_warps,
            num_stages=TILE.num_stages,
            **common,
        )

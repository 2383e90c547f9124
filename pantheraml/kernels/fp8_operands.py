"""Kernels that prepare factors of fp8 products: gradients with a factor a column, groups, 4-bit weights, and the way
back to 16 bits.

Each reads its input from memory once (the joined rows a second time from cache) and writes fp8 once. The specification
is ``reference/fp8_linear.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .nf4 import block_scales, nested_offset, weight_arguments
from .reference import fp8 as fp8_reference
from .reference import fp8_linear as reference
from .reference.nf4 import Quantized4Bit
from .utils import cdiv, fp8_dtype, next_power_of_2, require_shape

GROUP = 128
# Matrices that one launch of the joined quantisation takes: queries, keys and values.
MAX_PARTS = 3
# Columns of the joined rows a program holds at a time: two 16-byte loads a thread from a 2-byte dtype.
JOINED_BLOCK = 4096
JOINED_WARPS = 8
GROUP_ROWS = 32
GROUP_WARPS = 4
# Tiles (rows, columns) of the conversion from 4 bits. Written as it lies, a tile is wide; transposed, it is square, so
# that both sides move 64 bytes or more in a piece.
FOUR_BIT_TILE = {False: (16, 512), True: (128, 128)}
FOUR_BIT_WARPS = 8
DEQUANTIZE_WARPS = 8


@jit
def _part_max(p_x, p_factor, i_row, width, stride, b_max, BLOCK: tl.constexpr):
    if p_x is not None:
        for start in range(0, width, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            m_column = o_column < width
            b_x = tl.load(p_x + i_row * stride + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_x = b_x * tl.load(p_factor + o_column, mask=m_column, other=0.0)
            b_max = tl.maximum(b_max, tl.abs(b_x))
    return b_max


@jit
def _part_quantize(p_x, p_factor, p_out, i_row, width, stride, inverse, BLOCK: tl.constexpr):
    if p_x is not None:
        for start in range(0, width, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            m_column = o_column < width
            b_x = tl.load(p_x + i_row * stride + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_x = b_x * tl.load(p_factor + o_column, mask=m_column, other=0.0)
            tl.store(p_out + o_column, (b_x * inverse).to(p_out.dtype.element_ty), mask=m_column)


@jit
def fp8_joined_rows_kernel(
    p_x0,
    p_x1,
    p_x2,
    p_factor0,
    p_factor1,
    p_factor2,
    p_values,
    p_scales,
    width0,
    width1,
    width2,
    stride0,
    stride1,
    stride2,
    out_stride,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise one row of up to three matrices side by side, each column times its factor, with one scale."""
    i_row = tl.program_id(0).to(tl.int64)
    b_max = tl.full((BLOCK,), TINY, dtype=tl.float32)
    b_max = _part_max(p_x0, p_factor0, i_row, width0, stride0, b_max, BLOCK)
    b_max = _part_max(p_x1, p_factor1, i_row, width1, stride1, b_max, BLOCK)
    b_max = _part_max(p_x2, p_factor2, i_row, width2, stride2, b_max, BLOCK)
    largest_x = tl.max(b_max, axis=0)
    inverse = tl.div_rn(LARGEST, largest_x)
    tl.store(p_scales + i_row, tl.div_rn(largest_x, LARGEST))
    p_out = p_values + i_row * out_stride
    _part_quantize(p_x0, p_factor0, p_out, i_row, width0, stride0, inverse, BLOCK)
    _part_quantize(p_x1, p_factor1, p_out + width0, i_row, width1, stride1, inverse, BLOCK)
    _part_quantize(p_x2, p_factor2, p_out + width0 + width1, i_row, width2, stride2, inverse, BLOCK)


@jit
def fp8_groups_kernel(
    p_x,
    p_values,
    p_scales,
    rows,
    width,
    stride,
    out_stride,
    scale_stride,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Quantise GROUP columns of ROWS rows, one scale a row."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_group = tl.program_id(1).to(tl.int64)
    o_column = i_group * GROUP + tl.arange(0, GROUP)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_column < width)[None, :]
    b_x = tl.load(p_x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_max = tl.maximum(tl.max(tl.abs(b_x), axis=1), TINY)
    b_largest = tl.full((ROWS,), LARGEST, dtype=tl.float32)
    b_y = b_x * tl.div_rn(b_largest, b_max)[:, None]
    tl.store(p_scales + i_group * scale_stride + o_row, tl.div_rn(b_max, b_largest), mask=m_row)
    p_out = p_values + o_row[:, None] * out_stride + o_column[None, :]
    tl.store(p_out, b_y.to(p_values.dtype.element_ty), mask=m_tile)


@jit
def nf4_to_fp8_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_nested_offset,
    p_row_scales,
    p_out,
    rows,
    width,
    out_stride,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """ROWS rows and GROUPS blocks of 2 * HALF columns from 4 bits to fp8; rows are whole blocks."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_block = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    blocks = width // (2 * HALF)
    m_row = o_row < rows
    m_block = m_row[:, None] & (o_block < blocks)[None, :]
    o_flat = o_row[:, None] * blocks + o_block[None, :]
    b_offset = nested_offset(p_nested_offset)
    b_scale = block_scales(p_absmax, p_nested_absmax, p_nested_code, b_offset, o_flat, m_block, NESTED_BLOCKSIZE)
    b_row_scale = tl.load(p_row_scales + o_row, mask=m_row, other=1.0)
    b_inverse = tl.div_rn(tl.full((ROWS,), 1.0, dtype=tl.float32), b_row_scale)
    b_scale = (b_scale * b_inverse[:, None])[:, :, None]
    o_byte = o_flat[:, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_block[:, :, None], other=0).to(tl.int32)
    b_high = tl.load(p_code + (b_byte >> 4)) * b_scale
    b_low = tl.load(p_code + (b_byte & 15)) * b_scale
    b_out = tl.reshape(tl.interleave(b_high, b_low), (ROWS, GROUPS * 2 * HALF)).to(p_out.dtype.element_ty)
    o_column = tl.program_id(1).to(tl.int64) * (GROUPS * 2 * HALF) + tl.arange(0, GROUPS * 2 * HALF)
    m_tile = m_row[:, None] & (o_column < width)[None, :]
    if TRANSPOSED:
        tl.store(p_out + o_column[:, None] * out_stride + o_row[None, :], tl.trans(b_out), mask=tl.trans(m_tile))
    else:
        tl.store(p_out + o_row[:, None] * out_stride + o_column[None, :], b_out, mask=m_tile)


@jit
def fp8_dequantize_kernel(
    p_values, p_scales, p_out, rows, width, stride, out_stride, TILE: tl.constexpr, BY_ROW: tl.constexpr
):
    """One TILE x TILE tile from fp8 to a wider dtype."""
    i_row = tl.program_id(0).to(tl.int64)
    i_column = tl.program_id(1).to(tl.int64)
    o_row = i_row * TILE + tl.arange(0, TILE)
    o_column = i_column * TILE + tl.arange(0, TILE)
    m_tile = (o_row < rows)[:, None] & (o_column < width)[None, :]
    b_x = tl.load(p_values + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if BY_ROW:
        b_x = b_x * tl.load(p_scales + o_row, mask=o_row < rows, other=0.0)[:, None]
    else:
        b_x = b_x * tl.load(p_scales + i_row * tl.num_programs(1) + i_column)
    tl.store(p_out + o_row[:, None] * out_stride + o_column[None, :], b_x.to(p_out.dtype.element_ty), mask=m_tile)


def quantize_joined_rows(
    parts: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], *, backend: dispatch.Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the columns of up to three matrices by factors, put them side by side and quantise the rows.

    Args:
        parts: [T, O_i] each, of one dtype.
        factors: [O_i] each, float32.
        backend: See ``dispatch.resolve``.

    Returns:
        Values [T, sum of O_i] fp8 and scales [T, 1] float32. Bitwise deterministic.

    Raises:
        ConfigError: No matrix, or more than three.
    """
    where = "quantize_joined_rows"
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ConfigError(f"{where} takes one to {MAX_PARTS} matrices and got {len(parts)}", where=where)
    first = parts[0]
    dtype = fp8_dtype(first.device)
    if dispatch.resolve(where, first, backend, fp8=True) == "reference":
        return reference.joined_rows(parts, factors, dtype)
    rows, total = first.shape[0], sum(part.shape[1] for part in parts)
    values = torch.empty((rows, total), dtype=dtype, device=first.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=first.device)
    if rows == 0:
        return values, scales
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    filled = {}
    for i in range(MAX_PARTS):
        given = i < len(parts)
        filled |= {
            f"p_x{i}": parts[i] if given else None,
            f"p_factor{i}": factors[i] if given else None,
            f"width{i}": parts[i].shape[1] if given else 0,
            f"stride{i}": parts[i].stride(0) if given else 0,
        }
    with on_device(first):
        fp8_joined_rows_kernel[(rows,)](
            **filled,
            p_values=values,
            p_scales=scales,
            out_stride=total,
            TINY=reference.TINY,
            LARGEST=torch.finfo(dtype).max,
            BLOCK=min(JOINED_BLOCK, next_power_of_2(max(part.shape[1] for part in parts))),
            num_warps=JOINED_WARPS,
        )
    return values, scales


def quantize_groups(
    parts: Sequence[torch.Tensor], *, rows: int | None = None, backend: dispatch.Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put matrices side by side and quantise each 128 elements of a row with a scale of their own.

    Args:
        parts: [T, I_i] each, of one dtype; all but the last of whole groups.
        rows: Rows to give the result, at least T; the rest are zeros. Default None: T.
        backend: See ``dispatch.resolve``.

    Returns:
        Values [rows, sum of I_i] fp8 and scales [groups, rows] float32. Bitwise deterministic.
    """
    first = parts[0]
    dtype = fp8_dtype(first.device)
    count = first.shape[0]
    rows = count if rows is None else rows
    total = sum(part.shape[1] for part in parts)
    if dispatch.resolve("quantize_groups", first, backend, fp8=True) == "reference":
        joined = torch.cat(list(parts), dim=1)
        return reference.groups(torch.nn.functional.pad(joined, (0, 0, 0, rows - count)), dtype, GROUP)
    values = torch.empty((rows, total), dtype=dtype, device=first.device)
    scales = torch.empty((cdiv(total, GROUP), rows), dtype=torch.float32, device=first.device)
    if rows > count:
        values[count:].view(torch.uint8).zero_()
        scales[:, count:].fill_(1.0)
    start = 0
    for part in parts:
        part = part if part.stride(1) == 1 else part.contiguous()
        width = part.shape[1]
        if count:
            with on_device(first):
                fp8_groups_kernel[(cdiv(count, GROUP_ROWS), cdiv(width, GROUP))](
                    p_x=part,
                    p_values=values[:, start:],
                    p_scales=scales[start // GROUP :],
                    rows=count,
                    width=width,
                    stride=part.stride(0),
                    out_stride=total,
                    scale_stride=rows,
                    TINY=reference.TINY,
                    LARGEST=torch.finfo(dtype).max,
                    ROWS=GROUP_ROWS,
                    GROUP=GROUP,
                    num_warps=GROUP_WARPS,
                )
        start += width
    return values, scales


def nf4_to_fp8(
    quantized: Quantized4Bit,
    row_scales: torch.Tensor,
    *,
    transposed: bool = False,
    out: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Turn a 4-bit weight into fp8 values under given row scales: ``weight ≈ values * row_scales``.

    Args:
        quantized: [O, I]; I is whole blocks.
        row_scales: [O, 1] float32, at least the largest magnitude of each row over the largest fp8.
        transposed: Write [I, O]. Default False.
        out: Buffer to fill, whose rows may be apart. Default None: allocated.
        backend: See ``dispatch.resolve``.

    Returns:
        [O, I], or [I, O], fp8. Bitwise deterministic.

    Raises:
        UnsupportedError: Rows are not whole blocks.
    """
    where = "nf4_to_fp8"
    rows, width = quantized.shape
    if width % quantized.blocksize:
        raise UnsupportedError(
            f"rows of {width} elements are not whole blocks of {quantized.blocksize}",
            where=where,
            hint="use nf4_dequantize",
        )
    shape = (width, rows) if transposed else (rows, width)
    if out is None:
        out = torch.empty(shape, dtype=fp8_dtype(quantized.device), device=quantized.device)
    require_shape(where, "out", out, shape)
    if dispatch.resolve(where, out, backend, fp8=True) == "reference":
        values = reference.nf4_to_fp8(quantized, row_scales, out.dtype)
        return out.copy_(values.t() if transposed else values)
    if out.numel() == 0:
        return out
    tile_rows, tile_columns = FOUR_BIT_TILE[transposed]
    blocks = max(1, min(tile_columns // quantized.blocksize, next_power_of_2(width // quantized.blocksize)))
    tile_rows = max(1, min(tile_rows, tile_rows * tile_columns // (blocks * quantized.blocksize)))
    with on_device(out):
        nf4_to_fp8_kernel[(cdiv(rows, tile_rows), cdiv(width, blocks * quantized.blocksize))](
            **weight_arguments(quantized),
            p_row_scales=row_scales,
            p_out=out,
            rows=rows,
            width=width,
            out_stride=out.stride(0),
            ROWS=tile_rows,
            GROUPS=blocks,
            HALF=quantized.blocksize // 2,
            TRANSPOSED=transposed,
            num_warps=FOUR_BIT_WARPS,
        )
    return out


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """The numbers of a matrix quantised by row or by 128 x 128 tile, multiplied in float32 and rounded once.

    Args:
        values: [O, I] fp8.
        scales: [O, 1] or [ceil(O / 128), ceil(I / 128)], float32.
        dtype: Dtype of the result.
        backend: See ``dispatch.resolve``.

    Returns:
        [O, I] in ``dtype``.
    """
    rows, width = values.shape
    by_row = scales.shape == (rows, 1)
    if dispatch.resolve("fp8_dequantize", values, backend, fp8=True) == "reference" or dtype == torch.float64:
        convert = fp8_reference.dequantize_rows if by_row else fp8_reference.dequantize_blocks
        return convert(values, scales, dtype)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if out.numel():
        with on_device(values):
            fp8_dequantize_kernel[(cdiv(rows, GROUP), cdiv(width, GROUP))](
                p_values=values,
                p_scales=scales,
                p_out=out,
                rows=rows,
                width=width,
                stride=values.stride(0),
                out_stride=width,
                TILE=GROUP,
                BY_ROW=by_row,
                num_warps=DEQUANTIZE_WARPS,
            )
    return out


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    sizes = {"rows": "i32", "width": "i32"}
    for fp8, least, amd, largest in (("fp8e4nv", 89, (), 448.0), ("fp8e4b8", None, ("gfx942",), 240.0)):
        limits = {"TINY": reference.TINY, "LARGEST": largest}
        for dtype in ("fp16", "bf16"):
            common = {"minimum": least and max(least, bfloat16_minimum(dtype)), "amd": amd}
            representative = dtype == "bf16"
            for parts in (1, 2, 3):
                given, left_out = range(parts), range(parts, MAX_PARTS)
                yield Variant(
                    f"fp8_joined_rows-{parts}-{dtype}-{fp8}",
                    fp8_joined_rows_kernel,
                    {
                        **{f"p_x{i}": f"*{dtype}" for i in given},
                        **{f"p_factor{i}": "*fp32" for i in given},
                        **{f"width{i}": "i32" for i in range(MAX_PARTS)},
                        **{f"stride{i}": "i64" for i in range(MAX_PARTS)},
                        "p_values": f"*{fp8}",
                        "p_scales": "*fp32",
                        "out_stride": "i64",
                    },
                    {**{f"{name}{i}": None for i in left_out for name in ("p_x", "p_factor")}, **limits}
                    | {"BLOCK": JOINED_BLOCK},
                    num_warps=JOINED_WARPS,
                    representative=representative and parts == MAX_PARTS,
                    **common,
                )
            yield Variant(
                f"fp8_groups-{dtype}-{fp8}",
                fp8_groups_kernel,
                {"p_x": f"*{dtype}", "p_values": f"*{fp8}", "p_scales": "*fp32", **sizes}
                | dict.fromkeys(("stride", "out_stride", "scale_stride"), "i64"),
                {**limits, "ROWS": GROUP_ROWS, "GROUP": GROUP},
                num_warps=GROUP_WARPS,
                representative=representative,
                **common,
            )
            for by_row in (True, False):
                yield Variant(
                    f"fp8_dequantize-{'rows' if by_row else 'tiles'}-{dtype}-{fp8}",
                    fp8_dequantize_kernel,
                    {"p_values": f"*{fp8}", "p_scales": "*fp32", "p_out": f"*{dtype}", **sizes}
                    | dict.fromkeys(("stride", "out_stride"), "i64"),
                    {"TILE": GROUP, "BY_ROW": by_row},
                    num_warps=DEQUANTIZE_WARPS,
                    representative=representative and by_row,
                    **common,
                )
        for transposed, (tile_rows, tile_columns) in FOUR_BIT_TILE.items():
            yield Variant(
                f"nf4_to_fp8-{'transposed' if transposed else 'plain'}-{fp8}",
                nf4_to_fp8_kernel,
                {
                    **dict.fromkeys(("p_packed", "p_absmax"), "*u8"),
                    **dict.fromkeys(("p_code", "p_nested_absmax", "p_nested_code", "p_nested_offset"), "*fp32"),
                    "p_row_scales": "*fp32",
                    "p_out": f"*{fp8}",
                    "out_stride": "i64",
                    **sizes,
                },
                {
                    "NESTED_BLOCKSIZE": 256,
                    "ROWS": tile_rows,
                    "GROUPS": tile_columns // 64,
                    "HALF": 32,
                    "TRANSPOSED": transposed,
                },
                num_warps=FOUR_BIT_WARPS,
                minimum=least,
                amd=amd,
                representative=True,
            )

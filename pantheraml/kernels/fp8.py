"""fp8 matrices: quantisation by row and by 128 x 128 tile, transposed copies, and products of row-wise scaled matrices.

fp8 matrix units contract along the contiguous dimension of both factors, so a weight ``W`` [O, I] that serves
``y = x @ W.T`` must be laid out the other way round for ``dx = dy @ W``. Transposing the bytes moves half of what
quantising again would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..device import get_device
from ..errors import ArgumentError, ConfigError, UnsupportedError
from . import dispatch
from ._row_pieces import Pieces, columns_of, mask_of, row_pieces
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference import fp8 as reference
from .utils import LANES, cdiv, fp8_dtype, launch_settings, require_floating, require_shape, single_stride

BLOCK = 128
# Share of the copy bandwidth on an H100 at 8,192 x 4,096 from bf16: 16 warps 84 %, 8 warps 75 %, 4 warps 72 %.
BLOCK_WARPS = 16
# The same at 14,336 x 4,096 bytes: tiles of 128 with 8 warps 91 %, of 64 84 %, of 32 77 %.
TRANSPOSE_TILE = 128
TRANSPOSE_WARPS = 8
# Elements of a row that a thread holds: as float32 they leave room in its 255 registers, and fewer warps a row mean
# fewer barriers. Widths between powers of two had 38 to 54 % of the copy bandwidth with one masked piece.
ROW_ELEMENTS = 96
# Matrix units take fp8 factors whose contracted and output widths are whole groups of 16.
MATMUL_MULTIPLE = 16


class Fp8Matrix(NamedTuple):
    """A quantised matrix.

    Attributes:
        values: [..., D] (rows) or [M, N] (tiles), fp8.
        scales: [..., 1] (rows) or [ceil(M / 128), ceil(N / 128)] (tiles), float32: number = value * scale.
        transposed: [N, M] contiguous copy of the values, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor
    transposed: torch.Tensor | None = None


@jit
def _quantized(x, scale, LARGEST: tl.constexpr):
    """``x / scale`` within what the fp8 dtype holds."""
    y = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return tl.minimum(tl.maximum(y, -LARGEST), LARGEST)


@jit
def fp8_rows_kernel(
    p_x,
    p_values,
    p_scales,
    rows,
    width,
    stride,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    FULL_N: tl.constexpr,
    FULL_M: tl.constexpr,
):
    """Quantise ROWS rows, each with its own scale; the pieces are told in ``_row_pieces``."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_x = (o_row * stride)[None, :, None]
    o_out = (o_row * width)[None, :, None]
    c_0 = columns_of(0, N, P)
    m_0 = mask_of(m_row, c_0, width, FULL_N)
    x_0 = tl.load(p_x + (o_x + c_0), mask=m_0, other=0.0, eviction_policy="evict_first").to(tl.float32)
    largest = tl.max(tl.abs(x_0), axis=0, keep_dims=True)
    c_1, m_1, x_1 = c_0, m_0, x_0
    if M > 0:
        c_1 = columns_of(N * P, M, P)
        m_1 = mask_of(m_row, c_1, width, FULL_M)
        x_1 = tl.load(p_x + (o_x + c_1), mask=m_1, other=0.0, eviction_policy="evict_first").to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x_1), axis=0, keep_dims=True))
    largest = tl.max(largest, axis=2, keep_dims=True)
    scale = tl.where(largest > 0.0, tl.div_rn(largest, LARGEST), 1.0)
    tl.store(p_scales + o_row[None, :, None], scale, mask=m_row[None, :, None])
    tl.store(p_values + (o_out + c_0), _quantized(x_0, scale, LARGEST).to(p_values.dtype.element_ty), mask=m_0)
    if M > 0:
        tl.store(p_values + (o_out + c_1), _quantized(x_1, scale, LARGEST).to(p_values.dtype.element_ty), mask=m_1)


@jit
def fp8_tiles_kernel(p_x, p_values, p_scales, rows, width, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise one BLOCK x BLOCK tile."""
    i_row = tl.program_id(0).to(tl.int64)
    i_column = tl.program_id(1).to(tl.int64)
    o_row = i_row * BLOCK + tl.arange(0, BLOCK)
    o_column = i_column * BLOCK + tl.arange(0, BLOCK)
    m_tile = (o_row < rows)[:, None] & (o_column < width)[None, :]
    b_x = tl.load(p_x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    largest_x = tl.max(tl.max(tl.abs(b_x), axis=1), axis=0)
    scale = tl.where(largest_x > 0.0, tl.div_rn(largest_x, LARGEST), 1.0)
    b_y = _quantized(b_x, scale, LARGEST).to(p_values.dtype.element_ty)
    tl.store(p_scales + i_row * tl.num_programs(1) + i_column, scale)
    tl.store(p_values + o_row[:, None] * width + o_column[None, :], b_y, mask=m_tile)


@jit
def transpose_bytes_kernel(p_x, p_out, rows, width, stride, out_stride, TILE: tl.constexpr):
    """``out[j, i] = x[i, j]`` for one TILE x TILE tile of single bytes."""
    o_row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    o_column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    m_tile = (o_row < rows)[:, None] & (o_column < width)[None, :]
    b_x = tl.load(p_x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0)
    tl.store(p_out + o_column[:, None] * out_stride + o_row[None, :], tl.trans(b_x), mask=tl.trans(m_tile))


def _pieces(width: int, *, lanes: int = LANES) -> Pieces:
    """How rows are cut; those of a power of two are one piece."""
    whole = launch_settings(width, where="fp8_quantize_rows", lanes=lanes)
    if whole.block == width:
        return Pieces(1, 0, width, whole.rows, whole.num_warps, (True, True))
    return row_pieces(width, lanes=lanes, elements=ROW_ELEMENTS, adjacent=16)


def _quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return values, scales.fill_(1.0)
    pieces = _pieces(width)
    x, rows, stride = single_stride(x)
    with on_device(x):
        fp8_rows_kernel[(cdiv(rows, pieces.rows),)](
            p_x=x,
            p_values=values,
            p_scales=scales,
            rows=rows,
            width=width,
            stride=stride,
            LARGEST=torch.finfo(dtype).max,
            num_warps=pieces.num_warps,
            **pieces.constants,
        )
    return values, scales


def _quantize_tiles(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    grid = (cdiv(rows, BLOCK), cdiv(width, BLOCK))
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(grid, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            fp8_tiles_kernel[grid](
                p_x=x,
                p_values=values,
                p_scales=scales,
                rows=rows,
                width=width,
                stride=x.stride(0),
                LARGEST=torch.finfo(dtype).max,
                BLOCK=BLOCK,
                num_warps=BLOCK_WARPS,
            )
    return values, scales


def _transpose(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    if x.numel():
        with on_device(x):
            transpose_bytes_kernel[(cdiv(rows, TRANSPOSE_TILE), cdiv(width, TRANSPOSE_TILE))](
                p_x=x.view(torch.uint8),
                p_out=out.view(torch.uint8),
                rows=rows,
                width=width,
                stride=x.stride(0),
                out_stride=out.stride(0),
                TILE=TRANSPOSE_TILE,
                num_warps=TRANSPOSE_WARPS,
            )
    return out


def _require_matrix(op: str, x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ConfigError(f"{op} needs a matrix and got shape {list(x.shape)}", where=op)


def fp8_quantize_rows(
    x: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
    backend: dispatch.Backend = "auto",
) -> Fp8Matrix:
    """Quantise each row of the last dimension with its own scale, ``max|row| / largest fp8`` (1 for a row of zeros).

    Computed in float32 and rounded to the nearest fp8 once. Bitwise deterministic. No gradient.

    Args:
        x: [..., D], at least 16 bits.
        dtype: fp8 dtype. Default None: the three-mantissa-bit one of the device.
        transposed: Also return the values of a matrix [M, D] as [D, M]. Default False.
        backend: See ``dispatch.resolve``.

    Returns:
        ``Fp8Matrix(values [..., D], scales [..., 1] float32, transposed)``.

    Raises:
        ConfigError: ``transposed`` with more than two dimensions.
        ArgumentError: ``x`` is not of a floating-point dtype of at least 16 bits.
    """
    op = "fp8_quantize_rows"
    require_floating(op, x=x)
    if transposed:
        _require_matrix(op, x)
    x, dtype = x.detach(), dtype or fp8_dtype(x.device)
    chosen = dispatch.resolve(op, x, backend, fp8=True)
    if chosen == "reference":
        values, scales = reference.quantize_rows(x if x.dtype == torch.float64 else x.float(), dtype)
    else:
        values, scales = _quantize_rows(x, dtype)
    return Fp8Matrix(values, scales, fp8_transpose(values, backend=chosen) if transposed else None)


def fp8_quantize_blocks(
    x: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
    backend: dispatch.Backend = "auto",
) -> Fp8Matrix:
    """Quantise a matrix with one scale a 128 x 128 tile.

    DeepSeek-V3 (https://arxiv.org/abs/2412.19437) stores its weights so. Computed in float32 and
    rounded to the nearest fp8 once. Bitwise deterministic. No gradient.

    Args:
        x: [M, N], at least 16 bits.
        dtype: fp8 dtype. Default None: the three-mantissa-bit one of the device.
        transposed: Also return the values as [N, M]. Default False.
        backend: See ``dispatch.resolve``.

    Returns:
        ``Fp8Matrix(values [M, N], scales [ceil(M / 128), ceil(N / 128)] float32, transposed)``.

    Raises:
        ConfigError: ``x`` is no matrix.
        ArgumentError: ``x`` is not of a floating-point dtype of at least 16 bits.
    """
    op = "fp8_quantize_blocks"
    require_floating(op, x=x)
    _require_matrix(op, x)
    x, dtype = x.detach(), dtype or fp8_dtype(x.device)
    chosen = dispatch.resolve(op, x, backend, fp8=True)
    if chosen == "reference":
        values, scales = reference.quantize_blocks(x, dtype, BLOCK)
    else:
        values, scales = _quantize_tiles(x, dtype)
    return Fp8Matrix(values, scales, fp8_transpose(values, backend=chosen) if transposed else None)


def fp8_transpose(
    x: torch.Tensor, *, out: torch.Tensor | None = None, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """Transpose of a matrix of a one-byte dtype, written out. Deterministic: bytes are moved and nothing is computed.

    Args:
        x: [M, N], any one-byte dtype.
        out: Buffer [N, M] of the same dtype to fill; its rows may be apart. Default None: allocated, contiguous.
        backend: See ``dispatch.resolve``.

    Returns:
        [N, M]: ``out`` when given.

    Raises:
        ConfigError: ``x`` is no matrix, or ``out`` does not fit.
        ArgumentError: Its elements are not single bytes.
    """
    op = "fp8_transpose"
    _require_matrix(op, x)
    if x.dtype.itemsize != 1:
        raise ArgumentError(f"{op} moves single bytes and got {x.dtype}", where=op)
    shape = (x.shape[1], x.shape[0])
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    require_shape(op, "out", out, shape)
    if out.dtype != x.dtype or out.device != x.device or (out.numel() and out.stride(1) != 1):
        raise ConfigError(f"out is {out.dtype} on {out.device} with strides {out.stride()}", where=op)
    return out.copy_(x.t()) if dispatch.resolve(op, x, backend) == "reference" else _transpose(x, out)


def fp8_dequantize(
    matrix: Fp8Matrix, dtype: torch.dtype, *, block: int | None = None, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """The numbers of a quantised matrix, ``values * scales`` in float32, rounded once, by eager torch on every device.

    Deterministic.

    Args:
        matrix: [..., D], from ``fp8_quantize_rows`` or ``fp8_quantize_blocks``.
        dtype: Dtype of the result.
        block: Edge of a tile when the scales belong to tiles. Default None: row-wise.
        backend: ``"auto"`` or ``"reference"``; there is no kernel.

    Returns:
        [..., D] in ``dtype``.

    Raises:
        UnsupportedError: ``backend="triton"``.
    """
    if backend == "triton":
        raise UnsupportedError("fp8_dequantize has no Triton kernel", where="backend", hint="use backend='auto'")
    if block is None:
        return reference.dequantize_rows(matrix.values, matrix.scales, dtype)
    return reference.dequantize_blocks(matrix.values, matrix.scales, dtype, block)


def fp8_matmul(
    x: Fp8Matrix,
    weight: Fp8Matrix,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = True,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``x @ weight.T + bias`` of two row-wise scaled fp8 matrices by the matrix units.

    Through ``torch._scaled_mm``, which adds in float32 or what ``fast_accumulation`` allows. Deterministic on one kind
    of GPU with one cuBLAS. No gradient.

    Args:
        x: Values [..., I], scales [..., 1].
        weight: Values [O, I], scales [O, 1]. I and O are multiples of 16.
        bias: [O] or None (default).
        out_dtype: Dtype of the result. Default bfloat16, the only one that row-wise scales take in the matrix units.
        fast_accumulation: Let the matrix unit add in its own, slightly narrower, registers. Default True.
        backend: ``"auto"`` and ``"triton"`` mean the matrix units; ``"reference"`` computes in float32 on any device.

    Returns:
        [..., O] in ``out_dtype``.

    Raises:
        ConfigError: Shapes or scales do not fit.
        UnsupportedError: The device has no fp8 matrix units, or they cannot take these widths or this dtype.
    """
    op = "fp8_matmul"
    _require_matrix(op, weight.values)
    width, out = x.values.shape[-1], weight.values.shape[0]
    if weight.values.shape[1] != width:
        raise ConfigError(f"x {list(x.values.shape)} and weight {list(weight.values.shape)} do not fit", where=op)
    if x.scales.shape != (*x.values.shape[:-1], 1) or weight.scales.shape != (out, 1):
        raise ConfigError("the scales must be row-wise", where=op, hint="use fp8_quantize_rows")
    values, scales = x.values.reshape(-1, width), x.scales.reshape(-1, 1)
    if backend == "reference":
        y = reference.matmul(values, scales, weight.values, weight.scales, bias, out_dtype)
        return y.view(*x.values.shape[:-1], out)
    reason = _matmul_obstacle(values, out, out_dtype)
    if reason is not None:
        raise UnsupportedError(f"{op} cannot run here", where=op, why=reason, hint="use backend='reference'")
    y = torch._scaled_mm(
        values,
        weight.values.t(),
        scale_a=scales,
        scale_b=weight.scales.t(),
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulation,
    )
    return y.view(*x.values.shape[:-1], out)


def _matmul_obstacle(values: torch.Tensor, out: int, out_dtype: torch.dtype) -> str | None:
    """Why the matrix units cannot take the product, or None."""
    if values.device.type != "cuda" or not get_device().float8:
        return f"{values.device} has no fp8 matrix units (compute capability 8.9 or later has)"
    if values.shape[1] % MATMUL_MULTIPLE or out % MATMUL_MULTIPLE:
        return f"widths {values.shape[1]} and {out} are not multiples of {MATMUL_MULTIPLE}"
    if out_dtype != torch.bfloat16:
        return f"row-wise scaled products give bfloat16, not {out_dtype}"
    return None


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    sizes = {"rows": "i32", "width": "i32", "stride": "i64"}
    for fp8, least, amd, largest in (("fp8e4nv", 89, (), 448.0), ("fp8e4b8", None, ("gfx942",), 240.0)):
        for dtype in ("fp16", "bf16"):
            common = {"minimum": least and max(least, bfloat16_minimum(dtype)), "amd": amd}
            pointers = {"p_x": f"*{dtype}", "p_values": f"*{fp8}", "p_scales": "*fp32", **sizes}
            for width in (256, 2560, 4096):
                pieces = _pieces(width, lanes=64 if amd else LANES)
                yield Variant(
                    f"fp8_rows-{width}-{dtype}-{fp8}",
                    fp8_rows_kernel,
                    pointers,
                    {"LARGEST": largest, **pieces.constants},
                    num_warps=pieces.num_warps,
                    representative=width == 2560 and dtype == "bf16",
                    **common,
                )
            yield Variant(
                f"fp8_tiles-{dtype}-{fp8}",
                fp8_tiles_kernel,
                pointers,
                {"LARGEST": largest, "BLOCK": BLOCK},
                num_warps=BLOCK_WARPS,
                representative=dtype == "bf16",
                **common,
            )
    yield Variant(
        "fp8_transpose",
        transpose_bytes_kernel,
        {"p_x": "*u8", "p_out": "*u8", **sizes, "out_stride": "i64"},
        {"TILE": TRANSPOSE_TILE},
        num_warps=TRANSPOSE_WARPS,
        representative=True,
    )

"""Product of a few vectors with an nf4 or fp4 weight in the layout of bitsandbytes, which is read as it is stored.

For x [vectors, in_features] and a weight [out_features, in_features] whose element ``i`` is ``code[nibble_i] *
scale[i // blocksize]``::

    y[j, r] = sum over pieces of a row (scale[piece] * sum over the piece (code[nibble] * x[j, k]))

One or two vectors take ``few_kernel``: products and sums in float32 of codes in float32. More, of 16 bits, take
``many_kernel`` on the matrix units: codes rounded to the dtype of x, sums and scales in float32, so a weight is rounded
once, as a dequantised one is. A program sums whole rows in an order fixed by the sizes: the same bits in every run on
the same chip.

In a sweep of such forms on an H100, a layer of an 8B model (seven products, nested scales of blocks of 64) took 124,
184, 250 and 253 us for 1, 2, 4 and 8 vectors, and 300 to 400 for 16; dequantised and multiplied by torch 420 us.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._triton import AVAILABLE, jit, on_device, tl, triton
from ._variants import Variant, bfloat16_minimum
from .nf4 import block_scales, nested_offset, nf4_dequantize, weight_arguments, weight_variant
from .reference.nf4 import Quantized4Bit
from .utils import LANES, cdiv, processors

__all__ = ["nf4_matvec", "serves"]

# Beyond that many vectors writing the weight out once for torch's product takes less time.
MAX_VECTORS = 16
# The same of vectors in float32, which the matrix units do not take, and of weights in blocks too short for them.
MAX_FEW_VECTORS = 4
# Words of 16 bits, four elements, that a thread of few_kernel takes of each of its rows at a time: a load of 16 bytes.
WORDS = 8
PIECE = 4 * WORDS
# Warps an SM that few_kernel should have at two rows a program: of a weight with few rows, several share the columns.
FEW_WARPS = 16
# Columns that many_kernel contracts between two scales. Planes of 16 elements, the least that matrix units contract.
CHUNK = 64
# Its rows and warps a program for up to 8 vectors and for more; each warp has columns of its own.
MANY = {8: (16, 8), 16: (32, 4)}
# AMD's matrix units emit no less than 16 columns, and Triton took no less before 3.6.
LEAST_COLUMNS = (
    16
    if torch.version.hip is not None or (AVAILABLE and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6))
    else 8
)


@jit
def _plane(b_words, j: tl.constexpr, DTYPE: tl.constexpr):
    """Value ``j`` of 16 bits in each word."""
    return (b_words >> (16 * j)).to(tl.int16).to(DTYPE, bitcast=True)


@jit
def _look(b_table, b_index):
    """Entries of a table; by shuffles, or through shared memory where it is longer than a warp."""
    return tl.reshape(tl.gather(b_table, tl.reshape(b_index, (b_index.numel,)), 0), b_index.shape)


@jit
def _products(b_0, b_1, b_2, b_3, b_scale, p_x, o_word, m_piece):
    """[ROWS, PIECES]: scaled sums of one vector's products over each piece."""
    if p_x.dtype.element_ty.primitive_bitwidth == 16:
        DTYPE: tl.constexpr = p_x.dtype.element_ty
        b_x = tl.load(p_x.to(tl.pointer_type(tl.int64), bitcast=True) + o_word, mask=m_piece, other=0)
        b_product = b_0 * _plane(b_x, 0, DTYPE).to(tl.float32)[None, :, :]
        b_product += b_1 * _plane(b_x, 1, DTYPE).to(tl.float32)[None, :, :]
        b_product += b_2 * _plane(b_x, 2, DTYPE).to(tl.float32)[None, :, :]
        b_product += b_3 * _plane(b_x, 3, DTYPE).to(tl.float32)[None, :, :]
    else:
        p_element = p_x + o_word * 4
        b_product = b_0 * tl.load(p_element, mask=m_piece, other=0.0)[None, :, :]
        b_product += b_1 * tl.load(p_element + 1, mask=m_piece, other=0.0)[None, :, :]
        b_product += b_2 * tl.load(p_element + 2, mask=m_piece, other=0.0)[None, :, :]
        b_product += b_3 * tl.load(p_element + 3, mask=m_piece, other=0.0)[None, :, :]
    return tl.sum(b_product, 2) * b_scale


@jit(do_not_specialize=["vectors"])
def few_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_nested_offset,
    p_x,
    p_out,
    vectors,
    rows,
    pieces,
    x_stride,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ROWS rows with one or two vectors; a thread holds a piece of each row, and 2 ** BLOCK_SHIFT pieces are a block.

    x_stride counts words of four elements.
    """
    p_words = p_packed.to(tl.pointer_type(tl.int16), bitcast=True)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_vector = tl.program_id(1).to(tl.int64) * VECTORS
    m_row = o_row < rows
    o_lane = tl.arange(0, WORDS)
    b_code = tl.load(p_code + tl.arange(0, 16))
    b_offset = nested_offset(p_nested_offset)
    b_first = tl.zeros((ROWS, PIECES), tl.float32)
    b_second = tl.zeros((ROWS, PIECES), tl.float32)
    for start in range(0, pieces, PIECES):
        o_piece = start + tl.arange(0, PIECES)
        m_column = o_piece < pieces
        m_piece = m_row[:, None] & m_column[None, :]
        o_flat = o_row[:, None] * pieces + o_piece[None, :]
        # Read once by the whole grid: such lines leave the cache before those of the vectors.
        b_word = tl.load(
            p_words + (o_flat * WORDS)[:, :, None] + o_lane[None, None, :],
            mask=m_piece[:, :, None],
            other=0,
            eviction_policy="evict_first",
        ).to(tl.int32)
        b_scale = block_scales(
            p_absmax, p_nested_absmax, p_nested_code, b_offset, o_flat >> BLOCK_SHIFT, m_piece, NESTED_BLOCKSIZE
        )
        # The first element of a byte is in its high half.
        b_0 = _look(b_code, (b_word >> 4) & 15)
        b_1 = _look(b_code, b_word & 15)
        b_2 = _look(b_code, (b_word >> 12) & 15)
        b_3 = _look(b_code, (b_word >> 8) & 15)
        o_word = (o_piece * WORDS)[:, None] + o_lane[None, :]
        p_first = p_x + i_vector * x_stride * 4
        b_first += _products(b_0, b_1, b_2, b_3, b_scale, p_first, o_word, m_column[:, None])
        if VECTORS == 2:
            m_second = m_column[:, None] & (i_vector + 1 < vectors)
            b_second += _products(b_0, b_1, b_2, b_3, b_scale, p_first + x_stride * 4, o_word, m_second)
    p_row = p_out + i_vector * rows + o_row
    tl.store(p_row, tl.sum(b_first, 1).to(p_out.dtype.element_ty), mask=m_row)
    if VECTORS == 2:
        tl.store(
            p_row + rows,
            tl.sum(b_second, 1).to(p_out.dtype.element_ty),
            mask=m_row & (i_vector + 1 < vectors),
        )


@jit(do_not_specialize=["vectors"])
def many_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_nested_offset,
    p_x,
    p_out,
    vectors,
    rows,
    chunks,
    x_stride,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    QUADS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows with up to COLUMNS vectors; PARTS warps, each with every PARTS-th four chunks of the columns.

    A chunk is 16 words of four elements, and 2 ** BLOCK_SHIFT chunks are a block. Vectors are read in the same words,
    so nothing is interleaved: plane j of the chunk multiplies plane j of the vectors. QUADS: each chunk is a block of
    nested scales, four neighbouring ones in an aligned word and under one outer scale. x_stride counts words.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    p_words = p_packed.to(tl.pointer_type(tl.int16), bitcast=True)
    p_vectors = p_x.to(tl.pointer_type(tl.int64), bitcast=True)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_word = tl.arange(0, 16)
    o_vector = tl.arange(0, COLUMNS)
    m_vector = o_vector < vectors
    # The two values of a byte in one word, for each byte.
    o_byte = tl.arange(0, 256)
    b_high = tl.load(p_code + (o_byte >> 4)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    b_low = tl.load(p_code + (o_byte & 15)).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    b_pair = (b_high & 0xFFFF) | (b_low << 16)
    b_offset = nested_offset(p_nested_offset)
    b_sum = tl.zeros((PARTS, ROWS, COLUMNS), tl.float32)
    for start in range(0, chunks, 4 * PARTS):
        o_first = start + 4 * tl.arange(0, PARTS)
        o_flat = o_row[None, :] * chunks + o_first[:, None]
        if QUADS:
            m_quad = (o_first < chunks)[:, None] & m_row[None, :]
            p_quad = p_absmax.to(tl.pointer_type(tl.int32), bitcast=True) + (o_flat >> 2)
            b_quad = tl.load(p_quad, mask=m_quad, other=0)
            b_outer = tl.load(p_nested_absmax + o_flat // NESTED_BLOCKSIZE, mask=m_quad, other=0.0)
        else:
            b_quad, b_outer = 0, 0.0
        for u in tl.static_range(4):
            m_column = o_first + u < chunks
            m_chunk = m_column[:, None] & m_row[None, :]
            if QUADS:
                b_scale = tl.load(p_nested_code + ((b_quad >> (8 * u)) & 255)) * b_outer + b_offset
            else:
                o_block = (o_flat + u) >> BLOCK_SHIFT
                b_scale = block_scales(
                    p_absmax, p_nested_absmax, p_nested_code, b_offset, o_block, m_chunk, NESTED_BLOCKSIZE
                )
            b_word = tl.load(
                p_words + ((o_flat + u) * 16)[:, :, None] + o_word[None, None, :],
                mask=m_chunk[:, :, None],
                other=0,
                eviction_policy="evict_first",
            ).to(tl.int32)
            b_x = tl.load(
                p_vectors
                + o_vector[None, None, :].to(tl.int64) * x_stride
                + ((o_first + u) * 16)[:, None, None]
                + o_word[None, :, None],
                mask=m_vector[None, None, :] & m_column[:, None, None],
                other=0,
            )
            b_front, b_back = tl.split(_look(b_pair, tl.join(b_word & 255, (b_word >> 8) & 255)))
            b_part = tl.dot(_plane(b_front, 0, DTYPE), _plane(b_x, 0, DTYPE))
            b_part = tl.dot(_plane(b_front, 1, DTYPE), _plane(b_x, 1, DTYPE), b_part)
            b_part = tl.dot(_plane(b_back, 0, DTYPE), _plane(b_x, 2, DTYPE), b_part)
            b_part = tl.dot(_plane(b_back, 1, DTYPE), _plane(b_x, 3, DTYPE), b_part)
            b_sum += b_part * b_scale[:, :, None]
    tl.store(
        p_out + o_vector[None, :].to(tl.int64) * rows + o_row[:, None],
        tl.sum(b_sum, 0).to(p_out.dtype.element_ty),
        mask=m_row[:, None] & m_vector[None, :],
    )


class Form(NamedTuple):
    """Launch of a kernel: vectors, rows and warps a program."""

    vectors: int
    rows: int
    num_warps: int


def _few(vectors: int, rows: int, pieces: int, multiprocessors: int) -> Form:
    """Two rows a program, or four with two vectors, and more warps a program the fewer rows there are."""
    # Two vectors: what is decoded serves twice, and with four rows so does what is read of the vectors; but not where
    # that leaves multiprocessors without work.
    rows_each = 4 if vectors > 1 and rows >= 16 * multiprocessors else 2
    wanted = min(FEW_WARPS * multiprocessors // cdiv(rows, 2), pieces // LANES, 2 if vectors > 1 else 4)
    return Form(min(vectors, 2), rows_each, 1 << max(0, wanted.bit_length() - 1))


def _many(vectors: int, chunks: int) -> Form:
    """The least columns that hold the vectors, and no warp without a part of the weight's."""
    columns = 8 if vectors <= 8 else 16
    rows, warps = MANY[columns]
    return Form(max(columns, LEAST_COLUMNS), rows, 1 << max(0, min(warps, cdiv(chunks, 4)).bit_length() - 1))


def _on_matrix_units(dtype: torch.dtype, quantized: Quantized4Bit) -> bool:
    return dtype.itemsize == 2 and quantized.blocksize >= CHUNK and quantized.shape[-1] % CHUNK == 0


def serves(x: torch.Tensor, quantized: Quantized4Bit) -> bool:
    """Whether a kernel of this file multiplies vectors ``x`` [vectors, in_features] in less time than dense products.

    That takes rows and blocks of the weight that are whole pieces of 32 elements, and few enough vectors.
    """
    if x.shape[0] > MAX_VECTORS or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if x.shape[0] > MAX_FEW_VECTORS and not _on_matrix_units(x.dtype, quantized):
        return False
    # The weight is read in words of 16 bits.
    return quantized.blocksize >= PIECE and x.shape[1] % PIECE == 0 and quantized.packed.data_ptr() % 2 == 0


def _matvec(x: torch.Tensor, quantized: Quantized4Bit) -> torch.Tensor:
    rows, width = quantized.shape
    vectors = x.shape[0]
    out = x.new_empty((vectors, rows))
    if out.numel() == 0:
        return out
    # Four elements are read as one word.
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    weight = weight_arguments(quantized)
    given = {"p_x": x, "p_out": out, "vectors": vectors, "rows": rows, "x_stride": x.stride(0) // 4}
    with on_device(x):
        if vectors > 2 and _on_matrix_units(x.dtype, quantized):
            chunks = width // CHUNK
            form = _many(vectors, chunks)
            quads = (
                quantized.nested_blocksize is not None
                and quantized.nested_blocksize % 4 == 0
                and quantized.blocksize == CHUNK
                and chunks % 4 == 0
                and quantized.absmax.data_ptr() % 4 == 0
            )
            many_kernel[(cdiv(rows, form.rows),)](
                **weight,
                **given,
                chunks=chunks,
                BLOCK_SHIFT=(quantized.blocksize // CHUNK).bit_length() - 1,
                QUADS=quads,
                PARTS=form.num_warps,
                ROWS=form.rows,
                COLUMNS=form.vectors,
                num_warps=form.num_warps,
                num_stages=1,
            )
        else:
            pieces = width // PIECE
            few = _few(vectors, rows, pieces, processors(x))
            few_kernel[(cdiv(rows, few.rows), cdiv(vectors, few.vectors))](
                **weight,
                **given,
                pieces=pieces,
                BLOCK_SHIFT=(quantized.blocksize // PIECE).bit_length() - 1,
                VECTORS=few.vectors,
                ROWS=few.rows,
                PIECES=LANES * few.num_warps,
                WORDS=WORDS,
                num_warps=few.num_warps,
                num_stages=1,
            )
    return out


def nf4_matvec(x: torch.Tensor, quantized: Quantized4Bit, *, backend: dispatch.Backend = "auto") -> torch.Tensor:
    """Multiply vectors by a 4-bit weight without writing the weight out: ``x @ weight.T``, for generation.

    Up to 16 vectors of 16 bits, or 4 of float32, go through a fused kernel with float32 sums (see the file's top);
    more, or rows or blocks of the weight that are not whole pieces of 32 elements (64 for more than 4 vectors), through
    dequantisation and torch's product. Bitwise deterministic on the same chip. No gradient.

    Args:
        x: [..., in_features], float16, bfloat16 or float32.
        quantized: Weight of shape ``(out_features, in_features)``.
        backend: See ``dispatch.resolve``.

    Returns:
        [..., out_features] in the dtype of ``x``.

    Raises:
        ConfigError: The shapes do not fit.
        UnsupportedError: ``x`` requires a gradient while gradients are recorded.
    """
    where = "nf4_matvec"
    if len(quantized.shape) != 2 or x.shape[-1] != quantized.shape[1]:
        raise ConfigError(f"x {list(x.shape)} does not fit a weight {list(quantized.shape)}", where=where)
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("nf4_matvec has no backward", where=where, hint="use lora_linear, or torch.no_grad()")
    vectors = x.reshape(-1, x.shape[-1])
    chosen = dispatch.resolve(where, x, backend)
    if chosen == "triton" and serves(vectors, quantized):
        return _matvec(vectors, quantized).view(*x.shape[:-1], quantized.shape[0])
    weight = nf4_dequantize(quantized, dtype=x.dtype, backend=chosen)
    return torch.nn.functional.linear(x, weight)


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    for dtype in ("fp16", "bf16", "fp32"):
        for nested in (False, True):
            arguments, constants = weight_variant(nested=nested)
            arguments |= {"p_x": f"*{dtype}", "p_out": f"*{dtype}", "vectors": "i32", "rows": "i32", "x_stride": "i32"}
            form = f"{dtype}-{'nested' if nested else 'plain'}"
            for vectors, rows, warps in ((1, 2, 1), (1, 2, 4), (2, 2, 2), (2, 4, 1)):
                sizes = {"VECTORS": vectors, "ROWS": rows, "PIECES": 32 * warps, "WORDS": WORDS}
                yield Variant(
                    name=f"nf4_matvec_few-{form}-{vectors}x{rows}w{warps}",
                    kernel=few_kernel,
                    arguments={**arguments, "pieces": "i32"},
                    constants={**constants, **sizes, "BLOCK_SHIFT": 1},
                    num_warps=warps,
                    num_stages=1,
                    minimum=bfloat16_minimum(dtype),
                    representative=nested and dtype != "fp16" and (vectors, warps) != (1, 4),
                )
            for columns, (rows, warps) in MANY.items() if dtype != "fp32" else ():
                yield Variant(
                    name=f"nf4_matvec_many-{form}-{columns}",
                    kernel=many_kernel,
                    arguments={**arguments, "chunks": "i32"},
                    constants={**constants, "BLOCK_SHIFT": 0, "QUADS": nested, "PARTS": warps, "ROWS": rows}
                    | {"COLUMNS": columns},
                    num_warps=warps,
                    num_stages=1,
                    minimum=bfloat16_minimum(dtype),
                    representative=nested and dtype == "bf16",
                )

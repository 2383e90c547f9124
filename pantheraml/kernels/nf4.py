"""nf4 and fp4 weights in the layout of bitsandbytes: dequantisation into a buffer, and a product with few vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference import nf4 as reference
from .reference.nf4 import Quantized4Bit
from .utils import cdiv, next_power_of_2, require_shape

__all__ = ["Quantized4Bit", "nf4_dequantize", "nf4_matvec"]

# Packed bytes a program of the dequantisation takes, with its warps: 16 bytes a thread, one wide load. 89 % of the copy
# bandwidth on an H100 for a 14,336 x 4,096 weight.
DEQUANTIZE_BYTES = 1024
DEQUANTIZE_WARPS = 2
# Rows of the weight and packed bytes of each that a program of the product holds at a time. 39 us for 14,336 x 4,096 on
# an H100; 16 rows with 4 warps take 35 us, but leave most of the chip idle where the weight has 1,024 rows.
MATVEC_ROWS = 4
MATVEC_BYTES = 128
MATVEC_WARPS = 1
# Beyond that many vectors reading the weight again for each costs more than writing it out once.
MATVEC_MAX_VECTORS = 8


@jit
def _scales(
    p_absmax, p_nested_absmax, p_nested_code, p_nested_offset, o_group, m_group, NESTED_BLOCKSIZE: tl.constexpr
):
    b_scale = tl.load(p_absmax + o_group, mask=m_group, other=0)
    if p_nested_absmax is not None:
        b_outer = tl.load(p_nested_absmax + o_group // NESTED_BLOCKSIZE, mask=m_group, other=0.0)
        b_scale = tl.load(p_nested_code + b_scale.to(tl.int32)) * b_outer + tl.load(p_nested_offset)
    return b_scale


@jit
def nf4_dequantize_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_nested_offset,
    p_out,
    packed_bytes,
    count,
    width,
    out_stride,
    NESTED_BLOCKSIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Dequantise GROUPS blocks of 2 * HALF elements."""
    # From the program's first element on, so that offsets take 32 bits.
    i_group = tl.program_id(0).to(tl.int64) * GROUPS
    o_group = tl.arange(0, GROUPS)
    left = count - i_group * (2 * HALF)
    b_scale = _scales(
        p_absmax,
        p_nested_absmax,
        p_nested_code,
        p_nested_offset,
        i_group + o_group,
        o_group * (2 * HALF) < left,
        NESTED_BLOCKSIZE,
    )
    # Offsets of bytes are compared with a count of bytes: of offsets that are multiplied first the compiler does not
    # see that neighbours agree, and loads single bytes.
    o_byte = o_group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    m_byte = o_byte < packed_bytes - i_group * HALF
    # Read once: such lines leave the cache before those of the result.
    p_byte = p_packed + i_group * HALF + o_byte
    b_byte = tl.load(p_byte, mask=m_byte, other=0, eviction_policy="evict_first").to(tl.int32)
    b_high = (tl.load(p_code + (b_byte >> 4)) * b_scale[:, None]).to(p_out.dtype.element_ty)
    b_low = (tl.load(p_code + (b_byte & 15)) * b_scale[:, None]).to(p_out.dtype.element_ty)
    o_out = o_group[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    m_out = o_out < left
    if STRIDED:
        o_flat = i_group * (2 * HALF) + o_out
        p_element = p_out + (o_flat // width) * out_stride + o_flat % width
    else:
        p_element = p_out + i_group * (2 * HALF) + o_out
    tl.store(p_element, tl.interleave(b_high, b_low), mask=m_out)


@jit
def nf4_matvec_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_nested_offset,
    p_x,
    p_out,
    rows,
    width,
    x_stride,
    out_stride,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """``out[j, r] = sum_k weight[r, k] * x[j, k]`` for ROWS rows and one vector; the width is whole blocks."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_vector = tl.program_id(1).to(tl.int64)
    m_row = o_row < rows
    groups = width // (2 * HALF)
    o_lane = tl.arange(0, HALF)
    b_sum = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        o_column = start + tl.arange(0, GROUPS)
        m_column = o_column < groups
        m_group = m_row[:, None] & m_column[None, :]
        o_group = o_row[:, None] * groups + o_column[None, :]
        b_scale = _scales(p_absmax, p_nested_absmax, p_nested_code, p_nested_offset, o_group, m_group, NESTED_BLOCKSIZE)
        o_byte = o_group[:, :, None] * HALF + o_lane[None, None, :]
        b_byte = tl.load(p_packed + o_byte, mask=m_group[:, :, None], other=0).to(tl.int32)
        p_pair = p_x + i_vector * x_stride + (o_column[:, None] * HALF + o_lane[None, :]) * 2
        b_even = tl.load(p_pair, mask=m_column[:, None], other=0.0).to(tl.float32)
        b_odd = tl.load(p_pair + 1, mask=m_column[:, None], other=0.0).to(tl.float32)
        b_product = tl.load(p_code + (b_byte >> 4)) * b_even[None, :, :]
        b_product += tl.load(p_code + (b_byte & 15)) * b_odd[None, :, :]
        b_sum += tl.where(m_group, tl.sum(b_product, axis=2) * b_scale, 0.0)
    b_out = tl.sum(b_sum, axis=1).to(p_out.dtype.element_ty)
    tl.store(p_out + i_vector * out_stride + o_row, b_out, mask=m_row)


def _dequantize(quantized: Quantized4Bit, out: torch.Tensor) -> torch.Tensor:
    count = math.prod(quantized.shape)
    if count == 0:
        return out
    half = quantized.blocksize // 2
    groups = max(1, DEQUANTIZE_BYTES // half)
    width = quantized.shape[-1]
    strided = not out.is_contiguous()
    with on_device(out):
        nf4_dequantize_kernel[(cdiv(count, groups * quantized.blocksize),)](
            p_packed=quantized.packed,
            p_absmax=quantized.absmax,
            p_code=quantized.code,
            p_nested_absmax=quantized.nested_absmax,
            p_nested_code=quantized.nested_code,
            p_nested_offset=quantized.nested_offset,
            p_out=out,
            packed_bytes=cdiv(count, 2),
            count=count,
            width=width,
            out_stride=out.stride(0) if strided else width,
            NESTED_BLOCKSIZE=quantized.nested_blocksize or 1,
            GROUPS=groups,
            HALF=half,
            STRIDED=strided,
            num_warps=DEQUANTIZE_WARPS,
        )
    return out


def _matvec(x: torch.Tensor, quantized: Quantized4Bit) -> torch.Tensor:
    rows, width = quantized.shape
    out = x.new_empty((x.shape[0], rows))
    if out.numel() == 0:
        return out
    half = quantized.blocksize // 2
    groups = max(1, min(MATVEC_BYTES // half, next_power_of_2(width // quantized.blocksize)))
    with on_device(x):
        nf4_matvec_kernel[(cdiv(rows, MATVEC_ROWS), x.shape[0])](
            p_packed=quantized.packed,
            p_absmax=quantized.absmax,
            p_code=quantized.code,
            p_nested_absmax=quantized.nested_absmax,
            p_nested_code=quantized.nested_code,
            p_nested_offset=quantized.nested_offset,
            p_x=x,
            p_out=out,
            rows=rows,
            width=width,
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            NESTED_BLOCKSIZE=quantized.nested_blocksize or 1,
            ROWS=MATVEC_ROWS,
            GROUPS=groups,
            HALF=half,
            num_warps=MATVEC_WARPS,
        )
    return out


def nf4_dequantize(
    quantized: Quantized4Bit,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Dequantise a 4-bit weight.

    Each element is ``code * scale`` in float32, rounded once (see ``Quantized4Bit`` for the layout, and QLoRA,
    https://arxiv.org/abs/2305.14314, for nf4 and double quantisation). Bitwise deterministic.

    Args:
        quantized: The weight.
        out: Buffer of the weight's shape to fill; its rows may be apart (a slice of a wider buffer). Default None:
            allocated.
        dtype: Dtype of the result when ``out`` is not given. Default None: ``quantized.dtype``.
        backend: See ``dispatch.resolve``.

    Returns:
        The weight, of ``quantized.shape``: ``out`` when given.

    Raises:
        ConfigError: ``out`` has another shape or device, its elements in a row are apart, or ``dtype`` contradicts it.
    """
    where = "nf4_dequantize"
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype or quantized.dtype, device=quantized.device)
    else:
        require_shape(where, "out", out, tuple(quantized.shape))
        if out.device != quantized.device or (dtype is not None and dtype != out.dtype):
            raise ConfigError(
                f"out is {out.dtype} on {out.device}, wanted {dtype or 'any dtype'} on {quantized.device}", where=where
            )
    if dispatch.resolve(where, out, backend) == "reference":
        return out.copy_(reference.nf4_dequantize(quantized, out.dtype))
    if not out.is_contiguous() and (out.dim() != 2 or out.stride(1) != 1):
        raise ConfigError(
            f"out with strides {out.stride()} cannot be filled", where=where, hint="rows must be contiguous"
        )
    return _dequantize(quantized, out)


def nf4_matvec(x: torch.Tensor, quantized: Quantized4Bit, *, backend: dispatch.Backend = "auto") -> torch.Tensor:
    """Multiply vectors by a 4-bit weight without writing the weight out: ``x @ weight.T``, for generation.

    Up to 8 vectors go through the fused kernel, which multiplies and sums in float32; more, or a width that is not
    whole blocks, through dequantisation and torch's product. No gradient.

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
    if chosen == "triton" and vectors.shape[0] <= MATVEC_MAX_VECTORS and x.shape[-1] % quantized.blocksize == 0:
        vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
        return _matvec(vectors, quantized).view(*x.shape[:-1], quantized.shape[0])
    weight = nf4_dequantize(quantized, dtype=x.dtype, backend=chosen)
    return torch.nn.functional.linear(x, weight)


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    for dtype in ("fp16", "bf16", "fp32"):
        for nested in (False, True):
            arguments = {
                "p_packed": "*u8",
                "p_absmax": "*u8" if nested else "*fp32",
                "p_code": "*fp32",
                "p_out": f"*{dtype}",
                "width": "i32",
                "out_stride": "i64",
            }
            nested_names = ("p_nested_absmax", "p_nested_code", "p_nested_offset")
            constants = {"NESTED_BLOCKSIZE": 256} if nested else {"NESTED_BLOCKSIZE": 1, **dict.fromkeys(nested_names)}
            if nested:
                arguments |= dict.fromkeys(nested_names, "*fp32")
            form = f"{dtype}-{'nested' if nested else 'plain'}"
            yield Variant(
                name=f"nf4_dequantize-{form}",
                kernel=nf4_dequantize_kernel,
                arguments={**arguments, "packed_bytes": "i64", "count": "i64"},
                constants={**constants, "GROUPS": DEQUANTIZE_BYTES // 32, "HALF": 32, "STRIDED": False},
                num_warps=DEQUANTIZE_WARPS,
                minimum=bfloat16_minimum(dtype),
                representative=nested,
            )
            yield Variant(
                name=f"nf4_matvec-{form}",
                kernel=nf4_matvec_kernel,
                arguments={**arguments, "p_x": f"*{dtype}", "rows": "i32", "x_stride": "i64"},
                constants={**constants, "ROWS": MATVEC_ROWS, "GROUPS": MATVEC_BYTES // 32, "HALF": 32},
                num_warps=MATVEC_WARPS,
                minimum=bfloat16_minimum(dtype),
                representative=nested,
            )

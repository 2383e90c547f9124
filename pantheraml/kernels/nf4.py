"""nf4 and fp4 weights in the layout of bitsandbytes: dequantisation into a buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ConfigError
from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference import nf4 as reference
from .reference.nf4 import Quantized4Bit
from .utils import cdiv, require_shape

__all__ = ["Quantized4Bit", "nf4_dequantize"]

# Packed bytes a program of the dequantisation takes, with its warps: 16 bytes a thread, one wide load. 89 % of the copy
# bandwidth on an H100 for a 14,336 x 4,096 weight.
DEQUANTIZE_BYTES = 1024
DEQUANTIZE_WARPS = 2


@jit
def nested_offset(p_nested_offset):
    """What is added to every nested scale; 0 without nested scales."""
    b_offset = 0.0
    if p_nested_offset is not None:
        b_offset = tl.load(p_nested_offset)
    return b_offset


@jit
def block_scales(p_absmax, p_nested_absmax, p_nested_code, b_offset, o_block, m_block, NESTED_BLOCKSIZE: tl.constexpr):
    """Scales of blocks in float32; ``b_offset`` is what ``nested_offset`` returns."""
    b_scale = tl.load(p_absmax + o_block, mask=m_block, other=0)
    if p_nested_absmax is not None:
        b_outer = tl.load(p_nested_absmax + o_block // NESTED_BLOCKSIZE, mask=m_block, other=0.0)
        b_scale = tl.load(p_nested_code + b_scale.to(tl.int32)) * b_outer + b_offset
    return b_scale


def weight_arguments(quantized: Quantized4Bit) -> dict[str, Any]:
    """The arguments by which kernels take a 4-bit weight."""
    return {
        "p_packed": quantized.packed,
        "p_absmax": quantized.absmax,
        "p_code": quantized.code,
        "p_nested_absmax": quantized.nested_absmax,
        "p_nested_code": quantized.nested_code,
        "p_nested_offset": quantized.nested_offset,
        "NESTED_BLOCKSIZE": quantized.nested_blocksize or 1,
    }


def weight_variant(*, nested: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of these arguments, and those that are constants, for compilation ahead of time."""
    of_nested = ("p_nested_absmax", "p_nested_code", "p_nested_offset")
    types = {"p_packed": "*u8", "p_absmax": "*u8" if nested else "*fp32", "p_code": "*fp32"}
    if nested:
        return types | dict.fromkeys(of_nested, "*fp32"), {"NESTED_BLOCKSIZE": 256}
    return types, {"NESTED_BLOCKSIZE": 1, **dict.fromkeys(of_nested)}


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
    b_scale = block_scales(
        p_absmax,
        p_nested_absmax,
        p_nested_code,
        nested_offset(p_nested_offset),
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
            **weight_arguments(quantized),
            p_out=out,
            packed_bytes=cdiv(count, 2),
            count=count,
            width=width,
            out_stride=out.stride(0) if strided else width,
            GROUPS=groups,
            HALF=half,
            STRIDED=strided,
            num_warps=DEQUANTIZE_WARPS,
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


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    for dtype in ("fp16", "bf16", "fp32"):
        for nested in (False, True):
            types, constants = weight_variant(nested=nested)
            sizes = {"packed_bytes": "i64", "count": "i64", "width": "i32", "out_stride": "i64"}
            form = f"{dtype}-{'nested' if nested else 'plain'}"
            yield Variant(
                name=f"nf4_dequantize-{form}",
                kernel=nf4_dequantize_kernel,
                arguments={**types, "p_out": f"*{dtype}", **sizes},
                constants={**constants, "GROUPS": DEQUANTIZE_BYTES // 32, "HALF": 32, "STRIDED": False},
                num_warps=DEQUANTIZE_WARPS,
                minimum=bfloat16_minimum(dtype),
                representative=nested,
            )

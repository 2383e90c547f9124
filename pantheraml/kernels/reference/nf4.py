"""4-bit weights in the layout of bitsandbytes: the record that describes them, and plain dequantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ArgumentError, ConfigError, UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class Quantized4Bit:
    """A weight of two 4-bit codes a byte, the first in the high half, with one scale a block of consecutive elements.

    Element ``i`` of the flattened weight is ``code[nibble_i] * scale[i // blocksize]``. The scale is ``absmax`` or,
    nested, ``nested_code[absmax[j]] * nested_absmax[j // nested_blocksize] + nested_offset``.

    Attributes:
        packed: uint8, ``ceil(numel / 2)`` bytes in any shape.
        absmax: float32, or uint8 when nested, one a block.
        code: float32 [16], the values of the codes (nf4 and fp4 differ only here).
        blocksize: Elements that share a scale, a power of two.
        shape: Shape of the weight, ``(out_features, in_features)``.
        dtype: Dtype the weight dequantises to.
        nested_absmax: float32, one a block of scales, or None.
        nested_code: float32 [256], or None.
        nested_offset: float32, one element, or None.
        nested_blocksize: Scales that share a nested scale, or None.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int | None = None

    def __post_init__(self) -> None:
        where = "Quantized4Bit"
        if self.packed.dtype != torch.uint8 or not self.packed.is_contiguous():
            raise ArgumentError(f"packed must be contiguous uint8, not {self.packed.dtype}", where=where)
        if self.blocksize < 2 or self.blocksize & (self.blocksize - 1):
            raise ConfigError(f"blocksize must be a power of two, not {self.blocksize}", where=where)
        count = math.prod(self.shape)
        if self.packed.numel() != -(-count // 2):
            raise ConfigError(
                f"{self.packed.numel()} bytes do not hold {count} codes of 4 bits",
                where=where,
                why=f"shape {self.shape}",
            )
        if self.absmax.numel() != -(-count // self.blocksize):
            raise ConfigError(
                f"{self.absmax.numel()} scales do not fit {count} elements in blocks of {self.blocksize}", where=where
            )
        nested = (self.nested_absmax, self.nested_code, self.nested_offset, self.nested_blocksize)
        if any(part is None for part in nested) != all(part is None for part in nested):
            raise ConfigError("nested scales need all of absmax, code, offset and blocksize", where=where)
        if self.absmax.dtype != (torch.uint8 if self.nested else torch.float32):
            raise ArgumentError(f"absmax is {self.absmax.dtype}, nested is {self.nested}", where=where)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Device of the packed codes."""
        return self.packed.device

    @classmethod
    def from_quant_state(cls, packed: torch.Tensor, quant_state: Any) -> Quantized4Bit:
        """Describe a bitsandbytes weight, sharing its memory.

        Args:
            packed: ``weight.data`` of a ``Params4bit``, in any storage dtype.
            quant_state: Its ``quant_state`` (anything with those attributes).

        Raises:
            UnsupportedError: the weight was repacked into bitsandbytes' own layout for CPUs.
        """
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise UnsupportedError(
                "the weight is in bitsandbytes' repacked layout for CPUs",
                where="Quantized4Bit.from_quant_state",
                hint="take it before inference, or call bitsandbytes.functional._convert_weight_packed_for_cpu_inverse",
            )
        nested = quant_state.state2
        offset = None
        if nested is not None:
            offset = torch.as_tensor(quant_state.offset, dtype=torch.float32, device=quant_state.absmax.device)
        # bitsandbytes stores the layer's weight as a transposed column now and then; the bytes are the same.
        data = packed.detach().reshape(-1).view(torch.uint8)
        return cls(
            packed=data,
            absmax=quant_state.absmax,
            code=quant_state.code.to(device=data.device, dtype=torch.float32),
            blocksize=int(quant_state.blocksize),
            shape=torch.Size(quant_state.shape),
            dtype=quant_state.dtype,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            nested_offset=offset,
            nested_blocksize=None if nested is None else int(nested.blocksize),
        )


def scales(quantized: Quantized4Bit) -> torch.Tensor:
    """The float32 scale of each block."""
    if not quantized.nested:
        return quantized.absmax
    codes = quantized.nested_code[quantized.absmax.long()]  # type: ignore[index]
    outer = quantized.nested_absmax.repeat_interleave(quantized.nested_blocksize)  # type: ignore[union-attr]
    return codes * outer[: codes.numel()] + quantized.nested_offset


def nf4_dequantize(quantized: Quantized4Bit, dtype: torch.dtype) -> torch.Tensor:
    """The weight, multiplied out in float32 and rounded to ``dtype`` once."""
    count = math.prod(quantized.shape)
    packed = quantized.packed.reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    values = quantized.code[nibbles.long()]
    factors = scales(quantized).repeat_interleave(quantized.blocksize)[:count]
    return (values * factors).to(dtype).view(quantized.shape)

"""The weights of all experts in 4 bits: made dense for one product and let go of, or only those that were chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .nf4 import nf4_dequantize
from .reference.nf4 import Quantized4Bit


@dataclass(frozen=True, slots=True, eq=False)
class FourBitStack:
    """A frozen stack of matrices [G, O, I] in 4 bits.

    Attributes:
        quantized: The codes; its shape is [G, O, I], or [G, I, O] where ``transposed``.
        transposed: Whether the matrices lie transposed. Default False.
    """

    quantized: Quantized4Bit
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """[G, O, I]."""
        groups, first, second = self.quantized.shape
        return torch.Size((groups, second, first) if self.transposed else (groups, first, second))

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.quantized.shape)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrices in ``dtype``, in memory of their own: whoever asks lets go of them after the product."""
        matrices = nf4_dequantize(self.quantized, dtype=dtype)
        return matrices.transpose(1, 2) if self.transposed else matrices

    @property
    def divisible(self) -> bool:
        """Whether each matrix is made of whole blocks, so that some can be taken out of the stack."""
        return math.prod(self.quantized.shape[1:]) % self.quantized.blocksize == 0

    def chosen(self, groups: torch.Tensor) -> FourBitStack:
        """The stack of some matrices, on the device and without waiting for it.

        Args:
            groups: [M], which ones; the stack has to be ``divisible``.
        """
        whole = self.quantized
        count, *sides = whole.shape
        blocks = math.prod(sides) // whole.blocksize
        # Scales of scales may span two matrices: those of the chosen ones are worked out.
        absmax = whole.absmax.view(count, blocks).index_select(0, groups).reshape(-1)
        if whole.nested:
            assert whole.nested_absmax is not None
            assert whole.nested_blocksize is not None
            first = groups.unsqueeze(1) * blocks + torch.arange(blocks, device=groups.device)
            outer = whole.nested_absmax[first // whole.nested_blocksize].reshape(-1)
            absmax = whole.nested_code[absmax.long()] * outer + whole.nested_offset  # type: ignore[index]
        part = replace(
            whole,
            packed=whole.packed.view(count, -1).index_select(0, groups).reshape(-1),
            absmax=absmax,
            shape=torch.Size((len(groups), *sides)),
            nested_absmax=None,
            nested_code=None,
            nested_offset=None,
            nested_blocksize=None,
        )
        return replace(self, quantized=part)


def dense(weight: torch.Tensor | FourBitStack, dtype: torch.dtype) -> torch.Tensor:
    """A stack [G, O, I] as a tensor in ``dtype``."""
    return weight.dense(dtype) if isinstance(weight, FourBitStack) else weight.to(dtype)

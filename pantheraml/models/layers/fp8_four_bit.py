"""bitsandbytes' 4-bit linear layer with products in fp8."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from ...kernels.fp8 import MATMUL_MULTIPLE
from ...kernels.lora_linear import lora_linear
from .lora import base_weight


class Linear4bitFp8(Linear4bit):
    """A 4-bit layer that is multiplied in fp8, with adapters on it or without; storage and state dict are the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``, in autocast's dtype or else its own."""
        weight = base_weight(self)
        if weight is None:  # repacked for a CPU's own product
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return lora_linear(x.to(self.compute_dtype or dtype), weight, bias=self.bias).to(dtype)


def multiply_in_fp8(model: nn.Module) -> int:
    """Let the 4-bit layers of a model multiply in fp8, where their shapes allow it; returns how many do."""
    count = 0
    for module in model.modules():
        if type(module) is not Linear4bit:
            continue
        state: Any = module.weight.quant_state  # type: ignore[missing-attribute]
        rows, width = state.shape
        if rows % MATMUL_MULTIPLE == 0 and width % max(MATMUL_MULTIPLE, state.blocksize) == 0:
            module.__class__ = Linear4bitFp8
            count += 1
    return count

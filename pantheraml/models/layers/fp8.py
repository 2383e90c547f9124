"""A frozen linear layer whose weight is held in fp8 and multiplied by fp8 matrix units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...kernels.fp8_linear import Fp8Weight
from ...kernels.lora_linear import lora_linear

# Scales under the names of the formats that lay them out so: compressed-tensors (a channel each) and transformers'
# fine-grained fp8 (a tile each). Both mean weight = values * scale.
ROW_SCALE = "weight_scale"
TILE_SCALE = "weight_scale_inv"


class Fp8Linear(nn.Linear):
    """``x @ weight.T + bias`` with a frozen fp8 weight; see ``kernels.fp8_linear`` for what is rounded where.

    The state dict holds ``weight`` [O, I] in e4m3 and, float32, ``weight_scale`` [O, 1] or ``weight_scale_inv``
    [ceil(O / 128), ceil(I / 128)]. Until ``quantize`` was called the weight is a dense one, on any device.

    Args:
        in_features: Multiple of 16.
        out_features: Multiple of 16.
        bias: Whether there is one. Default True.
        block: A scale a 128 x 128 tile instead of a row. Default False.
        compute_dtype: Dtype of the products' results and of everything that is not fp8. Default bfloat16. PEFT reads it
            to choose the dtype in which adapters start.
        device: Where to put the tensors.

    Attributes:
        block: As given.
        compute_dtype: As given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: bool = False,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=compute_dtype)
        self.block = block
        self.compute_dtype = compute_dtype
        self.weight.requires_grad_(False)
        self.register_buffer(self.scale_name, torch.empty(self._scale_shape(), dtype=torch.float32, device=device))
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self._described: tuple[tuple[int, int], Fp8Weight] | None = None

    @property
    def scale_name(self) -> str:
        """Name of the buffer with the scales."""
        return TILE_SCALE if self.block else ROW_SCALE

    def _scale_shape(self) -> tuple[int, int]:
        if self.block:
            return -(-self.out_features // 128), -(-self.in_features // 128)
        return self.out_features, 1

    @property
    def is_fp8(self) -> bool:
        """Whether the weight is in fp8 now; it is not before it was quantised, nor while adapters are merged in."""
        return self.weight.dtype.itemsize == 1

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a dense weight [O, I] where it is.

        Returns:
            The new ``weight`` (a frozen parameter) and scales by their names in this module; they are not set yet.
        """
        made = Fp8Weight.quantize(weight.detach(), block=self.block)
        return {"weight": nn.Parameter(made.values, requires_grad=False), self.scale_name: made.scales}

    def fp8_weight(self) -> Fp8Weight:
        """The weight as the fused products take it, sharing memory with this module."""
        values, scales = self.weight.detach(), self._buffers[self.scale_name]
        assert scales is not None
        key = (values.data_ptr(), scales.data_ptr())
        if self._described is None or self._described[0] != key:
            self._described = (key, Fp8Weight(values, scales, self.compute_dtype))
        return self._described[1]

    def dense_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight multiplied out, [O, I], in ``dtype`` (None: the compute dtype)."""
        dtype = dtype or self.compute_dtype
        return self.fp8_weight().dense(dtype) if self.is_fp8 else self.weight.detach().to(dtype)

    def unpack(self) -> None:
        """Hold the weight in the compute dtype, so that it can be added to; the fp8 one is kept for ``pack``.

        An update of an adapter is often smaller than what e4m3 rounds away, so merging into fp8 would lose it.
        """
        if self._held is not None:
            return
        scales = self._buffers.pop(self.scale_name)
        assert scales is not None
        values = self.weight.detach()
        self._held = (values, scales)
        dense = Fp8Weight(values, scales, self.compute_dtype).dense(self.compute_dtype)
        self.weight = nn.Parameter(dense, requires_grad=False)
        self._described = None

    def pack(self) -> None:
        """Go back to the fp8 weight that was there before ``unpack``, bit for bit."""
        if self._held is None:
            return
        values, scales = self._held
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer(self.scale_name, scales)
        self._held = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``, in autocast's dtype or else its own."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x = input.to(self.compute_dtype)
        if self.is_fp8:
            y = lora_linear(x, self.fp8_weight(), bias=self.bias)
        else:
            y = functional.linear(x, self.weight, self.bias)
        return y.to(dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Fp8Linear:
        """As in ``nn.Module``, but for the weight, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.weight.requires_grad_(False)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        """Move, but never cast, what is fp8 and its scales: ``model.to(dtype)`` means the other weights."""
        scales = self._buffers.get(self.scale_name)
        held = self._held

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            fixed = tensor.dtype.itemsize == 1 or tensor is scales
            return tensor.to(result.device) if fixed and result.dtype != tensor.dtype else result

        super()._apply(guarded, recurse)
        if held is not None:
            self._held = (held[0].to(self.weight.device), held[1].to(self.weight.device))
        self._described = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_described": None}

    def extra_repr(self) -> str:
        """Sizes and the kind of scales."""
        return f"{super().extra_repr()}, fp8 {'tiles' if self.block else 'rows'}"

"""Tensors of the forward that wait in host memory for the backward.

Copies run on a side stream, to pinned memory, beside the arithmetic. The backward asks for them last in, first out;
what it asks for next is on its way while it works on the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# Tensors below this size stay on the device: a copy over PCIe costs more than the memory is worth.
_LEAST_BYTES = 2 * 1024**2


class _Held:
    """One tensor on the host, and later on its way back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        self.stream = _side_stream(tensor.device)
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self.back: torch.Tensor | None = None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)

    def start(self) -> None:
        """Begin the copy back, after what the device does now."""
        if self.back is None:
            self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.back.copy_(self.host, non_blocking=True)

    def finish(self) -> torch.Tensor:
        """The tensor on the device, in the current stream's order."""
        self.start()
        assert self.back is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        self.back.record_stream(current)
        return self.back


class HostStash:
    """The tensors of one model that are on the host, in the order in which they were put there."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Move a tensor to the host; the result brings it back, and starts to bring the one put before it."""
        held = _Held(tensor.detach())
        self._held.append(held)

        def fetch() -> torch.Tensor:
            result = held.finish()
            if held in self._held:
                # What was put later was given up with its graph.
                del self._held[self._held.index(held) :]
            if self._held:
                self._held[-1].start()
            return result

        return fetch


class OffloadSaved(torch.autograd.graph.saved_tensors_hooks):
    """Moves what is saved inside it to the host, and back when backward asks.

    Args:
        stash: Where the tensors wait.
    """

    def __init__(self, stash: HostStash) -> None:
        self._stash = stash
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.device.type != "cuda" or tensor.numel() * tensor.element_size() < _LEAST_BYTES:
            return tensor
        return self._stash.put(tensor)

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

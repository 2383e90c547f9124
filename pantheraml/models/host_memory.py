"""Tensors of the forward that wait in host memory for the backward.

Copies run on a side stream, to pinned memory, beside the arithmetic. The backward asks for them last in, first out;
what it asks for next is on its way while it works on the last.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

# Tensors below this size stay on the device: a copy over PCIe costs more than the memory is worth.
LEAST_BYTES = 2 * 1024**2
# The allocator of pinned memory rounds up to a power of two, so that large tensors wait in pieces of one.
_PIECE_BYTES = 64 * 1024**2
# Share of the host's available memory that tensors may wait in.
SHARE = 0.6
# Of a container, in both versions of control groups: what it may use and what it uses.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Host memory in which this process may hold tensors: a share of what is free, divided by this machine's ranks."""
    free = psutil.virtual_memory().available
    for limit, used in _LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            # Another kind of control group, or one without a limit.
            continue
    return max(int(SHARE * free), 0) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _pieces(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    return flat.split(max(_PIECE_BYTES // flat.itemsize, 1))


class PinningError(RuntimeError):
    """The host gave no pinned memory."""


def _pinned(like: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise PinningError(next(iter(str(error).splitlines()), "")) from error


class _Held:
    """Tensors on the host, and later on their way back.

    All memory of the device is allocated and freed in the current stream, which waits for a copy before what it read or
    wrote may be used again. The allocator's own way, ``record_stream``, waits on the host's clock instead: a host that
    runs ahead finds nothing free, and what is reserved grows by all that is moved.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device = tensors[0].device
        self.stream = _side_stream(self.device)
        # The stream that owns the memory, and has to wait before it is used again.
        self.owner = torch.cuda.current_stream(self.device)
        self.shapes = [(t.shape, t.dtype) for t in tensors]
        self.back: list[torch.Tensor] | None = None
        self.sources = [t.contiguous() for t in tensors]
        self.host = [[_pinned(piece) for piece in _pieces(source.view(-1))] for source in self.sources]
        self.stream.wait_stream(self.owner)
        with torch.cuda.stream(self.stream):
            for source, held in zip(self.sources, self.host):
                for piece, pinned in zip(_pieces(source.view(-1)), held):
                    pinned.copy_(piece, non_blocking=True)
        self.copied = self.stream.record_event()

    def let_go(self) -> None:
        """Free on the device what was copied from."""
        if self.sources:
            self.owner.wait_event(self.copied)
            self.sources = []

    def start(self) -> None:
        """Begin the copy back, after what the device does now."""
        if self.back is not None:
            return
        self.owner = torch.cuda.current_stream(self.device)
        self.back = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.shapes]
        self.stream.wait_stream(self.owner)
        with torch.cuda.stream(self.stream):
            for target, held in zip(self.back, self.host):
                for piece, pinned in zip(_pieces(target.view(-1)), held):
                    piece.copy_(pinned, non_blocking=True)
        self.copied = self.stream.record_event()

    def finish(self) -> list[torch.Tensor]:
        """The tensors on the device, in the current stream's order."""
        self.let_go()
        self.start()
        back, self.back = self.back, None
        assert back is not None
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        return back

    def __del__(self) -> None:
        # A graph may be given up while its tensors are on their way; after a refusal nothing is.
        if getattr(self, "back", None) is not None:
            self.owner.wait_event(self.copied)


class HostStash:
    """The tensors of one model that are on the host, in the order in which they were put there.

    Args:
        refused: Called with the reason when the host has no memory for tensors, which then stay where they are.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        # A graph that is given up takes its tensors along.
        self._held: list[weakref.ref[_Held]] = []
        self._copying: list[_Held] = []
        self._put: list[_Held] = []
        self._refused = refused

    def advance(self) -> None:
        """A layer begins: its predecessor's tensors are being copied, those put before are free."""
        for held in self._copying:
            held.let_go()
        self._copying, self._put = self._put, []

    def put(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Move tensors to the host; the result brings them back, and starts to bring those put before them."""
        stay = [t.detach() for t in tensors]
        try:
            held = _Held(stay)
        except PinningError as error:
            self._refused(str(error))
            return lambda: stay
        self._held.append(weakref.ref(held))
        self._put.append(held)

        def fetch() -> list[torch.Tensor]:
            while self._copying or self._put:
                self.advance()
            result = held.finish()
            before = [each for ref in self._held if (each := ref()) is not None]
            if held in before:
                del before[before.index(held) :]
            if before:
                before[-1].start()
            self._held = [weakref.ref(each) for each in before]
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
        if tensor.device.type != "cuda" or tensor.numel() * tensor.element_size() < LEAST_BYTES:
            return tensor
        return self._stash.put([tensor])

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed()[0]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

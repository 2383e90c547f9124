"""The result of a layer's attention, with the small graph behind it, whose memory can be given up and brought back.

Attention runs under autograd between queries, keys, values and its result, so that every attention function works in
a layer of hand-written backward. What that graph saves is either kept, or forgotten and filled again from tensors
that were computed once more or fetched from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from ..host_memory import LEAST_BYTES
from .levels import Keep, Level


class _Saved:
    """What a small graph keeps: a tensor, or a place for one with the memory of ``filled[index]``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.index = -1
        self.geometry = tensor.size(), tensor.stride(), tensor.storage_offset()


class _Places:
    """Keeps places instead of tensors that are given up; ``fill`` brings their successors.

    The graph refers to what is in here, so this may refer to nothing of the graph: only the garbage collector would
    free the two.
    """

    def __init__(self) -> None:
        self._filled: dict[int, torch.Tensor] = {}
        self._saved: list[_Saved] = []
        self._given_up = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside these, what is saved can be given up afterwards."""
        saved, filled = self._saved, self._filled

        def pack(tensor: torch.Tensor) -> _Saved:
            saved.append(_Saved(tensor))
            return saved[-1]

        def unpack(packed: _Saved) -> torch.Tensor:
            if packed.tensor is not None:
                return packed.tensor
            return filled[packed.index].detach().as_strided(*packed.geometry)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def give_up(self, tensors: Sequence[torch.Tensor]) -> int:
        """Forget all that shares memory with ``tensors``, and return the place of the first."""
        first, self._given_up = self._given_up, self._given_up + len(tensors)
        index = {_address(x): i for i, x in enumerate(tensors, first)}
        for packed in self._saved:
            if packed.tensor is not None and _address(packed.tensor) in index:
                packed.index, packed.tensor = index[_address(packed.tensor)], None
        return first

    def large(self, but: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What is kept, is not small and does not share memory with the tensors ``but``."""
        known = {_address(x) for x in but}
        kept = [p.tensor for p in self._saved if p.tensor is not None and p.tensor.nbytes >= LEAST_BYTES]
        return list({_address(x): x for x in kept if _address(x) not in known}.values())

    def fill(self, first: int, tensors: Sequence[torch.Tensor]) -> None:
        """Put successors, of the same layout in memory, into the places from ``first`` on."""
        self._filled.update(enumerate(tensors, first))

    def empty(self) -> None:
        """Forget the successors."""
        self._filled.clear()


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


# A tensor in one of several memories: which, and how it lies there.
Lying = tuple[int, tuple[Sequence[int], Sequence[int], int | torch.SymInt]]


class Memories:
    """Memories that are moved to the host, each once."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []
        self._index: dict[int, int] = {}

    def add(self, x: torch.Tensor) -> Lying:
        """Add the memory of ``x``, and say where in which it is."""
        index = self._index.setdefault(_address(x), len(self.all))
        if index == len(self.all):
            self.all.append(_memory(x))
        return index, (x.size(), x.stride(), x.storage_offset())


def lying(where: Lying, memories: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that lies there in one of ``memories``."""
    return memories[where[0]].as_strided(*where[1])


def _memory(x: torch.Tensor) -> torch.Tensor:
    """All memory that ``x`` is a part of, as one row."""
    return x.detach().as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)


class _Enter(torch.autograd.Function):
    """Queries, keys and values as the beginning of a small graph that does not hold their memory."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:  # type: ignore[override]
        return (None,) * (1 + len(grads))


@dataclass(slots=True)
class Attended:
    """The result of attention [B, T, heads, D], with the small graph behind it where it was recorded.

    Attributes:
        result: None while it is on the host.
        end: Where the graph ends, at the result.
        begin: Where it begins, at queries, keys and values.
        places: What it keeps, where that may be given up.
        moved: Place of the first memory that was moved to the host, their number, and where the result is in them.
    """

    result: torch.Tensor | None
    end: Any = None
    begin: Sequence[Any] = ()
    places: _Places | None = None
    moved: tuple[int, int, Lying] | None = None

    def give_up(self, memories: Memories, qkv: Sequence[torch.Tensor], *, with_qkv: bool) -> None:
        """Add to ``memories``, which are empty, what stays of attention, and forget it here."""
        assert self.places is not None
        assert self.result is not None
        result = memories.add(self.result)
        for x in self.places.large([self.result, *qkv]):
            memories.add(x)
        if with_qkv:
            for x in qkv:
                memories.add(x)
        self.moved, self.result = (self.places.give_up(memories.all), len(memories.all), result), None

    def take_back(self, memories: Sequence[torch.Tensor]) -> None:
        """Undo ``give_up``."""
        assert self.places is not None
        assert self.moved is not None
        first, count, result = self.moved
        self.places.fill(first, memories[:count])
        self.result = lying(result, memories)

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of q, k, v [B, heads, T, D]."""
        assert self.result is not None
        found = torch.autograd.grad(self.end, self.begin, grad.view(self.result.shape))
        if self.places is not None:
            self.places.empty()
        return found


def attend(function: Callable[..., torch.Tensor], qkv: tuple[torch.Tensor, ...], level: Level) -> Attended:
    """Run attention, keeping what its own backward needs as far as ``level`` says.

    Args:
        function: Maps q, k, v [B, heads, T, D] to [B, T, heads, D].
        qkv: Queries, keys and values.
        level: What of the layer stays.
    """
    if level.keep < Keep.ATTENTION:
        with torch.no_grad():
            return Attended(function(*qkv))
    places = _Places() if level.keep == Keep.ATTENTION or level.host else None
    with torch.enable_grad(), places.hooks() if places is not None else nullcontext():
        entered = _Enter.apply(torch.empty(0, requires_grad=True), *qkv)
        begin = [get_gradient_edge(x) for x in entered]
        result = function(*entered)
    if places is not None and level.keep == Keep.ATTENTION:
        places.give_up(qkv)
    return Attended(result.detach(), get_gradient_edge(result), begin, places)

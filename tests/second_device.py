"""A second device for a host that has a CPU alone: its tensors keep their numbers, and none of them meets the CPU's.

``torch.device("meta")`` stands for it, since torch's autograd takes that for a device of its own and needs no driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("meta")
_aten = torch.ops.aten


class OnSecond(torch.Tensor):
    """A tensor there; ``held`` are its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnSecond:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=SECOND, **layout)
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"OnSecond({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def held(value: Any) -> Any:
    """The numbers of a tensor, wherever it is."""
    return value.held if isinstance(value, OnSecond) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnSecond)]
    moves = func in (_aten._to_copy.default, _aten.copy_.default)
    if there and not moves and any(not isinstance(t, OnSecond) and t.dim() for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    wanted = kwargs.get("device")
    stays = bool(there) if wanted is None else torch.device(wanted) == SECOND
    plain = tree_map(held, kwargs)
    if wanted is not None and stays:
        plain["device"] = "cpu"
    found = func(*tree_map(held, args), **plain)
    if func is _aten.copy_.default:
        return args[0]
    known = {id(tensor.held): tensor for tensor in there}

    def placed(value: Any) -> Any:
        if not stays or not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnSecond(value)

    return tree_map(placed, found)


class _Moving(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def second_device(monkeypatch: Any) -> Iterator[None]:
    """Inside, there is one; backward runs in this thread."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != SECOND.type and enabled(kind))
    with torch.autograd.set_multithreading_enabled(False), _Moving():
        yield

"""What lazy logits do without being computed: scalar operations, casts, and views that keep the vocabulary whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..roles import plain_tensor
from .chain import Op
from .lazy import Handler, LazyLogits, Node, handles


def _usable(logits: Any) -> bool:
    """Lazy logits whose record may be extended: not computed yet, and tied to the graph in the way we know."""
    return isinstance(logits, LazyLogits) and logits.is_pending()


def _derive(logits: LazyLogits, op: Op) -> LazyLogits:
    node = logits._node
    if op.name == "to":
        dtype = op.value if isinstance(op.value, torch.dtype) else logits.dtype
        device = op.value if isinstance(op.value, torch.device) else logits.device
    else:
        dtype, device = logits.dtype, logits.device
    return LazyLogits.of(Node(node.rows, node.projection.here(), [*node.chain, op]), dtype, device)


def _append(logits: LazyLogits, op: Op) -> Any:
    """Record an operation in place, unless something else shares the memory that stock would write to."""
    node = logits._node
    if node.base is not None or node.viewed or node.projection.grad != torch.is_grad_enabled():
        return NotImplemented
    node.chain.append(op)
    return logits


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scalar_handler(name: str, *, in_place: bool, reflected: bool = True) -> Handler:
    def handler(left: Any, right: Any = None, **kwargs: Any) -> Any:
        if not reflected or isinstance(left, LazyLogits):
            logits, value = left, right
        else:
            logits, value = right, left
        if kwargs or not _usable(logits) or (name != "tanh" and not _is_number(value)):
            return NotImplemented
        op = Op(name, value)
        return _append(logits, op) if in_place else _derive(logits, op)

    return handler


_T = torch.Tensor
handles(_T.mul, _T.__mul__, _T.__rmul__, _T.multiply, torch.mul, torch.multiply)(_scalar_handler("mul", in_place=False))
handles(_T.div, _T.__truediv__, _T.true_divide, _T.divide, torch.div, torch.true_divide, torch.divide)(
    _scalar_handler("div", in_place=False, reflected=False)
)
handles(_T.tanh, torch.tanh)(_scalar_handler("tanh", in_place=False))
handles(_T.mul_, _T.__imul__)(_scalar_handler("mul", in_place=True))
handles(_T.div_, _T.__itruediv__)(_scalar_handler("div", in_place=True, reflected=False))
handles(_T.tanh_, torch.tanh_)(_scalar_handler("tanh", in_place=True))


def _cast(logits: Any, dtype: torch.dtype) -> Any:
    if not _usable(logits) or not dtype.is_floating_point:
        return NotImplemented
    return logits if dtype == logits.dtype else _derive(logits, Op("to", dtype))


for _function, _dtype in (
    (_T.float, torch.float32),
    (_T.double, torch.float64),
    (_T.half, torch.float16),
    (_T.bfloat16, torch.bfloat16),
):

    def _cast_handler(logits: Any, *, _dtype: torch.dtype = _dtype, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _cast(logits, _dtype)

    handles(_function)(_cast_handler)


@handles(_T.to)
def _to(logits: Any, *args: Any, **kwargs: Any) -> Any:
    if not _usable(logits) or kwargs.get("copy") or any(isinstance(x, torch.Tensor) for x in args):
        return NotImplemented
    keywords = {name: value for name, value in kwargs.items() if name != "copy"}
    if any(isinstance(x, bool) for x in args[2:]) or "other" in keywords:
        return NotImplemented
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **keywords)
    if memory_format is not None:
        return NotImplemented
    if device is not None and device.type != "cpu" and device.index is None and device.type == logits.device.type:
        device = logits.device
    if device is not None and device != logits.device:
        logits = _derive(logits, Op("to", device))
    return logits if dtype is None else _cast(logits, dtype)


@handles(_T.type_as)
def _type_as(logits: Any, other: Any) -> Any:
    if not isinstance(logits, LazyLogits) or logits.device != other.device:
        return NotImplemented
    return _cast(logits, other.dtype)


@handles(_T.clone)
def _clone(logits: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    node = logits._node
    if node.existing() is not None or memory_format not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    copy = Node(node.rows, node.projection.here(), [*node.chain])
    if torch.is_grad_enabled() and _usable(logits):
        return LazyLogits.of(copy, logits.dtype, logits.device)
    # Inside an autograd function (DDP's sink): torch ties the result to that function.
    return NotImplemented if torch.is_grad_enabled() else LazyLogits.bare(copy, logits.dtype, logits.device)


def _view(logits: LazyLogits, rows: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> LazyLogits:
    node = logits._node
    node.viewed = True
    return LazyLogits.of(
        Node(rows, node.projection.here(), [*node.chain], base=(node, view)), logits.dtype, logits.device
    )


@handles(_T.detach, torch.detach)
def _detach(logits: Any) -> Any:
    if not _usable(logits):
        return NotImplemented
    with torch.no_grad():
        return _view(logits, logits._node.rows.detach(), lambda x: x.detach())


def _reshape_handler(function: Any) -> Handler:
    def handler(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not _usable(logits) or any(isinstance(x, (torch.dtype, torch.Tensor)) for x in args) or "dtype" in kwargs:
            return NotImplemented
        shape = function(torch.empty(logits.shape, device="meta"), *args, **kwargs).shape
        if not shape or shape[-1] != logits.shape[-1]:
            return NotImplemented
        rows = logits._node.rows
        return _view(logits, rows.reshape(*shape[:-1], rows.shape[-1]), lambda x: function(x, *args, **kwargs))

    return handler


for _function in (_T.view, _T.reshape, _T.flatten, torch.reshape, torch.flatten):
    handles(_function)(_reshape_handler(_function))


@handles(_T.contiguous)
def _contiguous(logits: Any, memory_format: Any = torch.contiguous_format) -> Any:
    return logits if _usable(logits) and memory_format is torch.contiguous_format else NotImplemented


def _index_of_rows(items: tuple[Any, ...], dimensions: int, vocabulary: int) -> tuple[Any, ...] | None:
    """Translate an index of logits that takes the vocabulary whole to one of the hidden states; None for others."""
    for item in items:
        if isinstance(item, torch.Tensor):
            known = plain_tensor(item) and item.dtype in (torch.bool, torch.int64)
        else:
            known = item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int
        if not known:
            return None
    used = sum(
        item.dim() if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1
        for item in items
        if item is not None and item is not Ellipsis
    )
    last = items[-1] if items else slice(None)
    has_ellipsis = any(item is Ellipsis for item in items)
    if used < dimensions and (not has_ellipsis or last is Ellipsis):
        return items
    # The last item indexes the last dimension.
    if isinstance(last, slice) and last.indices(vocabulary) == (0, vocabulary, 1):
        return (*items[:-1], slice(None))
    return None


@handles(_T.__getitem__)
def _getitem(logits: Any, index: Any) -> Any:
    if not _usable(logits):
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    of_rows = _index_of_rows(items, logits.dim(), logits.shape[-1])
    if of_rows is None:
        return NotImplemented
    return _view(logits, logits._node.rows[of_rows], lambda x: x[items])

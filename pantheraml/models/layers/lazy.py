"""Logits that exist when somebody reads them, and not before.

``LazyLogits`` stands where a head's output stands. It holds the hidden states, the head and the chain of scalar
operations that the family applies to its logits (a scale, a soft cap, a cast). Shape, dtype and device are known at
once; slices and reshapes that leave the vocabulary alone apply to the hidden states; a cross entropy
(``models/loss.py``) is computed in chunks. Every other use computes the logits, once, as the stock head does, attached
to the autograd graph.

Three layers keep it an ordinary tensor to everybody else: ``__torch_function__`` sees what Python code does with it; an
autograd node (``_Edge``) ties it to the hidden states and the head, so that code which walks graphs (DDP looking for
unused parameters) finds what stock finds; and ``__torch_dispatch__`` serves C++ code that goes around Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ...errors import ConflictError, UnsupportedError
from .chain import Op
from .projection import Projection

Handler = Callable[..., Any]
# Function seen by __torch_function__ -> what to do instead of computing the logits; NotImplemented computes them.
HANDLERS: dict[Any, Handler] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions called with lazy logits."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


# Attributes and methods that need no logits to be answered.
_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names", "output_nr"),
    *("requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_xla", "is_mps"),
    *("is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_nested"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_inference", "get_device", "__len__", "__hash__"),
)
_METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _PROPERTIES if hasattr(torch.Tensor, name)]
    + [getattr(torch.Tensor, name) for name in _METHODS]
    + [torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference]
)
_GRADIENT_OF_LOGITS = frozenset([torch.Tensor.retain_grad, torch.Tensor.register_hook])


@dataclass
class Node:
    """What lazy logits stand for.

    Attributes:
        rows: Hidden states [..., H] with the leading dimensions of the logits.
        projection: The head.
        chain: Operations on the logits, in order.
        value: The logits, once they were computed.
        base: The node that this one is a view of, with the view, so that writes go through.
        viewed: Whether another node is a view of this one.
        version: Of the hidden states when the node was made; -1 where torch keeps none.
    """

    rows: torch.Tensor
    projection: Projection
    chain: list[Op] = field(default_factory=list)
    value: torch.Tensor | None = None
    base: tuple[Node, Callable[[torch.Tensor], torch.Tensor]] | None = None
    viewed: bool = False
    version: int = -1

    def __post_init__(self) -> None:
        self.version = -1 if self.rows.is_inference() else self.rows._version

    def compute(self, rows: torch.Tensor | None = None, *, grad: bool | None = None) -> torch.Tensor:
        """Compute the logits of ``rows`` (default: all of the node's) through head and chain."""
        with self.projection.circumstances(grad=grad):
            logits = self.projection.logits(self.rows if rows is None else rows)
            for op in self.chain:
                logits = op(logits)
        return logits

    def check_unchanged(self) -> None:
        """Raise when what the logits are computed from was changed since."""
        self.projection.check_unchanged()
        if self.version >= 0 and self.rows._version != self.version:
            raise ConflictError(
                "the logits are read after the hidden states were changed in place",
                where="LazyLogits",
                hint="read outputs.logits first",
            )

    def existing(self) -> torch.Tensor | None:
        """The logits if they were computed, here or where this is a view of."""
        if self.value is None and self.base is not None:
            above = self.base[0].existing()
            if above is not None:
                self.value = self.base[1](above)
        return self.value

    def realise(self, *, for_writing: bool = False) -> torch.Tensor:
        """The logits, computed on the first call; ``for_writing`` makes views share their base's memory."""
        if for_writing and self.base is not None and self.existing() is None:
            self.value = self.base[1](self.base[0].realise(for_writing=True))
        if self.existing() is None:
            self.check_unchanged()
            self.value = self.compute()
        assert self.value is not None
        return self.value


class LazyLogits(torch.Tensor):
    """Logits ``[..., V]`` that are computed when they are read; see the top of this file."""

    _node: Node
    _attached: bool

    @staticmethod
    def bare(node: Node, dtype: torch.dtype, device: torch.device) -> LazyLogits:
        """Make the tensor without an autograd node."""
        shape = (*node.rows.shape[:-1], node.projection.out_features)
        logits = torch.Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=device)
        logits._node = node
        logits._attached = False
        return logits

    @staticmethod
    def of(node: Node, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LazyLogits:
        """Make the tensor, tied to the hidden states and the head where gradients are recorded."""
        dtype, device = dtype or node.projection.dtype, device or node.projection.device
        if not node.projection.grad or not torch.is_grad_enabled():
            return LazyLogits.bare(node, dtype, device)
        logits = _Edge.apply(node, dtype, device, node.rows, *node.projection.trained())
        logits._attached = logits.grad_fn is not None
        return logits

    def _real(self, *, for_writing: bool = False) -> torch.Tensor:
        node = self._node
        if node.existing() is None and not self._attached and self.grad_fn is not None:
            # Passed through somebody's autograd function since: its node, not ours, leads to the head.
            node.check_unchanged()
            node.value = _Realise.apply(self)
        return node.realise(for_writing=for_writing)

    def is_pending(self) -> bool:
        """Whether nothing was computed yet, and a loss may be computed without the logits."""
        return self._node.existing() is None and (self._attached or self.grad_fn is None)

    def source_device(self) -> torch.device:
        """Device of the hidden states."""
        return self._node.rows.device

    def use_without_reading(self) -> Node:
        """Return what the logits stand for, for a loss that does without them.

        Raises:
            ConflictError: The head or the hidden states were changed since the call.
        """
        self._node.check_unchanged()
        self._node.projection.uses.fused = True
        return self._node

    def read(self) -> torch.Tensor:
        """Return the logits as an ordinary tensor, computed if they were not yet."""
        return self._real()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer without the logits where that is possible; compute them otherwise."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if (
            func in _GRADIENT_OF_LOGITS
            and args
            and isinstance(args[0], LazyLogits)
            and args[0]._node.projection.uses.fused
        ):
            raise UnsupportedError(
                "the gradient with respect to these logits does not exist",
                where=f"torch.Tensor.{func.__name__}",
                why="the loss was computed from the hidden states, without the logits",
                hint="undo the swap with pantheraml's restore(model) to train through the logits themselves",
            )
        writing = _writes(func)
        real = tree_map(lambda x: x._real(for_writing=writing) if isinstance(x, LazyLogits) else x, (args, kwargs))
        return func(*real[0], **real[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Serve code that reaches torch's operators without Python functions: it gets the logits' values."""
        values = tree_map(lambda x: _values(x._node) if isinstance(x, LazyLogits) else x, (args, kwargs or {}))
        return func(*values[0], **values[1])


def _values(node: Node) -> torch.Tensor:
    existing = node.existing()
    if existing is not None:
        return existing.detach()
    node.check_unchanged()
    return node.compute(grad=False)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("__")) or name.startswith("__i")


class _Edge(torch.autograd.Function):
    """Ties lazy logits to the hidden states and the head's parameters.

    Its backward runs only for a gradient that arrives at the tensor itself, from C++ code or through ``_Realise``.
    """

    @staticmethod
    def forward(
        ctx: Any, node: Node, dtype: torch.dtype, device: torch.device, rows: torch.Tensor, *trained: torch.Tensor
    ) -> LazyLogits:
        # An absent gradient must stay absent: zeros would be as large as the logits.
        ctx.set_materialize_grads(False)
        ctx.node = node
        ctx.trained = trained
        return LazyLogits.bare(node, dtype, device)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        node, trained = ctx.node, ctx.trained
        none = (None,) * (4 + len(trained))
        if upstream[0] is None:
            return none
        rows = node.rows.detach().requires_grad_(ctx.needs_input_grad[3])
        node.check_unchanged()
        logits = node.compute(rows, grad=True)
        wanted = [x for x, needed in zip((rows, *trained), ctx.needs_input_grad[3:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(logits, wanted, upstream[0], allow_unused=True))
        return (None, None, None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[3:]))


class _Realise(torch.autograd.Function):
    """Values of lazy logits, with the gradient going to the lazy tensor's own autograd node."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        return _values(logits._node)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None]:
        return (upstream[0],)

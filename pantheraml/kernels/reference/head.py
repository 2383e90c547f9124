"""The head's projection in chunks of rows, with every gradient computed while a chunk's logits exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .rows import RowOptions, RowResult, RowStep, accumulation_dtype

# A softmax over 100 k tokens has entries of 1e-6, which float16 holds only as subnormals. Rows are differentiated with
# this factor, taken out again in float32.
HALF_GRADIENT_FACTOR = 64.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the chunk loop needs besides tensors."""

    options: RowOptions
    ignore_index: int
    chunk_tokens: int | None
    compact: bool
    rows: RowStep
    dtype: torch.dtype
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    entropy: bool = False
    top1: bool = False

    @property
    def trains_head(self) -> bool:
        """Whether the weight or the bias needs a gradient."""
        return self.need_weight or self.need_bias

    @property
    def gradient_factor(self) -> float:
        """Factor of the rows' gradients while they are in the compute dtype."""
        return HALF_GRADIENT_FACTOR if self.dtype == torch.float16 else 1.0


class Selection(NamedTuple):
    """The rows that count: ``index`` into the tokens (None: all rows), their labels; their mask if all are kept."""

    index: torch.Tensor | None
    labels: torch.Tensor
    mask: torch.Tensor | None
    rows: int

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the selected rows."""
        return values if self.index is None else values.index_select(0, self.index)

    def silence(self, values: torch.Tensor) -> torch.Tensor:
        """Zero the entries of rows that are kept in place although their label is ignored."""
        return values if self.mask is None else torch.where(self.mask, values, torch.zeros_like(values))

    def spread(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """Put the rows back where they came from, zeros elsewhere."""
        if self.index is None:
            return values
        return values.new_zeros((tokens, *values.shape[1:])).index_copy_(0, self.index, values)


def select(labels: torch.Tensor, plan: Plan, kept: torch.Tensor | None = None) -> Selection:
    """Find the rows whose label counts; ``kept`` are their numbers where the caller knows them."""
    if not plan.compact:
        valid = labels != plan.ignore_index
        return Selection(None, torch.where(valid, labels, 0), valid, labels.shape[0])
    index = (labels != plan.ignore_index).nonzero().squeeze(1) if kept is None else kept
    rows = index.shape[0]
    if rows == labels.shape[0]:
        return Selection(None, labels, None, rows)
    return Selection(index, labels.index_select(0, index), None, rows)


class Chunk(NamedTuple):
    """One chunk: its rows among those of each part, their hidden states and what came out."""

    start: int
    stop: int
    hidden: torch.Tensor
    result: RowResult


class Head:
    """Head projection of selected rows, a chunk at a time, with every gradient that the plan asks for.

    Where rows are divided over devices, a chunk takes some rows of each ``part``: with neighbouring rows, those of few
    devices would be sent to all the others.

    Args:
        hidden: [n, H].
        weight: [V, H].
        bias: [V] or None.
        selection: The rows that count.
        plan: What else is known.
        size: Rows of a chunk in each part.
        parts: Parts that the selected rows are divided into, of equal length.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        selection: Selection,
        plan: Plan,
        size: int,
        parts: int = 1,
    ) -> None:
        self.hidden = hidden
        self.weight = weight.to(plan.dtype)
        self.bias = None if bias is None else bias.to(plan.dtype)
        self.selection = selection
        self.plan = plan
        self.size = size
        self.parts = parts
        self.hidden_gradient: torch.Tensor | None = None
        self.weight_gradient: torch.Tensor | None = None
        self.bias_gradient: torch.Tensor | None = None

    def _rows(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of each part."""
        if self.parts == 1:
            return values[start:stop]
        return values.unflatten(0, (self.parts, -1))[:, start:stop].flatten(0, 1)

    def put(self, start: int, stop: int, values: torch.Tensor, total: torch.Tensor) -> None:
        """Write a chunk's values to their rows of ``total``."""
        if self.parts == 1:
            total[start:stop] = values
        else:
            parted = values.unflatten(0, (self.parts, -1))
            total.unflatten(0, (self.parts, -1))[:, start:stop] = parted

    def _project(self, rows: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
        out = None if buffer is None else buffer[: rows.shape[0]]
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)

    def _allocate(self, hidden: bool, head: bool) -> None:
        vocabulary, width = self.weight.shape
        like, wide = self.weight, accumulation_dtype(self.plan.dtype)
        if hidden:
            self.hidden_gradient = like.new_empty((self.selection.rows, width))
        if head and self.plan.need_weight:
            # Chunks add up in float32: in bfloat16 every addition would round the whole matrix again.
            single = self.selection.rows <= self.size * self.parts
            self.weight_gradient = like.new_zeros((vocabulary, width), dtype=like.dtype if single else wide)
        if head and self.plan.need_bias:
            self.bias_gradient = like.new_zeros((vocabulary,), dtype=wide)

    def _differentiate(self, start: int, stop: int, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        if self.hidden_gradient is not None and self.parts == 1:
            torch.mm(gradient, self.weight, out=self.hidden_gradient[start:stop])
        elif self.hidden_gradient is not None:
            self.put(start, stop, gradient @ self.weight, self.hidden_gradient)
        if self.weight_gradient is not None:
            _add_product(self.weight_gradient, gradient.t(), rows)
        if self.bias_gradient is not None:
            self.bias_gradient += gradient.sum(0, dtype=self.bias_gradient.dtype)

    def chunks(self, coefficients: torch.Tensor, *, hidden: bool, head: bool) -> Iterator[Chunk]:
        """Yield each chunk's row results after its gradients have been added to those of the whole."""
        plan, selection = self.plan, self.selection
        self._allocate(hidden, head)
        gradient = hidden or (head and plan.trains_head)
        buffer = None
        if self.hidden.device.type != "xla":
            buffer = self.weight.new_empty((min(self.size, selection.rows), self.weight.shape[0]))
        length = selection.rows // self.parts
        for start in range(0, length, self.size):
            stop = min(start + self.size, length)
            if selection.index is None:
                rows = self._rows(self.hidden, start, stop)
            else:
                rows = self.hidden.index_select(0, selection.index[start:stop])
            rows = rows.to(plan.dtype)
            if selection.mask is not None:
                # A row that does not count may hold anything, and zero times NaN is NaN.
                counts = self._rows(selection.mask, start, stop).unsqueeze(1)
                rows = torch.where(counts, rows, torch.zeros_like(rows))
            result = plan.rows(
                self._project(rows, buffer),
                self._rows(selection.labels, start, stop),
                self._rows(coefficients, start, stop),
                plan.options,
                gradient=gradient,
                entropy=plan.entropy,
                top1=plan.top1,
            )
            if result.gradient is not None:
                self._differentiate(start, stop, rows, result.gradient)
            yield Chunk(start, stop, rows, result)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right`` with the sum in total's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left.to(total.dtype) @ right.to(total.dtype)


def scaled(values: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """``values * factor`` computed in the factor's dtype; ``factor`` must have a dimension so that it promotes."""
    if values is None:
        return None
    if values.is_cuda:
        # One pass: the product is rounded as it is stored.
        return torch.mul(values, factor, out=torch.empty_like(values, dtype=dtype))
    return (values * factor).to(dtype)

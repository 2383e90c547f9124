"""Head projection and cross entropy in chunks of tokens: the specification, and the CPU and XLA implementation.

The chunk loop (``head.py``) serves every backend. What differs is one step, ``RowStep``: from a chunk of logits to the
losses of its rows and the gradient with respect to those logits. ``rows.py`` has the formulas and that step in plain
torch; the Triton step lives in ``kernels/cross_entropy.py`` and is handed in by ``kernels/linear_cross_entropy.py``.
Logits are in the compute dtype (the matrix product's), everything after them is in float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from ... import xla_runtime
from ...errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from .._once import once_differentiable
from .head import Head, Plan, Selection, scaled, select
from .rows import RowOptions, RowStep, accumulation_dtype, eager_rows

# One chunk's logits on a device, in the compute dtype. 2,048 rows of a 128 k vocabulary fill a GPU's matrix units.
CHUNK_BYTES = {"cuda": 512 * 2**20, "xpu": 512 * 2**20, "xla": 256 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20
ROW_MULTIPLE = 128


class LogProbs(NamedTuple):
    """Result of ``linear_log_probs``; every tensor has the shape of the labels.

    Attributes:
        log_probs: Log-probability of each label, float32, zero where the label is ignored. Differentiable.
        entropy: Entropy of each row's distribution in nats, float32, zero where ignored; None unless asked for.
        is_top1: Whether the label has the largest logit, bool, False where ignored; None unless asked for.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    is_top1: torch.Tensor | None


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: str, chunk_tokens: int | None = None) -> int:
    """How many rows a chunk takes: within the device's budget, of about equal size, a multiple of 128 when large.

    Args:
        rows: Rows in all.
        vocabulary: Width of a row of logits.
        dtype: Dtype of the logits.
        device: Device type.
        chunk_tokens: The caller's wish, taken as it is.
    """
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens}", where="chunk_tokens")
        return chunk_tokens
    limit = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE) // max(1, vocabulary * dtype.itemsize))
    if limit > ROW_MULTIPLE:
        limit -= limit % ROW_MULTIPLE
    chunks = max(1, -(-rows // limit))
    even = max(1, -(-rows // chunks))
    return min(limit, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, selection: Selection, plan: Plan
) -> Head:
    kind = hidden.device.type
    # One process has the rows of all XLA devices.
    parts = math.gcd(selection.rows, xla_runtime.device_count()) if kind == "xla" and not plan.compact else 1
    size = chunk_rows(selection.rows // parts, weight.shape[0], plan.dtype, kind, plan.chunk_tokens)
    if plan.chunk_tokens is not None:
        size = max(1, size // parts)
    return Head(hidden, weight, bias, selection, plan, size, parts)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        token_weights: torch.Tensor | None,
        num_items: torch.Tensor | None,
        mean: bool,
        plan: Plan,
    ) -> torch.Tensor:
        wide = accumulation_dtype(plan.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            selection = select(labels, plan)
            if token_weights is None:
                weights = torch.ones(selection.rows, dtype=wide, device=hidden.device)
            else:
                weights = selection.take(token_weights).to(wide)
            weights = selection.silence(weights)
            head = _head(hidden, weight, bias, selection, plan)
            losses = torch.zeros_like(weights)
            coefficients = weights * plan.gradient_factor
            for chunk in head.chunks(coefficients, hidden=plan.need_hidden, head=plan.trains_head):
                head.put(chunk.start, chunk.stop, chunk.result.loss, losses)
            total = torch.dot(losses, weights)
            if num_items is not None:
                denominator = num_items.to(device=hidden.device, dtype=wide)
            else:
                denominator = weights.sum() if mean else torch.ones_like(total)
            scale = torch.where(denominator > 0, 1.0 / denominator, torch.zeros_like(denominator))
        ctx.selection = selection
        ctx.tokens = hidden.shape[0]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.factor = plan.gradient_factor
        ctx.save_for_backward(head.hidden_gradient, head.weight_gradient, head.bias_gradient, scale)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, scale = ctx.saved_tensors
        factor = (upstream[0] * scale / ctx.factor).reshape(1)
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = scaled(hidden, factor, hidden_dtype)
        if grad_hidden is not None:
            grad_hidden = ctx.selection.spread(grad_hidden, ctx.tokens)
        grad_bias = None if bias is None else scaled(bias, factor, bias_dtype)
        return grad_hidden, scaled(weight, factor, weight_dtype), grad_bias, None, None, None, None, None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        kept: torch.Tensor | None,
        plan: Plan,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        wide = accumulation_dtype(plan.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            selection = select(labels, plan, kept)
            head = _head(hidden, weight, bias, selection, plan)
            coefficients = torch.full((selection.rows,), -plan.gradient_factor, dtype=wide, device=hidden.device)
            coefficients = selection.silence(coefficients)
            log_probs = torch.zeros_like(coefficients)
            entropy = torch.zeros_like(coefficients) if plan.entropy else None
            top1 = torch.zeros_like(coefficients, dtype=torch.bool) if plan.top1 else None
            # With a frozen head, the gradient for an upstream of 1 is all the backward needs: it scales its rows.
            ahead = plan.need_hidden and not plan.trains_head
            for start, stop, _, result in head.chunks(coefficients, hidden=ahead, head=False):
                head.put(start, stop, -result.loss, log_probs)
                if entropy is not None and result.entropy is not None:
                    head.put(start, stop, result.entropy, entropy)
                if top1 is not None and result.is_top1 is not None:
                    head.put(start, stop, result.is_top1, top1)
            outputs = tuple(
                None if values is None else selection.spread(selection.silence(values), hidden.shape[0])
                for values in (log_probs, entropy, top1)
            )
        ctx.mark_non_differentiable(*(values for values in outputs[1:] if values is not None))
        ctx.plan = plan
        ctx.selection = selection
        ctx.tokens = hidden.shape[0]
        ctx.hidden_dtype = hidden.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ahead:
            ctx.save_for_backward(head.hidden_gradient)
        elif plan.trains_head:
            ctx.save_for_backward(hidden, weight, bias)
        return outputs  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        plan, selection = ctx.plan, ctx.selection
        grad = selection.silence(selection.take(upstream[0]))
        if not plan.trains_head:
            (unit,) = ctx.saved_tensors
            rows = scaled(unit, (grad / plan.gradient_factor).unsqueeze(1), ctx.hidden_dtype)
            return selection.spread(rows, ctx.tokens), None, None, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(hidden, weight, bias, selection, plan)
            for _ in head.chunks(grad * -plan.gradient_factor, hidden=plan.need_hidden, head=True):
                pass
            factor = grad.new_full((1,), 1.0 / plan.gradient_factor)
            grad_hidden = scaled(head.hidden_gradient, factor, hidden.dtype)
            if grad_hidden is not None:
                grad_hidden = selection.spread(grad_hidden, ctx.tokens)
            grad_weight = scaled(head.weight_gradient, factor, weight.dtype)
            grad_bias = None if head.bias_gradient is None else scaled(head.bias_gradient, factor, ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply here: autocast's where it is on, else the hidden states' own."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor | Callable[[], torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments; return flattened hidden states, the weight and flattened labels."""
    matrix = weight if isinstance(weight, torch.Tensor) else weight()
    where = "linear cross entropy"
    if hasattr(matrix, "full_tensor"):
        raise UnsupportedError(
            "the head's weight is a DTensor",
            where=where,
            hint="pass weight=lambda: weight.full_tensor(), which gathers it (and carries its gradient back)",
        )
    if matrix.dim() != 2 or hidden.dim() < 1 or matrix.shape[1] != hidden.shape[-1]:
        raise ConfigError(
            f"hidden {list(hidden.shape)} and weight {list(matrix.shape)} do not fit",
            where=where,
            hint="hidden is [..., H] and weight [V, H]",
        )
    if labels.shape != hidden.shape[:-1]:
        raise ConfigError(
            f"labels {list(labels.shape)} do not fit hidden {list(hidden.shape)}", where=where, hint="labels are [...]"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"labels must be int64 or int32, not {labels.dtype}", where=where)
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise ConfigError(f"bias {list(bias.shape)} does not fit weight {list(matrix.shape)}", where=where)
    devices = {tensor.device for tensor in (hidden, matrix, labels, bias) if tensor is not None}
    if len(devices) > 1:
        raise ConfigError(f"tensors on several devices: {sorted(map(str, devices))}", where=where)
    return hidden.reshape(-1, hidden.shape[-1]), matrix, labels.reshape(-1).to(torch.int64)


def _plan(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: RowOptions,
    *,
    ignore_index: int,
    chunk_tokens: int | None,
    compact: bool | None,
    rows: RowStep,
    entropy: bool = False,
    top1: bool = False,
) -> Plan:
    recording = torch.is_grad_enabled()
    return Plan(
        options=options,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        compact=hidden.device.type != "xla" if compact is None else compact,
        rows=rows,
        dtype=compute_dtype(hidden),
        need_hidden=recording and hidden.requires_grad,
        need_weight=recording and weight.requires_grad,
        need_bias=recording and bias is not None and bias.requires_grad,
        entropy=entropy,
        top1=top1,
    )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | Callable[[], torch.Tensor],
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weights: torch.Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    num_items: torch.Tensor | int | float | None = None,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    rows: RowStep = eager_rows,
) -> torch.Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against labels; see ``kernels.linear_cross_entropy``.

    Args:
        rows: The step from logits to losses and gradient.

    The other arguments, the result and the errors are those of ``kernels.linear_cross_entropy.linear_cross_entropy``.
    """
    options = RowOptions(label_smoothing, soft_cap, logit_scale, 1.0, z_loss)
    flat, matrix, flat_labels = _prepare(hidden, weight, labels, bias)
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"unknown reduction {reduction!r}", where="reduction", hint="use 'mean' or 'sum'")
    if num_items is not None and reduction == "sum":
        raise ConflictError("num_items divides the loss, which reduction='sum' forbids", where="num_items")
    if token_weights is not None:
        if token_weights.shape != labels.shape:
            raise ConfigError(
                f"token_weights {list(token_weights.shape)} do not fit labels {list(labels.shape)}",
                where="token_weights",
            )
        if token_weights.requires_grad:
            raise UnsupportedError(
                "token_weights get no gradient", where="token_weights", hint="detach them, or use linear_log_probs"
            )
        token_weights = token_weights.reshape(-1)
    if num_items is not None and not isinstance(num_items, torch.Tensor):
        num_items = torch.tensor(float(num_items))
    plan = _plan(
        hidden,
        matrix,
        bias,
        options,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        compact=compact,
        rows=rows,
    )
    arguments = (flat, matrix, bias, flat_labels, token_weights, num_items, reduction == "mean", plan)
    return _LinearCrossEntropy.apply(*arguments)


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor | Callable[[], torch.Tensor],
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    top1: bool = False,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    kept: torch.Tensor | None = None,
    rows: RowStep = eager_rows,
) -> LogProbs:
    """Log-probability of every label under ``softmax(hidden @ weight.T + bias)``; see ``kernels.linear_log_probs``.

    Args:
        rows: The step from logits to losses and gradient.

    The other arguments, the result and the errors are those of ``kernels.linear_cross_entropy.linear_log_probs``.
    """
    options = RowOptions(0.0, soft_cap, logit_scale, temperature, 0.0)
    flat, matrix, flat_labels = _prepare(hidden, weight, labels, bias)
    plan = _plan(
        hidden,
        matrix,
        bias,
        options,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        compact=compact,
        rows=rows,
        entropy=entropy,
        top1=top1,
    )
    if kept is not None and not plan.compact:
        raise ConflictError(
            "kept lists rows to compute, and all rows are computed in place",
            where="linear_log_probs, arguments kept and compact",
            hint="leave kept out, or pass compact=True",
        )
    if kept is not None and (kept.dim() != 1 or kept.dtype != torch.int64 or kept.device != flat.device):
        raise ConfigError(
            f"kept is {kept.dtype} {list(kept.shape)} on {kept.device}",
            where="linear_log_probs",
            hint=f"it is a list of rows: int64 [n] on {flat.device}",
        )
    log_probs, row_entropy, is_top1 = _LinearLogProbs.apply(flat, matrix, bias, flat_labels, kept, plan)
    return LogProbs(
        log_probs.view(labels.shape),
        None if row_entropy is None else row_entropy.view(labels.shape),
        None if is_top1 is None else is_top1.view(labels.shape),
    )

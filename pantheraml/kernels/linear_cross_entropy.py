"""Linear cross entropy and per-token log-probabilities: head projection and softmax without ever holding all logits.

A chunk of logits is made by torch's matrix product into a buffer that all chunks share, turned into losses and, in
place, into its own gradient by one Triton kernel, and multiplied back to the hidden states (and the head) at once. So a
frozen head costs two matrix products and one read and one write of the logits; the backward scales what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from . import dispatch
from .cross_entropy import triton_rows
from .reference import linear_cross_entropy as reference
from .reference.linear_cross_entropy import LogProbs
from .reference.rows import RowStep

__all__ = ["LogProbs", "linear_cross_entropy", "linear_log_probs"]


def _rows(op: str, hidden: torch.Tensor, backend: str) -> RowStep:
    # The kernel sees logits, whose dtype is autocast's where it is on.
    like = hidden.new_empty((0,), dtype=reference.compute_dtype(hidden))
    return triton_rows if dispatch.resolve(op, like, backend) == "triton" else reference.eager_rows


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
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against labels, the gradient computed in the forward.

    ``z = logit_scale * (hidden @ weight.T + bias)``, then ``soft_cap * tanh(z / soft_cap)``; a row's loss is
    ``(1 - label_smoothing) * (lse - z[label]) + label_smoothing * (lse - mean(z)) + z_loss * lse**2`` with
    ``lse = logsumexp(z)``. Never more than one chunk of logits exists. Where no gradient is recorded none is computed.
    It can be differentiated once. Deterministic as far as torch's matrix product is.

    Dtypes follow ``F.linear``: under autocast the product is in autocast's dtype, otherwise in that of ``hidden`` (to
    which a head of another dtype is cast); casts are explicit and autocast is off inside. Softmax and losses are in
    float32, a trained head's gradient is summed over chunks in float32 (all in float64 for float64). Gradients come
    back in the dtype of what they belong to.

    Args:
        hidden: [..., H], the hidden states that predict ``labels``.
        weight: [V, H], or a function that returns it (dequantised, gathered), called once. A returned tensor that
            requires a gradient receives it.
        labels: [...], int64 or int32, already shifted. A label outside [0, V) that is not ``ignore_index`` raises in
            the reference and makes the loss NaN in the kernel.
        bias: [V] or None (default).
        ignore_index: Rows with this label are left out. Default -100.
        label_smoothing: In [0, 1). Default 0.
        soft_cap: Positive, or None (default).
        logit_scale: Factor of the raw logits. Default 1.
        z_loss: Factor of the squared log-sum-exp, see PaLM (https://arxiv.org/abs/2204.02311). Default 0.
        token_weights: [...], factor of each row's loss, without gradient. Default None: ones.
        reduction: ``"mean"`` (default) or ``"sum"``.
        num_items: What the mean divides by, for a mean over an accumulation window. Default None: the sum of the
            weights of the rows that count (their number without weights). A divisor of zero gives a loss of zero.
        chunk_tokens: Rows of a chunk. Default None: as many as keep a chunk of logits within 512 MiB on a GPU.
        compact: Whether rows with ignored labels are taken out before the product (this asks the GPU how many are
            left). Default None: yes, except on XLA, where a shape that depends on data means a new compilation.
        backend: See ``dispatch.resolve``.

    Returns:
        Scalar loss, float32 (float64 for float64). Zero, with zero gradients, when no row counts.

    Raises:
        ConfigError: Shapes, devices or options do not fit.
        ConflictError: ``num_items`` with ``reduction="sum"``.
        UnsupportedError: The weight is a DTensor, ``token_weights`` requires a gradient, or ``backend`` cannot be
            honoured.
    """
    return reference.linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        z_loss=z_loss,
        token_weights=token_weights,
        reduction=reduction,
        num_items=num_items,
        chunk_tokens=chunk_tokens,
        compact=compact,
        rows=_rows("linear_cross_entropy", hidden, backend),
    )


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
    backend: dispatch.Backend = "auto",
) -> LogProbs:
    """Log-probability of each label under ``softmax(z / temperature)``, for preference and reinforcement learning.

    ``log_prob = z[label] / temperature - logsumexp(z / temperature)`` in float32, ``z`` as in ``linear_cross_entropy``,
    deterministic. With a frozen head the forward also computes each row's gradient for an
    upstream of one, and the backward multiplies it by the upstream gradient: two matrix products in all. With a trained
    head (weight or bias) the backward computes the logits again, chunk by chunk. It can be differentiated once.

    Args:
        hidden: [..., H].
        weight: [V, H] or a function that returns it; see ``linear_cross_entropy``.
        labels: [...], int64 or int32, already shifted.
        bias: [V] or None (default).
        ignore_index: Rows with this label are left out. Default -100.
        soft_cap: Positive, or None (default).
        logit_scale: Factor of the raw logits. Default 1.
        temperature: Divides the logits, after the cap. Default 1.
        entropy: Also return each row's entropy, without gradient. Default False.
        top1: Also return whether the label's logit is the largest. Default False.
        chunk_tokens: Rows of a chunk; see ``linear_cross_entropy``.
        compact: See ``linear_cross_entropy``.
        kept: Numbers of the rows whose label counts, in rising order, int64 [n] into the flattened labels; not with
            ``compact=False``. None (default) finds them in the labels, for which the host waits for the device.
        backend: See ``dispatch.resolve``.

    Returns:
        ``LogProbs(log_probs, entropy, is_top1)``, each [...]; float32 (float64 for float64), zero where ignored.

    Raises:
        ConfigError: Shapes, devices or options do not fit.
        ConflictError: ``kept`` where rows are not compacted.
        UnsupportedError: The weight is a DTensor, or ``backend`` cannot be honoured.
    """
    return reference.linear_log_probs(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        temperature=temperature,
        entropy=entropy,
        top1=top1,
        chunk_tokens=chunk_tokens,
        compact=compact,
        kept=kept,
        rows=_rows("linear_log_probs", hidden, backend),
    )

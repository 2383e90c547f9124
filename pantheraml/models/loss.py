"""Losses from lazy logits: cross entropy, and log-probabilities a token, in chunks of the vocabulary projection.

A model's own loss function, a trainer's, or a user's ends in ``torch.nn.functional.cross_entropy``. Called with lazy
logits it is computed by ``kernels.linear_cross_entropy`` where the head is one product followed by a scale and a soft
cap, and otherwise chunk by chunk through the real head with autograd, recomputing each chunk in the backward. So the
family's own forward is what decides how logits are scaled, and no loss function has to be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import kernels, xla_runtime
from ..errors import unknown_arguments
from .layers.chain import Affine, as_affine
from .layers.lazy import LazyLogits, Node, handles

__all__ = ["TokenStatistics", "supervised", "token_statistics"]

# Float32 logits of one chunk where the head has to be called as it is.
CHUNK_BYTES = 128 * 2**20


def _bounds(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def supervised(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor | None:
    """Numbers of the labels that count, int64 [n] into the flattened labels; None on XLA, where shapes are fixed.

    The host waits until the labels' device comes to it: before a forward that is no time, after it all of the forward.
    """
    if labels.device.type == "xla":
        return None
    return (labels.reshape(-1) != ignore_index).nonzero().squeeze(1)


def _per_chunk(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Run a function of a chunk; its logits are computed again in the backward instead of being kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    if tensors[0].device.type == "xla":
        return xla_runtime.checkpoint(function, *tensors)
    return checkpoint(function, *tensors, use_reentrant=False)


# ---------------------------------------- cross entropy


@handles(F.cross_entropy)
def _cross_entropy(
    input: Any,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``F.cross_entropy`` of lazy logits [N, V]; NotImplemented for forms that need the logits."""
    if not isinstance(input, LazyLogits) or isinstance(target, LazyLogits):
        return NotImplemented
    chunkable = (
        input.is_pending()
        and input.dim() == 2
        and target.dim() == 1
        and target.shape[0] == input.shape[0]
        and target.dtype == torch.int64
        and target.device == input.device == input.source_device()
        and weight is size_average is reduce is None
        and reduction in ("mean", "sum")
    )
    if not chunkable:
        return NotImplemented
    node = input.use_without_reading()
    with node.projection.here().circumstances():
        loss = _linear_cross_entropy(node, target, ignore_index, reduction, label_smoothing)
    # Autocast takes cross entropies in float32.
    widened = torch.is_autocast_enabled(input.device.type) and input.dtype in (torch.float16, torch.bfloat16)
    return loss.to(torch.float32 if widened else input.dtype)


def _linear_cross_entropy(
    node: Node, labels: torch.Tensor, ignore_index: int, reduction: Any, label_smoothing: float
) -> torch.Tensor:
    linear, affine = node.projection.linear(), as_affine(node.chain)
    if linear is not None and affine is not None:
        weight, bias = linear
        return kernels.linear_cross_entropy(
            node.rows,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            soft_cap=affine.soft_cap,
            logit_scale=affine.logit_scale,
            reduction=reduction,
        )
    rows, targets, kept = node.rows, labels, supervised(labels, ignore_index)
    if kept is not None and kept.numel() < labels.numel():
        rows, targets = rows[kept], labels[kept]

    def chunk_loss(chunk: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            node.compute(chunk, grad=torch.is_grad_enabled()).float(),
            targets,
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    # Keeps an all-ignored batch connected to the model.
    total = node.rows[:0].sum(dtype=torch.float32)
    for start, stop in _bounds(rows.shape[0], node.projection.out_features):
        total = total + _per_chunk(chunk_loss, rows[start:stop], targets[start:stop])
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


# ---------------------------------------- tokens one by one


@dataclass
class TokenStatistics:
    """Statistics of the distribution at each position; all have the labels' shape and are zero where it is ignored.

    Attributes:
        log_probs: Log-probability of the label, float32, differentiable.
        entropy: Entropy in nats, float32, differentiable.
        is_top1: Whether the label is the likeliest token, bool.
        mean_logits: Mean of the scaled logits over the vocabulary, float32.
        log_sum_sq_probs: ``log(sum_v p_v**2)``, float32.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    outputs: tuple[str, ...] = (),
    temperature: float = 1.0,
    ignore_index: int = -100,
    float32: bool = False,
    kept: torch.Tensor | None = None,
) -> TokenStatistics:
    """Log-probability of each label, and more, without the logits where they are lazy.

    Args:
        logits: [..., V]; row i predicts label i.
        labels: [...], int64.
        outputs: Names of further fields of ``TokenStatistics`` to compute.
        temperature: Divides the logits.
        ignore_index: Label of positions that do not count.
        float32: Take the head's product in float32, outside autocast.
        kept: What :func:`supervised` says of the labels. None (default) asks it now, when the device may be busy.

    Returns:
        The statistics; fields that were not asked for are None.
    """
    unknown = set(outputs) - set(_STATISTICS)
    if unknown:
        raise unknown_arguments(unknown, _STATISTICS, where="token_statistics, argument outputs")
    names = tuple(dict.fromkeys(("log_probs", *outputs)))
    source = _Source.of(logits.reshape(-1, logits.shape[-1]), temperature, float32=float32)
    targets = labels.reshape(-1).to(source.rows.device)
    if kept is None or targets.device.type == "xla":
        # The labels may come from a host whose head is on XLA.
        kept = supervised(targets, ignore_index)
    else:
        kept = kept.to(targets.device)
    with source.circumstances():
        if source.linear is not None and source.affine is not None:
            values = _by_kernel(source, targets, kept, names, ignore_index, temperature)
        else:
            values = _by_chunk(source, source.rows, targets, kept, names, ignore_index)
    shaped = {name: value.view(labels.shape).to(labels.device) for name, value in values.items()}
    return TokenStatistics(**shaped)


@dataclass
class _Source:
    """Where logits come from: ``logits(rows[i:j])`` are those of positions i to j, divided by the temperature."""

    rows: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    circumstances: Callable[[], AbstractContextManager[None]]
    vocabulary: int
    linear: tuple[torch.Tensor | Callable[[], torch.Tensor], torch.Tensor | None] | None = None
    affine: Affine | None = None
    trained: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float, *, float32: bool) -> _Source:
        """Take real logits [N, V] as they are, and lazy ones apart."""
        vocabulary = logits.shape[-1]
        if not isinstance(logits, LazyLogits) or not logits.is_pending():
            real = logits.read() if isinstance(logits, LazyLogits) else logits
            return cls(real, lambda rows: rows.float() / temperature, nullcontext, vocabulary)
        node = logits.use_without_reading()
        projection, rows = node.projection.here(), node.rows
        if float32:
            projection, rows = projection.in_float32(), rows.float()
        node = Node(rows, projection, node.chain)
        return cls(
            rows,
            lambda part: node.compute(part, grad=torch.is_grad_enabled()).float() / temperature,
            projection.circumstances,
            vocabulary,
            projection.linear(),
            as_affine(node.chain),
            tuple(projection.trained()),
        )


def _entropy(z: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return lse - (torch.softmax(z, dim=-1) * z).sum(-1)


# Name -> function of a chunk's logits [n, V], their log-sum-exp [n] and labels [n].
_STATISTICS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "log_probs": lambda z, lse, targets: z.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - lse,
    "entropy": _entropy,
    "is_top1": lambda z, lse, targets: (z.argmax(-1) == targets).float(),
    "mean_logits": lambda z, lse, targets: z.mean(-1),
    "log_sum_sq_probs": lambda z, lse, targets: torch.logsumexp(2 * z, -1) - 2 * lse,
}
_DIFFERENTIABLE = ("log_probs", "entropy")


def _by_chunk(
    source: _Source,
    rows: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor | None,
    names: tuple[str, ...],
    ignore_index: int,
) -> dict[str, torch.Tensor]:
    """Compute statistics through the real logits of one chunk of supervised positions at a time."""
    valid = labels != ignore_index
    if kept is None:
        kept = torch.arange(labels.numel(), device=labels.device)

    def chunk(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        z = source.logits(part)
        lse = torch.logsumexp(z, dim=-1)
        values = [_STATISTICS[name](z, lse, targets) for name in names]
        return torch.stack(
            [v if name in _DIFFERENTIABLE else v.detach() for name, v in zip(names, values, strict=True)]
        )

    total = torch.zeros(len(names), labels.numel(), dtype=torch.float32, device=rows.device)
    # Keeps an all-ignored batch connected to the model.
    total = total + rows[:0].sum(dtype=torch.float32)
    for start, stop in _bounds(kept.numel(), source.vocabulary):
        index = kept[start:stop]
        values = _per_chunk(chunk, rows[index], labels[index].clamp_min(0))
        total = total.index_copy(1, index, values.float())
    total = total * valid
    return {
        name: values
        if name in _DIFFERENTIABLE
        else values.detach().to(torch.bool if name == "is_top1" else values.dtype)
        for name, values in zip(names, total.unbind(0), strict=True)
    }


def _by_kernel(
    source: _Source,
    labels: torch.Tensor,
    kept: torch.Tensor | None,
    names: tuple[str, ...],
    ignore_index: int,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """Compute statistics with ``kernels.linear_log_probs``, and what it does not know without gradient."""
    assert source.linear is not None
    assert source.affine is not None
    weight, bias = source.linear
    if callable(weight) and not isinstance(weight, torch.Tensor):
        weight = weight()
    result = kernels.linear_log_probs(
        source.rows,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        soft_cap=source.affine.soft_cap,
        logit_scale=source.affine.logit_scale,
        temperature=temperature,
        entropy="entropy" in names,
        top1="is_top1" in names,
        kept=kept,
    )
    values: dict[str, torch.Tensor] = {"log_probs": result.log_probs}
    if result.is_top1 is not None:
        values["is_top1"] = result.is_top1
    if result.entropy is not None:
        values["entropy"] = result.entropy
        if torch.is_grad_enabled() and (source.rows.requires_grad or source.trained):
            values["entropy"] = _Entropy.apply(
                source, labels, kept, ignore_index, result.entropy, source.rows, *source.trained
            )
    rest = [name for name in names if name not in values]
    with torch.no_grad():
        if "mean_logits" in rest and source.affine.soft_cap is None:
            # The mean over the vocabulary commutes with the product.
            mean = source.rows.float() @ weight.mean(dim=0, dtype=torch.float32)
            mean = mean if bias is None else mean + bias.mean(dtype=torch.float32)
            scaled = mean * (source.affine.logit_scale / temperature)
            values["mean_logits"] = scaled.masked_fill(labels == ignore_index, 0.0)
            rest.remove("mean_logits")
        if rest:
            values |= _by_chunk(source, source.rows, labels, kept, tuple(rest), ignore_index)
    return values


class _Entropy(torch.autograd.Function):
    """Entropies that a kernel computed, with a gradient that is computed, through real logits, if one is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        source: _Source,
        labels: torch.Tensor,
        kept: torch.Tensor | None,
        ignore_index: int,
        entropy: torch.Tensor,
        rows: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.source, ctx.labels, ctx.kept, ctx.ignore_index = source, labels, kept, ignore_index
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        source: _Source = ctx.source
        needed = ctx.needs_input_grad[5:]
        if upstream[0] is None:
            return (None,) * (5 + len(needed))
        with source.circumstances(), torch.enable_grad():
            rows = source.rows.detach().requires_grad_(needed[0])
            entropy = _by_chunk(source, rows, ctx.labels, ctx.kept, ("entropy",), ctx.ignore_index)["entropy"]
            wanted = [x for x, wants in zip((rows, *source.trained), needed, strict=True) if wants]
            gradients = iter(torch.autograd.grad(entropy, wanted, upstream[0], allow_unused=True))
        return (None, None, None, None, None, *(next(gradients) if wants else None for wants in needed))

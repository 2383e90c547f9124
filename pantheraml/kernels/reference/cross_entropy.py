"""Cross entropy over logits in plain torch: the specification, and the CPU and XLA implementation."""

from __future__ import annotations

from typing import Literal

import torch

from .rows import RowOptions, accumulation_dtype


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: RowOptions,
    *,
    ignore_index: int = -100,
    token_weights: torch.Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> torch.Tensor:
    """Cross entropy of logits [N, V] against labels [N], differentiable by autograd.

    Everything after the logits is in float32 (float64 for float64 logits). The formulas are those at the top of
    ``reference/rows.py``; arguments and result are those of ``kernels.cross_entropy.cross_entropy``.
    """
    wide = accumulation_dtype(logits.dtype)
    valid = labels != ignore_index
    # An ignored row may hold anything, and zero times NaN is NaN in the backward too.
    z = torch.where(valid.unsqueeze(1), logits, torch.zeros_like(logits)).to(wide) * options.logit_scale
    if options.soft_cap is not None:
        z = options.soft_cap * torch.tanh(z / options.soft_cap)
    z = z / options.temperature
    lse = torch.logsumexp(z, dim=1)
    loss = lse - z.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
    if options.label_smoothing:
        loss = (1.0 - options.label_smoothing) * loss + options.label_smoothing * (lse - z.mean(dim=1))
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    weights = valid.to(wide) if token_weights is None else torch.where(valid, token_weights.to(wide), 0.0)
    loss = loss * weights
    if reduction == "none":
        return loss
    return loss.sum() * reciprocal(weights.sum()) if reduction == "mean" else loss.sum()


def reciprocal(value: torch.Tensor) -> torch.Tensor:
    """``1 / value``, and zero where the value is zero: the mean of no rows is zero."""
    return torch.where(value > 0, 1.0 / value, torch.zeros_like(value))

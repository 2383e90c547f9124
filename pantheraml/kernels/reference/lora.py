"""LoRA layers in plain torch, differentiable by autograd: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

AdapterTensors = tuple[torch.Tensor, torch.Tensor, float]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[AdapterTensors],
    *,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias + sum_i s_i * (drop(x) @ A_i.T) @ B_i.T``, or DoRA when ``magnitude`` is given.

    DoRA (https://arxiv.org/abs/2402.09353) with ``V = W + s * B @ A`` and ``f = magnitude / ||V||`` (the norm of each
    row of V, held constant in the backward as in section 4.3)::

        y = f * (x @ W.T + s * (x @ A.T) @ B.T) + bias                                      without dropout
        y = x @ W.T + (f - 1) * drop(x) @ W.T + f * s * (drop(x) @ A.T) @ B.T + bias        with dropout

    Args:
        x: [..., in_features]; its dtype is the compute dtype.
        weight: [out_features, in_features], dense.
        adapters: ``(A [r, in], B [out, r], scaling)`` of each; one at most with ``magnitude``.
        bias: [out_features] or None.
        dropout: Probability of zeroing an element of the adapters' input, each adapter with its own draw.
        magnitude: [out_features], DoRA's vector, or None.

    Returns:
        [..., out_features] in the dtype of ``x``.
    """
    dtype = x.dtype
    weight = weight.to(dtype)
    base = functional.linear(x, weight)
    dropped = [functional.dropout(x, dropout) if dropout else x for _ in adapters]
    parts = [
        functional.linear(functional.linear(u, A.to(dtype)), B.to(dtype)) * scaling
        for u, (A, B, scaling) in zip(dropped, adapters)
    ]
    if magnitude is None:
        y = base
        for part in parts:
            y = y + part
    else:
        A, B, scaling = adapters[0]
        factor = dora_factor(weight, A, B, scaling, magnitude).to(dtype)
        if dropout:
            y = base + (factor - 1) * functional.linear(dropped[0], weight) + factor * parts[0]
        else:
            y = factor * (base + parts[0])
    return y if bias is None else y + bias.to(dtype)


def dora_factor(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """``magnitude / ||W + s * B @ A||`` by row, in float32 at least; the norm takes no gradient."""
    wide = torch.promote_types(torch.float32, weight.dtype)
    with torch.no_grad():
        norm = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling).norm(dim=1)
    return magnitude.to(wide) / norm

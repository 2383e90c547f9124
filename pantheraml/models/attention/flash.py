"""FlashAttention over documents of different lengths, as torch ships it, with attention sinks added.

torch's own ``torch.nn.attention.varlen`` runs the same kernels; it gives no gradient to the log-sum-exp, which sinks
need, and its arguments differ between torch 2.10 and 2.13. The operators below are those it calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .documents import Documents

# The kernels take heads whose size is a multiple of this.
ALIGNMENT = 8


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside documents.

    Args:
        query: [B, H, T, D], half precision; D up to 256.
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D].
        documents: Who sees whom.
        scale: Factor of the scores.
        sinks: [H], a score that takes part in each softmax and adds no value (https://arxiv.org/abs/2309.17453, as
            gpt-oss has it), or None.

    Returns:
        [B, T, H, D].
    """
    flat = [flatten(x) for x in (query, key, value)]
    missing = -query.shape[-1] % ALIGNMENT
    if missing:
        flat = [F.pad(x, (0, missing)) for x in flat]
    out = _Varlen.apply(*flat, sinks, documents.cumulative, documents.longest, documents.window, scale)
    return out[..., : query.shape[-1]].unflatten(0, (documents.batch, documents.length))


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] as [B * T, H, D]; a view where the heads of a token lie side by side."""
    return x.transpose(1, 2).flatten(0, 1)


class _Varlen(torch.autograd.Function):
    """A sink scales each output by its share of the softmax, whose logarithm is ``lse - total``.

    The kernel's backward forms the probabilities from the log-sum-exp it is given, and the row sums of ``grad * out``:
    with the total and the scaled output it gives the gradients of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        cumulative: torch.Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        # The kernel counts the keys before the token; it leaves the token itself out.
        left = -1 if window is None else window - 1
        out, total, *state = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            cumulative,
            cumulative,
            longest,
            longest,
            0.0,
            window is None,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=0,
        )
        if sinks is not None:
            lse, total = total, torch.logaddexp(total, sinks.float()[:, None])
            out = (out * (lse - total).exp().T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total, cumulative, *state[:2])
        ctx.options = (longest, left, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads_out
        query, key, value, sinks, out, total, cumulative, generator, unused = ctx.saved_tensors
        longest, left, scale = ctx.options
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = (sinks.float()[:, None] - total).exp()
            grad_sinks = -(share * (grad.float() * out).sum(-1).T).sum(-1).to(sinks.dtype)
        grads = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            total,
            cumulative,
            cumulative,
            longest,
            longest,
            0.0,
            left < 0,
            generator,
            unused,
            scale=scale,
            window_size_left=left,
            window_size_right=0,
        )
        return (*grads, grad_sinks, None, None, None, None)

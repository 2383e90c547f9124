"""Memory-efficient attention over documents, for cards and dtypes that FlashAttention does not take."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional as F

from ...device import require
from .documents import Documents
from .flash import ALIGNMENT, flatten

# torch's enumeration: a token sees the keys before it, counted from the start of the document.
_CAUSAL_FROM_TOP_LEFT = 1


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, *, scale: float
) -> torch.Tensor:
    """Attention inside documents by the kernel behind torch's memory-efficient attention.

    Args:
        query: [B, H, T, D]; half precision or fp32.
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        documents: Who sees whom.
        scale: Factor of the scores.

    Returns:
        [B, T, H, D_v].
    """
    flat = [x[None] for x in _prepared(query, key, value)]
    out = _Efficient.apply(*flat, documents.cumulative, documents.longest, documents.window, scale)
    return out[0, ..., : value.shape[-1]].unflatten(0, (documents.batch, documents.length))


def xformers(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, *, scale: float
) -> torch.Tensor:
    """The same by the package xformers, which chooses among its own kernels; arguments as for :func:`efficient`."""
    require("xformers", what="the attention 'xformers'")
    fmha = importlib.import_module("xformers.ops.fmha")
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(list(documents.lengths))
    if documents.window is not None:
        bias = bias.make_local_attention(documents.window)
    flat = [x[None] for x in _prepared(query, key, value)]
    out = fmha.memory_efficient_attention(*flat, attn_bias=bias, scale=scale)
    return out[0, ..., : value.shape[-1]].unflatten(0, (documents.batch, documents.length))


def _prepared(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Flatten the batch, give every query head a key head, and fill heads up to the alignment."""
    heads = tensors[0].shape[1]
    flat = []
    for tensor in tensors:
        x = flatten(tensor)
        if tensor.shape[1] != heads:
            x = x.repeat_interleave(heads // tensor.shape[1], dim=1)
        flat.append(F.pad(x, (0, -x.shape[-1] % ALIGNMENT)))
    return flat


class _Efficient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cumulative: torch.Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            query,
            key,
            value,
            None,
            cumulative,
            cumulative,
            longest,
            longest,
            0.0,
            _CAUSAL_FROM_TOP_LEFT,
            True,
            scale=scale,
            window_size=window,
        )
        ctx.save_for_backward(query, key, value, out, lse, cumulative, seed, offset)
        ctx.options = (longest, window, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads_out
        query, key, value, out, lse, cumulative, seed, offset = ctx.saved_tensors
        longest, window, scale = ctx.options
        *grads, _ = torch.ops.aten._efficient_attention_backward(
            grad.contiguous(),
            query,
            key,
            value,
            None,
            out,
            cumulative,
            cumulative,
            longest,
            longest,
            lse,
            0.0,
            seed,
            offset,
            _CAUSAL_FROM_TOP_LEFT,
            False,
            scale=scale,
            window_size=window,
        )
        return (*grads, None, None, None, None)

"""Attention in plain torch: the reference of every kernel, and what serves where there is no kernel."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.nn import functional as F

from .documents import Documents
from .flash import flatten


def documents_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each document by itself; those of one length together.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        documents: Who sees whom.
        scale: Factor of the scores.
        dropout: Share of the probabilities that is dropped.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        sinks: [H], a score that takes part in each softmax and adds no value; None for none.

    Returns:
        [B, T, H, D_v].
    """
    starts: dict[int, list[int]] = defaultdict(list)
    at = 0
    for length in documents.lengths:
        starts[length].append(at)
        at += length
    flat = [flatten(x) for x in (query, key, value)]
    outputs, order = [], []
    for length, begins in starts.items():
        index = (torch.tensor(begins)[:, None] + torch.arange(length)).to(query.device)
        q, k, v = (x[index].transpose(1, 2) for x in flat)
        mask = _band(length, documents.window, query.device)
        if softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            mask = _band(length, length, query.device) if mask is None else mask
            out = attention(q, k, v, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        order.append(index.flatten())
    places = torch.cat(order).argsort()
    return torch.cat(outputs)[places].unflatten(0, (documents.batch, documents.length))


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Who sees whom in one document [T, T]; None where that is everything before."""
    if window is None:
        return None
    index = torch.arange(length, device=device)
    return (index <= index[:, None]) & (index > index[:, None] - window)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores, cap, mask, softmax in fp32 and the weighted sum, one after the other.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D_v].
        mask: Broadcasts to [B, H, T, S]: bool, True where a key is seen, or added to the scores; None for all keys.
        scale: Factor of the scores.
        dropout: Share of the probabilities that is dropped.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        sinks: [H], a score that takes part in each softmax and adds no value; None for none.

    Returns:
        [B, H, T, D_v].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype is torch.bool:
        # Added, and not minus infinity: a row without keys has a softmax, and gradients, all the same.
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    if mask is not None:
        scores = scores + mask
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    probabilities = scores.softmax(-1)
    probabilities = probabilities if sinks is None else probabilities[..., :-1]
    return F.dropout(probabilities.to(value.dtype), dropout, training=dropout > 0) @ value


def step_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Attention of one query a row, a decoding step, with a mask.

    torch's kernels that take a mask repeat the keys for the heads that share them and give each head one processor,
    however many keys there are. These products read keys and values once, with all of the device.

    Args:
        query: [B, H, 1, D].
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D_v].
        mask: Broadcasts to [B, H, 1, S]: True where the query sees a key, or a summand of the scores.
        scale: Factor of the scores, which are summed in float32.

    Returns:
        [B, 1, H, D_v].
    """
    batch, heads, _, size = query.shape
    shared, length = key.shape[1:3]
    q = query.reshape(batch * shared, heads // shared, size)
    k = key.reshape(batch * shared, length, size).transpose(1, 2)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        scores = torch.bmm(q, k, out_dtype=torch.float32)
    else:
        scores = torch.bmm(q, k).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores.view(batch, heads, 1, length) * scale
    # Not minus infinity: a row without keys has a softmax all the same.
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(batch * shared, heads // shared, length)
    out = torch.bmm(weights, value.reshape(batch * shared, length, -1))
    return out.view(batch, 1, heads, -1)

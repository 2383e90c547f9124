"""FlexAttention over documents: the kernel for soft caps, which no other fused kernel has.

The operator is compiled for each length. Lengths that change are not left to the compiler, which cannot trace a soft
cap's gradient for them (torch 2.11): rows are filled up to one of at most eight lengths an octave.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from .documents import Documents, lasting

# Tokens of a block, on either side.
BLOCK = 128


# Forms of one process: lengths, batches, dtypes, sizes of heads, caps, sinks, with gradients and without. Past it torch
# would run the operator uncompiled, in memory of T x T or not at all.
_FORMS = 512


def filled(length: int) -> int:
    """The least of the lengths that are compiled for which holds ``length`` tokens: at most an eighth is filled in."""
    step = max(BLOCK, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def _attention(*tensors: torch.Tensor, **options: Any) -> Any:
    limits = {"recompile_limit": _FORMS, "accumulated_recompile_limit": _FORMS}
    with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
        return _compiled()(*tensors, **options)


@functools.lru_cache(maxsize=8)
def _capped(softcap: float) -> Any:
    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def block_mask(documents: Documents) -> flex_attention.BlockMask:
    """The block mask of ``documents``, made from their bounds without a T x T mask and kept with them.

    It is of the length ``filled(T)``; what fills a row up is a document of its own.
    """
    known = getattr(documents, "_block_mask", None)
    if known is not None:
        return known
    with lasting():
        length = filled(documents.length)
        first = F.pad(documents.first, (0, length - documents.length), value=documents.length)
        mask = _block_mask(first, length)
    documents._block_mask = mask  # type: ignore[attr-defined]
    return mask


def _block_mask(first: torch.Tensor, length: int) -> flex_attention.BlockMask:
    blocks = -(-length // BLOCK)
    # ``first`` never decreases along a row, so the ends of a block bound what its tokens see.
    earliest = first[:, ::BLOCK, None]
    ends = (torch.arange(blocks, device=first.device) + 1).mul(BLOCK).clamp(max=length) - 1
    latest = first[:, ends, None]
    query, key = torch.arange(blocks, device=first.device)[:, None], torch.arange(blocks, device=first.device)
    begins, lasts = key * BLOCK, (key + 1) * BLOCK - 1
    touched = (key <= query) & (lasts >= earliest)
    # A last block that is not filled is masked: the kernel would count the missing queries in.
    full = (key < query) & (begins >= latest) & ((query + 1) * BLOCK <= length)
    numbers, indices = _ordered(touched & ~full)
    full_numbers, full_indices = _ordered(full)

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k >= first[batch, q]) & (k <= q)

    return flex_attention.BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the chosen blocks of each row [B, 1, N], and all indices, theirs first [B, 1, N, N]."""
    indices = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None].contiguous()


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside documents.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        documents: Who sees whom.
        scale: Factor of the scores.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        sinks: [H], a score that takes part in each softmax and adds no value; None for none.

    Returns:
        [B, T, H, D_v].
    """
    options: dict[str, Any] = {
        "score_mod": None if softcap is None else _capped(softcap),
        "block_mask": block_mask(documents),
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    length = query.shape[2]
    query, key, value = (F.pad(x, (0, 0, 0, filled(length) - length)) for x in (query, key, value))
    if sinks is None:
        return _attention(query, key, value, **options)[:, :, :length].transpose(1, 2)
    out, aux = _attention(query, key, value, return_aux=flex_attention.AuxRequest(lse=True), **options)
    # The share that is left to the keys: exp(lse) / (exp(lse) + exp(sink)).
    share = torch.sigmoid(aux.lse - sinks.float()[:, None])
    return (out * share[..., None]).to(query.dtype)[:, :, :length].transpose(1, 2)

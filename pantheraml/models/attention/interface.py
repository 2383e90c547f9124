"""The pair of functions that transformers is given under the name ``pantheraml``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...errors import UnsupportedError
from ...parallel import context
from . import efficient, exact, flash, flex, table
from .documents import Divided, Documents, from_keywords, from_lengths, from_mask_function, whole_rows

NAME = "pantheraml"

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DOCUMENTS: dict[str, Callable[..., torch.Tensor]] = {
    "varlen": flash.varlen,
    "efficient": efficient.efficient,
    "xformers": efficient.xformers,
    "flex": flex.flex,
    "exact": exact.documents_attention,
}
# Kernels in which several heads of queries share one of keys. Told so, torch passes the others over for its slow one.
_SHARE_HEADS = frozenset({"cudnn", "flash"})
# Devices whose masks this pair makes; on others, reading values on the host costs more than it saves.
_DEVICES = frozenset({"cuda", "xpu", "mps", "cpu"})
# Layers of these kinds calculate with the mask, so that it has to be there in full.
_NEED_MASK = frozenset({"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"})
# Layers of these kinds know of rows what a share of their tokens tells.
_DIVISIBLE = frozenset({"full_attention", "sliding_attention"})


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | Divided | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' layers call it.

    Args:
        module: The layer; ``is_causal`` and ``num_key_value_groups`` are read.
        query: [B, H, T, D].
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D_v].
        attention_mask: What :func:`attention_mask` made; None for all keys (before the token, in a causal layer).
        dropout: Share of the probabilities that is dropped, default 0.
        scaling: Factor of the scores, default ``D ** -0.5``.
        is_causal: Whether tokens look back only; the layer's own attribute when None.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        s_aux: [H], attention sinks; None for none.
        position_bias: Added to the scores; None for none.
        kwargs: ``cu_seq_lens_q``, ``max_length_q`` and ``position_ids`` tell of packed documents. Windows are the
            mask's matter.

    Returns:
        ``([B, T, H, D_v], None)``.
    """
    if isinstance(attention_mask, Divided):
        group, documents = attention_mask.group, attention_mask.documents
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        options["s_aux"] = None if s_aux is None else group.heads(s_aux)
        if position_bias is not None:
            raise _indivisible(f"{type(module).__name__} adds a bias to the scores")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Of the keywords only packing is left, which the documents tell.
            return attention_forward(module, q, k, v, documents, is_causal=is_causal, **options)[0]

        return context.attend_over_ranks(group, attend, query, key, value), None
    divided = context.current()
    if divided is not None and query.shape[2] != divided.division.length:
        raise _indivisible(f"{type(module).__name__} makes its mask by itself")
    batch, _, length, head_dim = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    documents = attention_mask if isinstance(attention_mask, Documents) else None
    square = length == key.shape[2] and length > 1
    whole = documents is not None and documents.is_whole_rows
    if (attention_mask is None or whole) and causal and square and query.device.type in _DEVICES:
        window = documents.window if documents is not None else None
        documents = from_keywords(kwargs, batch, length, window, query.device) or documents
    if position_bias is not None or (documents is None and softcap is None and s_aux is None):
        mask: Any = documents.dense() if documents is not None else attention_mask
        if softcap is not None or s_aux is not None:
            raise UnsupportedError(
                "attention with a position bias has neither soft caps nor sinks",
                where=type(module).__name__,
                hint="load the model with attn_implementation='eager'",
            )
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return _sdpa(module, query, key, value, mask, options | kwargs, causal=causal)
    scale = head_dim**-0.5 if scaling is None else scaling
    features: dict[str, Any] = {
        name: value
        for name, value in (("dropout", dropout or None), ("softcap", softcap), ("sinks", s_aux))
        if value is not None
    }
    if documents is None and attention_mask is None and causal and length > 1:
        # The cache may be longer than what is in it so far.
        key, value = key[:, :, :length], value[:, :, :length]
        documents = whole_rows(batch, length, None, query.device)
    if documents is None:
        out = exact.attention(query, key, value, attention_mask, scale=scale, **features)  # type: ignore[arg-type]
        return out.transpose(1, 2).contiguous(), None
    if documents.are_equally_long and documents.window is None and not (softcap is not None or s_aux is not None):
        order = table.order(table.Call("causal", head_dim, query.dtype, documents.longest)) if query.is_cuda else ()
        if order:
            return equal_documents(query, key, value, documents, order, scale=scale, dropout=dropout), None
    call = table.Call(
        kind="documents",
        head_dim=head_dim,
        dtype=query.dtype,
        length=documents.longest,
        value_dim=value.shape[-1],
        softcap=softcap is not None,
        sinks=s_aux is not None,
        dropout=bool(dropout),
    )
    chosen = table.order(call)[0] if query.device.type != "cpu" else "exact"
    return DOCUMENTS[chosen](query, key, value, documents, scale=scale, **features).contiguous(), None


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    kind = kind_of_mask(query.shape[2], mask, causal=causal)
    if kind == "step" and mask is not None and query.is_cuda and not options.get("dropout"):
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return exact.step_attention(query, key, value, mask, scale=scale), None
    call = table.Call(kind, query.shape[-1], query.dtype, query.shape[2])
    order = table.order(call) if query.is_cuda else ()
    if not order:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if kind == "causal" and query.shape[2] == key.shape[2] and options.get("position_bias") is None:
        scale, dropout = options.get("scaling"), options.get("dropout") or 0.0
        return whole_rows_attention(query, key, value, order, scale=scale, dropout=dropout), None
    with sdpa_kernel([SDPA[name] for name in order], set_priority=True):
        return sdpa_attention_forward(module, query, key, value, mask, **options)


def kind_of_mask(length: int, mask: torch.Tensor | None, *, causal: bool) -> str:
    """The table's word for ``length`` queries a row that see what ``mask`` or, without one, ``causal`` says."""
    if length == 1:
        return "step"
    return "dense" if mask is not None else "causal" if causal else "full"


def whole_rows_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    order: Sequence[str],
    *,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention of rows that are one document each, by the first of torch's kernels in ``order`` that can.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        order: Keys of :data:`SDPA`.
        scale: Factor of the scores, ``D ** -0.5`` when None.
        dropout: Share of the probabilities that is dropped, default 0.

    Returns:
        [B, T, H, D_v].
    """
    groups = query.shape[1] // key.shape[1]
    shared = groups > 1 and order[0] in _SHARE_HEADS
    if groups > 1 and not shared:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    with sdpa_kernel([SDPA[name] for name in order], set_priority=True):
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=shared
        )
    return out.transpose(1, 2).contiguous()


def equal_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    order: Sequence[str],
    *,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention of documents of one length: rows of a larger batch, which have the faster kernels.

    Args and result as in :func:`whole_rows_attention`, whose batch the documents become.
    """

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(-1, documents.longest, x.shape[1], x.shape[3]).transpose(1, 2)

    out = whole_rows_attention(rows(query), rows(key), rows(value), order, scale=scale, dropout=dropout)
    return out.view(query.shape[0], query.shape[2], *out.shape[2:])


def _indivisible(why: str) -> UnsupportedError:
    return UnsupportedError(
        "this model's sequences cannot be divided over ranks",
        where="context_parallel",
        why=why,
        hint="leave context_parallel out; fsdp=True and use_gradient_checkpointing='offload' make room too",
    )


def is_right_padded(mask: torch.Tensor) -> bool:
    """Whether every row of a [B, T] mask is ones followed by zeros, with at least one 1. Reads the device once."""
    mask = mask.bool()
    return bool((mask[:, 0].all() & (mask[:, 1:] <= mask[:, :-1]).all()).item())


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | Documents | Divided | None:
    """The mask for :func:`attention_forward`, in the least that says it.

    Returns:
        None where plain causal attention gives every real token the same; documents where rows are packed or a window
        is narrower than the row; else a mask [B, 1, T, S], True where a token sees a key. Where several ranks share the
        rows, the documents of all of them.

    Raises:
        UnsupportedError: several ranks share the rows, and what a token sees is not told by documents and windows.
    """
    divided = context.current()
    if divided is not None:
        kinds = set(getattr(kwargs.get("config"), "layer_types", None) or ())
        if use_vmap or allow_is_bidirectional_skip or torch.compiler.is_compiling() or not kinds <= _DIVISIBLE:
            raise _indivisible("its mask is more than documents and windows")
        division, tokens = divided.division, divided.division.length // divided.group.size
        if (batch_size, q_length, kv_length) != (division.batch, tokens, tokens) or (q_offset, kv_offset) != (0, 0):
            raise _indivisible(f"it asks for a mask of {q_length} x {kv_length} for {tokens} tokens")
        key = local_size, torch.device(device)
        if key not in divided.known:
            whole = from_lengths(division.lengths, division.batch, division.length, local_size, device)
            divided.known[key] = Divided(whole, divided.group)
        return divided.known[key]
    # Padding on the right needs no mask: a token never looks at what comes after it, and what padded positions compute
    # reaches no loss.
    if (
        1 < q_length == kv_length
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
        and not (use_vmap or allow_is_bidirectional_skip or torch.compiler.is_compiling())
        and torch.device(device).type in _DEVICES
        and _NEED_MASK.isdisjoint(getattr(kwargs.get("config"), "layer_types", None) or ())
        and (
            attention_mask is None
            or (attention_mask.shape == (batch_size, q_length) and is_right_padded(attention_mask))
        )
    ):
        narrow = local_size is not None and local_size < kv_length
        if allow_is_causal_skip and not narrow:
            return None
        found = from_mask_function(mask_function, batch_size, q_length, local_size, device)
        # Whole rows without a window are no reason to forbid the skip: the mask is wanted for something else.
        if found is not None and (found.window is not None or not found.is_whole_rows):
            return found
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )

"""Attention for XLA devices: shapes and programs depend on no value, so nothing is read on the host."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ... import xla_runtime
from ...parallel import xla

# Rows that are shorter cost less memory with the scores in full.
FLASH_LENGTH = 4096
# Tokens of the kernel's largest block.
BLOCK = 1024
# Smaller heads would be filled up to this size.
LANES = 128
# Options of an attention layer that the kernel does not have.
_NOT_IN_KERNEL = ("dropout", "softcap", "s_aux", "sliding_window")

NAME = "pantheraml_xla"

_documents: torch.Tensor | None = None


def register() -> str:
    """Make the pair known to transformers under its name, which is returned. Registering again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stock sdpa, or Pallas's kernel for long rows on TPUs.

    Queries and keys that a rotary embedding left in float32 get the values' dtype.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    if attention_mask is None or attention_mask.dim() != 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
    if query.shape[-1] % LANES == 0 and not args and not any(kwargs.get(name) for name in _NOT_IN_KERNEL):
        return _flash(query, key, value, attention_mask, scaling), None
    order = torch.arange(query.shape[2], device=query.device)
    mask = (attention_mask[:, :, None] == attention_mask[:, None, :]) & (order[:, None] >= order)
    return sdpa_attention_forward(module, query, key, value, mask[:, None], *args, scaling=scaling, **kwargs)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention [B, T, N, D] of queries [B, N, T, D], with as many keys and values or a fraction of them."""
    mesh, length = xla.current_mesh(), query.shape[2]
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    # What fills the last block is a segment of its own.
    missing = -length % BLOCK
    query, key, value = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    segments = F.pad(segments, (0, missing), value=-1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = xla.TENSOR if query.shape[1] % mesh.shape.get(xla.TENSOR, 1) == 0 else None
    out = xla_runtime.flash_attention(query, key, value, segments, scale, mesh, (xla.FSDP, heads, None, None))
    return out[:, :, :length].transpose(1, 2)


def attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Stock sdpa's mask, always in full: whether it could be left out would have to be read from the device.

    Returns:
        [B, 1, T, S] bool, True where a key is seen. For long causal rows on TPUs [B, T] int32: a token sees those
        before it that have its number.
    """
    given = inspect.signature(sdpa_mask).bind(*args, **kwargs).arguments
    if (
        given["q_length"] == given["kv_length"] >= FLASH_LENGTH
        and given.get("mask_function", causal_mask_function) is causal_mask_function
        and xla_runtime.has_flash_attention()
    ):
        return _segments(given)
    mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if mask is None or mask.shape[-1] != mask.shape[-2]:
        return mask
    if _documents is not None:
        mask = mask & (_documents[:, None, :, None] == _documents[:, None, None, :])
    # Padding sees itself: a row without keys would make the softmax, and all gradients, NaN.
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def _segments(given: dict[str, Any]) -> torch.Tensor:
    """Numbers of documents; 0 is padding."""
    padding = given.get("attention_mask")
    if _documents is not None:
        numbers = _documents + 1
    elif padding is not None:
        numbers = torch.ones_like(padding, dtype=torch.int32)
    else:
        size = (given["batch_size"], given["q_length"])
        numbers = torch.ones(size, dtype=torch.int32, device=given["device"])
    if padding is not None:
        numbers = numbers * padding.to(numbers.dtype)
    return numbers.to(torch.int32)


@contextlib.contextmanager
def isolated_documents(position_ids: torch.Tensor | None) -> Iterator[None]:
    """Within it, tokens see those of their own document only.

    Args:
        position_ids: [B, T], beginning at 0 in each document; None changes nothing.
    """
    global _documents
    before = _documents
    _documents = None if position_ids is None else (position_ids == 0).cumsum(1)
    try:
        yield
    finally:
        _documents = before

"""Attention for XLA devices: shapes and programs depend on no value, so nothing is read on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pantheraml_xla"

_documents: torch.Tensor | None = None


def register() -> str:
    """Make the pair known to transformers under its name, which is returned. Registering again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stock sdpa; queries and keys that a rotary embedding left in float32 get the values' dtype."""
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)


def attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Stock sdpa's mask, always in full: whether it could be left out would have to be read from the device.

    Returns:
        [B, 1, T, S] bool, True where a key is seen.
    """
    mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if mask is None or mask.shape[-1] != mask.shape[-2]:
        return mask
    if _documents is not None:
        mask = mask & (_documents[:, None, :, None] == _documents[:, None, None, :])
    # Padding sees itself: a row without keys would make the softmax, and all gradients, NaN.
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


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

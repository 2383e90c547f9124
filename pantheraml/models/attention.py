"""Attention as transformers' interface asks for it, with the backend chosen by a measured table.

Registered under the name ``pantheraml`` in ``AttentionInterface`` and ``AttentionMaskInterface``. Both are built on the
stock ``sdpa`` pair and differ in two ways:

* the fused kernels are tried in the order that was measured fastest for the chip, the head size and the dtype;
* a causal batch that is padded on the right needs no mask: a token never looks at what comes after it, and what padded
  positions compute reaches no loss. Such batches keep the fused kernels, which take no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..device import Device, get_device

NAME = "pantheraml"

_CUDNN, _FLASH, _EFFICIENT, _MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class _Row:
    """One line of the table: applies from ``capability`` on, up to ``head_dim``."""

    capability: tuple[int, int]
    head_dim: int
    order: tuple[SDPBackend, ...]


# One H100, bf16, causal, forward/backward in ms, cuDNN against flash: 4 x 2,048 with GQA 32/8 at head_dim 128
# 0.26/0.93 against 0.48/1.52, at head_dim 64 0.19/0.61 against 0.28/0.87; GQA 8/4 at head_dim 256 0.15/0.63 against
# 0.28/0.98; 1 x 32,768 at head_dim 128 14.6/39.8 against 26.4/67.6. The first row that applies is used.
_TABLE = (
    _Row((9, 0), 256, (_CUDNN, _FLASH, _EFFICIENT, _MATH)),
    _Row((0, 0), 1 << 30, (_FLASH, _EFFICIENT, _MATH)),
)


def backend_order(device: Device, head_dim: int, dtype: torch.dtype) -> list[SDPBackend]:
    """The backends of ``scaled_dot_product_attention`` to try on ``device``, best first."""
    capability = device.capability or (0, 0)
    order = next(r.order for r in _TABLE if capability >= r.capability and head_dim <= r.head_dim)
    # cuDNN and flash take half precision only; asking for them with fp32 would be a wasted attempt.
    return [b for b in order if dtype in (torch.float16, torch.bfloat16) or b in (_EFFICIENT, _MATH)]


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ``query`` [B, H, T, D] over ``key``, ``value`` [B, H_kv, S, D]; returns ``([B, T, H, D], None)``."""
    if query.device.type != "cuda":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    with sdpa_kernel(backend_order(get_device(), query.shape[-1], query.dtype), set_priority=True):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


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
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for :func:`attention_forward`: None where plain causal attention gives every real token the same."""
    skippable = (
        allow_is_causal_skip
        and attention_mask is not None
        and attention_mask.dim() == 2
        and attention_mask.shape[-1] == q_length == kv_length
        and q_length > 1
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
        and (local_size is None or kv_length < local_size)
    )
    if skippable and attention_mask is not None and is_right_padded(attention_mask):
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def register() -> str:
    """Make the pair known to transformers under its name, which is returned. Registering again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def prefer(model: Any) -> bool:
    """Let a model that resolved to stock ``sdpa`` use this attention; returns whether it does.

    An implementation that the caller asked for by name is never replaced; the loader calls this only when nobody did.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not get_device().is_gpu:
        return False
    model.set_attn_implementation(register())
    return True

"""Attention as transformers' interface asks for it, with the kernel chosen by a measured table.

Registered under the name ``pantheraml`` in ``AttentionInterface`` and ``AttentionMaskInterface``. It differs from the
stock ``sdpa`` pair in this:

* the kernels are tried in the order that was measured fastest for the chip, the head size, the dtype and the length;
* packed rows and sliding windows are told to the kernels as documents instead of as a mask of T x T, so that documents
  are isolated by construction and cost what they cost alone;
* soft caps and attention sinks are served, which stock sdpa has not;
* a causal batch that is padded on the right needs no mask.
"""

from __future__ import annotations

from .choose import check_request, describe, prefer, register
from .documents import Divided, Documents
from .interface import NAME, attention_forward, attention_mask, is_right_padded
from .table import Call, order

__all__ = [
    "NAME",
    "Call",
    "Divided",
    "Documents",
    "attention_forward",
    "attention_mask",
    "check_request",
    "describe",
    "is_right_padded",
    "order",
    "prefer",
    "register",
]

"""LoRA layers with hand-written backward: one linear layer, the three of attention's input, and the gated MLP."""

from __future__ import annotations

from .lora_linear import lora_linear, lora_qkv
from .lora_mlp import lora_mlp
from .projections import Adapter, Projection

__all__ = ["Adapter", "Projection", "lora_linear", "lora_mlp", "lora_qkv"]

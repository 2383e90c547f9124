"""Hyper-parameters as GGUF metadata: tables of (key, kind, where it comes from)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .families import Family, head_dim, rope

Kind = Literal["uint32", "float32", "string", "bool"]


class Field(NamedTuple):
    """One key of the metadata, under the architecture's prefix; a source that gives None leaves it out."""

    key: str
    kind: Kind
    source: Callable[[Any], Any]


def _attribute(name: str) -> Callable[[Any], Any]:
    return lambda config: getattr(config, name, None)


def key_value_heads(config: Any) -> int:
    """Number of key and value heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _dense_width(config: Any) -> int:
    # llama.cpp wants a dense width as well; it is not used by layers of experts.
    return int(getattr(config, "intermediate_size", None) or config.moe_intermediate_size)


def _experts_width(config: Any) -> int:
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def _experts(config: Any) -> int:
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def _rotary_dim(config: Any) -> int:
    return int(head_dim(config) * rope(config).get("partial_rotary_factor", 1.0))


def _scaling(config: Any) -> str | None:
    kind = rope(config).get("rope_type", "default")
    return kind if kind in ("linear", "yarn") else None


def _scaling_factor(config: Any) -> float | None:
    return rope(config).get("factor") if _scaling(config) else None


def _yarn(name: str) -> Callable[[Any], float | None]:
    def source(config: Any) -> float | None:
        value = rope(config).get(name) if _scaling(config) == "yarn" else None
        return None if value is None else float(value)

    return source


def _scaling_original(config: Any) -> int | None:
    return rope(config).get("original_max_position_embeddings") if _scaling(config) == "yarn" else None


def _phi3_original(config: Any) -> int:
    original = rope(config).get("original_max_position_embeddings")
    return int(original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _phi3_attention_factor(config: Any) -> float | None:
    settings = rope(config)
    if settings.get("rope_type") != "longrope":
        return None
    stated = settings.get("attention_factor")
    if stated is not None:
        return float(stated)
    original = _phi3_original(config)
    scale = config.max_position_embeddings / original
    return math.sqrt(1.0 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0


_COMMON = (
    Field("context_length", "uint32", _attribute("max_position_embeddings")),
    Field("embedding_length", "uint32", _attribute("hidden_size")),
    Field("block_count", "uint32", _attribute("num_hidden_layers")),
    Field("feed_forward_length", "uint32", _dense_width),
    Field("attention.head_count", "uint32", _attribute("num_attention_heads")),
    Field("attention.head_count_kv", "uint32", key_value_heads),
    Field("attention.key_length", "uint32", head_dim),
    Field("attention.value_length", "uint32", head_dim),
    Field("attention.layer_norm_rms_epsilon", "float32", _attribute("rms_norm_eps")),
    Field("rope.dimension_count", "uint32", _rotary_dim),
    Field("rope.freq_base", "float32", lambda c: rope(c).get("rope_theta", 10000.0)),
    Field("rope.scaling.type", "string", _scaling),
    Field("rope.scaling.factor", "float32", _scaling_factor),
    Field("rope.scaling.original_context_length", "uint32", _scaling_original),
    Field("rope.scaling.yarn_beta_fast", "float32", _yarn("beta_fast")),
    Field("rope.scaling.yarn_beta_slow", "float32", _yarn("beta_slow")),
    Field("vocab_size", "uint32", _attribute("vocab_size")),
)

GROUPS: dict[str, tuple[Field, ...]] = {
    "experts": (
        Field("expert_count", "uint32", _experts),
        Field("expert_used_count", "uint32", _attribute("num_experts_per_tok")),
        Field("expert_feed_forward_length", "uint32", _experts_width),
    ),
    "window": (Field("attention.sliding_window", "uint32", _attribute("sliding_window")),),
    "window_rope": (
        Field("rope.freq_base_swa", "float32", lambda c: rope(c, "sliding_attention").get("rope_theta", 10000.0)),
    ),
    "soft_caps": (
        Field("attn_logit_softcapping", "float32", _attribute("attn_logit_softcapping")),
        Field("final_logit_softcapping", "float32", _attribute("final_logit_softcapping")),
    ),
    "phi3": (
        Field("attention.sliding_window", "uint32", lambda c: getattr(c, "sliding_window", None) or 0),
        Field("rope.scaling.original_context_length", "uint32", _phi3_original),
        Field("rope.scaling.attn_factor", "float32", _phi3_attention_factor),
    ),
    "granite": (
        Field("embedding_scale", "float32", _attribute("embedding_multiplier")),
        Field("residual_scale", "float32", _attribute("residual_multiplier")),
        Field("attention.scale", "float32", _attribute("attention_multiplier")),
        Field("logit_scale", "float32", _attribute("logits_scaling")),
    ),
}


def hyper_parameters(config: Any, family: Family) -> dict[str, tuple[Kind, Any]]:
    """Return kind and value by full key, for a model of ``family``."""
    fields = {field.key: field for field in _COMMON}
    for group in family.fields:
        fields |= {field.key: field for field in GROUPS[group]}
    values = {f"{family.arch}.{key}": (field.kind, field.source(config)) for key, field in fields.items()}
    return {key: (kind, value) for key, (kind, value) in values.items() if value is not None}


def rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """Return the tensors (fp32, half a head long) that state rope frequencies which no formula of llama.cpp gives.

    Factors of a frequency are what llama.cpp divides it by; see Llama 3.1 and LongRoPE (https://arxiv.org/abs/2402.13753).
    """
    settings = rope(config)
    kind = settings.get("rope_type", "default")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.asarray(settings[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    width = _rotary_dim(config)
    frequencies = settings["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: stretched by the whole factor; 1: left alone
    factors = 1.0 / ((1.0 - share) / settings["factor"] + share)
    return {"rope_freqs.weight": factors.float().numpy()}

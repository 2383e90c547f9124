"""Architectures that are written as GGUF: one row a family, naming what differs from the common case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedError

CONVERTER = "python convert_hf_to_gguf.py FOLDER --outfile model.gguf --outtype q8_0"


@dataclass(frozen=True, slots=True)
class Family:
    """How a transformers architecture is written as GGUF.

    Attributes:
        model_type: ``config.model_type``.
        arch: GGUF architecture.
        transforms: ``(pattern of the tensor's name, name of the transform)``; see ``tensors.TRANSFORMS``.
        pieces: ``(pattern of the end of a name, ((end in its place, name of the transform), ...))`` for tensors that
            the file names otherwise or holds in parts.
        fields: Names of further groups of metadata; see ``metadata.GROUPS``.
        activations: Activations that llama.cpp computes for it.
        ropes: Kinds of rope scaling that it can state.
        biases: Whether llama.cpp reads biases of its projections.
        window_period: Every how many layers one attends fully, where llama.cpp has that built in; 0 where not.
        reload_as: Architecture that transformers' GGUF loader makes of it; None where it does not know it.
    """

    model_type: str
    arch: str
    transforms: tuple[tuple[str, str], ...] = ()
    pieces: tuple[tuple[str, tuple[tuple[str, str | None], ...]], ...] = ()
    fields: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    biases: bool = False
    window_period: int = 0
    reload_as: str | None = None

    @property
    def has_experts(self) -> bool:
        """Whether its layers are mixtures of experts."""
        return "experts" in self.fields


# llama.cpp rotates neighbouring pairs of a head's rows for these, transformers the two halves of the head.
_ROPE_ROWS = (
    (r"self_attn\.q_proj\.(weight|bias)$", "rope_rows_q"),
    (r"self_attn\.k_proj\.(weight|bias)$", "rope_rows_k"),
)
_NORM_PLUS_ONE = ((r"norm\.weight$", "plus_one"),)  # Gemma computes with 1 + weight, llama.cpp with the weight
_EXPERTS = ((r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$", "stack_experts"),)
# gpt-oss holds experts as [expert, in, out], its gates and ups as alternating columns.
_OSS_PIECES = (
    (r"experts\.gate_up_proj$", (("experts.gate_proj.weight", "gates"), ("experts.up_proj.weight", "ups"))),
    (r"experts\.gate_up_proj_bias$", (("experts.gate_proj.bias", "gates"), ("experts.up_proj.bias", "ups"))),
    (r"experts\.down_proj$", (("experts.down_proj.weight", "in_by_out"),)),
    (r"experts\.down_proj_bias$", (("experts.down_proj.bias", None),)),
    (r"self_attn\.sinks$", (("self_attn.sinks.weight", None),)),
)
_GELU = ("gelu_pytorch_tanh", "gelu_tanh")
_LLAMA_ROPES = ("default", "linear", "yarn", "llama3")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "llama", _ROPE_ROWS, ropes=_LLAMA_ROPES, biases=True, reload_as="llama"),
        Family("mistral", "llama", _ROPE_ROWS, ropes=_LLAMA_ROPES, biases=True, reload_as="llama"),
        Family("qwen2", "qwen2", biases=True, reload_as="qwen2"),
        Family("qwen3", "qwen3", reload_as="qwen3"),
        Family("qwen3_moe", "qwen3moe", _EXPERTS, fields=("experts",), reload_as="qwen3_moe"),
        Family("gemma", "gemma", _NORM_PLUS_ONE, activations=(*_GELU, "gelu")),
        Family(
            "gemma2",
            "gemma2",
            _NORM_PLUS_ONE,
            fields=("window", "soft_caps"),
            activations=_GELU,
            window_period=2,
            reload_as="gemma2",
        ),
        Family(
            "gemma3_text",
            "gemma3",
            _NORM_PLUS_ONE,
            fields=("window", "soft_caps", "window_rope"),
            activations=_GELU,
            window_period=6,
            reload_as="gemma3_text",
        ),
        Family("phi3", "phi3", fields=("phi3",), ropes=("default", "longrope"), reload_as="phi3"),
        Family("granite", "granite", _ROPE_ROWS, fields=("granite",), biases=True),
        Family("olmo2", "olmo2"),
        Family("gpt_oss", "gpt-oss", pieces=_OSS_PIECES, fields=("experts", "window"), biases=True, window_period=2),
    )
}


def unsupported(what: str, *, where: str, why: str | None = None) -> UnsupportedError:
    """The error for what cannot be written here, with the way that is left."""
    return UnsupportedError(
        what,
        where=where,
        why=why,
        hint="give your own checkout of llama.cpp as converter=; or save_pretrained_merged(folder, tokenizer) and "
        + CONVERTER,
    )


def family_of(config: Any) -> Family:
    """Return the row for a model.

    Args:
        config: The transformers config.

    Raises:
        UnsupportedError: there is none, or the config asks for something that llama.cpp does not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise unsupported(
            f"GGUF files of {config.model_type!r} models are not written here",
            where="model",
            why=f"the families are {', '.join(FAMILIES)}",
        )
    for check in _CHECKS:
        problem = check(config, family)
        if problem:
            raise unsupported(f"this {config.model_type} model cannot be a GGUF file", where="config.json", why=problem)
    return family


def head_dim(config: Any) -> int:
    """Columns of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The rope settings of the layers of a kind, where layers differ, or those of all layers."""
    settings = getattr(config, "rope_parameters", None) or {}
    return dict(settings.get(kind, settings))


def activation(config: Any) -> str:
    """Name of the activation in the MLPs; Gemma writes a second name that wins."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _activation(config: Any, family: Family) -> str | None:
    name = activation(config)
    return None if name in family.activations else f"llama.cpp does not compute the activation {name!r} for it"


def _rope(config: Any, family: Family) -> str | None:
    settings = rope(config)
    kind = settings.get("rope_type", "default")
    if kind not in family.ropes:
        return f"the rope type {kind!r} cannot be stated; those that can are {', '.join(family.ropes)}"
    if settings.get("partial_rotary_factor", 1.0) != 1.0 and family.transforms[:1] == _ROPE_ROWS[:1]:
        return "rotary embeddings on a part of each head"
    extra = {k for k, v in settings.items() if v is not None} - _YARN_KEYS
    return f"the yarn settings {', '.join(sorted(extra))}" if kind == "yarn" and extra else None


_YARN_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("beta_fast", "beta_slow", "truncate"),
}


def _scale(config: Any, family: Family) -> str | None:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    # llama.cpp divides by the width of a head, except in the 27B models, told by their number of layers.
    large = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(family.arch)
    due = config.hidden_size // config.num_attention_heads if large else head_dim(config)
    if scalar is None or scalar == due:
        return None
    return f"llama.cpp scales its queries by {due}, the model by query_pre_attn_scalar={scalar}"


def _windows(config: Any, family: Family) -> str | None:
    kinds = getattr(config, "layer_types", None)
    if not family.window_period or kinds is None:
        return None
    due = ["full_attention" if (i + 1) % family.window_period == 0 else "sliding_attention" for i in range(len(kinds))]
    return None if list(kinds) == due else f"llama.cpp has full attention in every layer {family.window_period} only"


def _biases(config: Any, family: Family) -> str | None:
    if family.biases or not (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        return None
    return "llama.cpp reads no biases of it"


def _bidirectional(config: Any, family: Family) -> str | None:
    del family
    return "its attention looks ahead" if getattr(config, "use_bidirectional_attention", None) else None


def _experts(config: Any, family: Family) -> str | None:
    if not family.has_experts:
        return None
    if not getattr(config, "norm_topk_prob", True):
        return "llama.cpp normalises the weights of the chosen experts, the model does not (norm_topk_prob)"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "some of its layers have no experts"
    return None


def _oss(config: Any, family: Family) -> str | None:
    if family.arch != "gpt-oss":
        return None
    constants = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # built into llama.cpp
    odd = [f"{name}={value}" for name, due in constants.items() if (value := getattr(config, name, due)) != due]
    if odd:
        return f"llama.cpp computes its experts with {constants}, the model with {', '.join(odd)}"
    return "llama.cpp reads an output head of its own" if config.tie_word_embeddings else None


_CHECKS: tuple[Callable[[Any, Family], str | None], ...] = (
    *(_activation, _rope, _scale, _windows, _biases, _bidirectional, _experts, _oss),
)

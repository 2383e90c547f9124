"""How long a sequence the model takes: RoPE scaling beyond its trained maximum."""

from __future__ import annotations

from typing import Any

from .. import log
from ..errors import ArgumentError, ConfigError, UnsupportedError

# Computed from max_position_embeddings at run time: raising that number would switch the scaling off.
_SCALED_BY_MAXIMUM = "dynamic"


class _DefaultLength(int):
    """The default length, which unlike the same number given by the caller never scales a model's positions."""


DEFAULT_MAX_SEQ_LENGTH: int = _DefaultLength(2048)


def check_max_seq_length(value: Any) -> int | None:
    """Return ``max_seq_length`` as given, or None.

    Raises:
        ArgumentError: no whole number.
        ConfigError: not positive.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"max_seq_length must be a whole number of tokens, got {value!r}", where="max_seq_length")
    if value <= 0:
        raise ConfigError(f"max_seq_length must be positive, got {value}", where="argument max_seq_length")
    return value


def _scalable(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter sets of ``rope`` that cover the whole context: itself, or the full-attention one of several."""
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if not nested:
        return [rope]
    return [value for key, value in nested.items() if "sliding" not in key and "local" not in key]


def _apply_rope_scaling(config: Any, rope_scaling: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not isinstance(rope_scaling, dict):
        raise ArgumentError(
            f"rope_scaling must be a dict, got {type(rope_scaling).__name__}", where="argument rope_scaling"
        )
    values = dict(rope_scaling)
    kind = values.pop("type", None) or values.get("rope_type")
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ConfigError(
            f"unknown RoPE scaling {kind!r}",
            where="argument rope_scaling",
            hint=f"rope_type is one of {', '.join(known)}",
        )
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise UnsupportedError(
            f"rope_scaling was given and {config.model_type} has no rotary position embedding",
            where="argument rope_scaling",
        )
    for parameters in _scalable(config.rope_parameters):
        parameters.update(values, rope_type=kind)


def extend_context(config: Any, max_seq_length: int | None, rope_scaling: dict[str, Any] | None = None) -> int:
    """Make ``config`` take ``max_seq_length`` tokens, and return the length that the model then takes.

    Within the model's own maximum nothing changes. Beyond it, plain RoPE gets linear position interpolation by
    ``max_seq_length / maximum`` (https://arxiv.org/abs/2306.15595), a scaling that the configuration already names is
    kept, and ``max_position_embeddings`` is raised. Sliding-window layers look no further than their window, so their
    RoPE stays.

    Args:
        config: The model's configuration; changed in place (the text part of a multimodal one).
        max_seq_length: Longest sequence wanted, in tokens; None takes the model's maximum. The default,
            ``DEFAULT_MAX_SEQ_LENGTH``, takes what the model has up to it.
        rope_scaling: The caller's own scaling, which replaces the derived one.

    Raises:
        UnsupportedError: longer than the maximum of a model with learned positions.
        ConfigError: the scaling cannot be used.
    """
    text = config.get_text_config()
    maximum = getattr(text, "max_position_embeddings", None)
    if rope_scaling is not None:
        _apply_rope_scaling(text, rope_scaling)
    if not isinstance(maximum, int):
        return int(max_seq_length or DEFAULT_MAX_SEQ_LENGTH)
    if max_seq_length is None:
        return maximum
    if isinstance(max_seq_length, _DefaultLength):
        return min(int(max_seq_length), maximum)
    if max_seq_length <= maximum:
        return max_seq_length
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise UnsupportedError(
            f"max_seq_length={max_seq_length} is beyond the {maximum} positions that {text.model_type} was built with",
            where="argument max_seq_length",
            why="its positions are learned, so there is nothing to scale",
            hint=f"pass max_seq_length={maximum} or less",
        )
    factor = max_seq_length / maximum
    scaled = False
    kinds = set()
    for parameters in _scalable(rope):
        kind = parameters.get("rope_type", "default")
        kinds.add(kind)
        if kind == "default" and rope_scaling is None:
            parameters.update(rope_type="linear", factor=factor)
            scaled = True
    if _SCALED_BY_MAXIMUM not in kinds:
        text.max_position_embeddings = max_seq_length
    how = f"RoPE is scaled linearly by {factor:.4g}" if scaled else f"its own RoPE scaling ({', '.join(kinds)}) is kept"
    log.info(f"max_seq_length={max_seq_length} is beyond the model's {maximum}: {how}")
    return max_seq_length

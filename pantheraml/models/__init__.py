"""Loading, adapting and running models. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import for_inference as for_inference
    from .inference import for_training as for_training
    from .loader import FastLanguageModel as FastLanguageModel
    from .loader import FastModel as FastModel
    from .loader import FastTextModel as FastTextModel
    from .loader import FastVisionModel as FastVisionModel
    from .tokenizers import add_new_tokens as add_new_tokens

_LOADERS = (
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "FastTextModel",
    "FastLlamaModel",
    "FastMistralModel",
    "FastQwen2Model",
    "FastQwen3Model",
    "FastQwen3MoeModel",
    "FastGemmaModel",
    "FastGemma2Model",
    "FastGraniteModel",
    "FastCohereModel",
    "FastFalconH1Model",
)
_EXPORTS = {
    **dict.fromkeys(_LOADERS, "loader"),
    "for_inference": "inference",
    "for_training": "inference",
    "add_new_tokens": "tokenizers",
    "record_of": "record",
}

__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

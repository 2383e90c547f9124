"""The small files of a model folder: config, generation config, custom code, tokenizer."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .. import log
from ..models.checkpointing import cache_setting

SMALL_FILES = 64 * 10**6  # bytes allowed for config, tokenizer and headers in disk checks


def all_but(*patterns: str) -> Callable[[str], bool]:
    """Return a test that accepts the file names that match none of ``patterns``."""
    return lambda name: not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def write_config(
    base: PreTrainedModel,
    directory: Path,
    *,
    dtype: torch.dtype,
    untied: bool,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write ``config.json``, and ``generation_config.json`` for models that generate.

    Args:
        base: The transformers model; it is not changed.
        directory: Existing folder.
        dtype: Dtype of the written weights.
        untied: Whether the output head is saved apart from the input embeddings although the model tied them.
        quantization: The entry ``quantization_config``.
    """
    config = copy.deepcopy(base.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    if quantization is not None:
        config.quantization_config = quantization
    config.dtype = dtype
    config.architectures = [type(base).__name__]
    cache = cache_setting(base)
    if cache is not None:
        # Off for training alone: whoever loads the folder is to generate with it.
        config.use_cache = cache
    text = config.get_text_config()
    text.dtype = dtype
    if untied:
        config.tie_word_embeddings = False
        text.tie_word_embeddings = False
    config.save_pretrained(directory)
    if base.is_remote_code():
        custom_code_config: Any = config
        custom_object_save(base, directory, config=custom_code_config)
    generation = getattr(base, "generation_config", None)
    if base.can_generate() and generation is not None:
        try:
            generation.save_pretrained(directory)
        except ValueError as error:
            # Transformers refuses to save settings that it loads without complaint; the model works with them.
            log.warning(f"the generation config is saved although transformers objects to it: {error}")
            generation.to_json_file(directory / "generation_config.json")


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer or processor that pads on the left, as generation needs it; the given one stays as it is."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    side = getattr(inner, "padding_side", None)
    settings = getattr(inner, "init_kwargs", {})
    stored = settings.get("padding_side")
    try:
        if side is not None:
            # The attribute is what the tokenizer does, the setting is what it writes.
            inner.padding_side = settings["padding_side"] = "left"
        tokenizer.save_pretrained(str(directory))
    finally:
        if side is not None:
            inner.padding_side = side
            settings.pop("padding_side", None)
            if stored is not None:
                settings["padding_side"] = stored

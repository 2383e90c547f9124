"""Tokens of a tokenizer under new names, their ids unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def can_rename(tokenizer: Any) -> bool:
    """Whether the tokenizer is one of the ``tokenizers`` library, whose vocabulary can be rewritten."""
    return hasattr(getattr(tokenizer, "_tokenizer", None), "to_str")


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Replace strings, and keys of objects, that are exactly an old name."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    return value


def renamed(backend: Any, names: Mapping[str, str]) -> Any:
    """A copy of a ``tokenizers.Tokenizer`` whose tokens have new names and the same ids.

    Args:
        backend: The tokenizer.
        names: Old to new names. The new ones must not be in the vocabulary.
    """
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    elif model.get("vocab") is not None:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    data["post_processor"] = _renamed(data.get("post_processor"), names)
    data["padding"] = _renamed(data.get("padding"), names)
    return type(backend).from_str(json.dumps(data))


def rename_tokens(tokenizer: Any, names: Mapping[str, str]) -> None:
    """Give tokens new names in place: same ids, same embeddings, no growth.

    The idea of renaming the end token instead of training a new one is Unsloth's.

    Args:
        tokenizer: A tokenizer of the ``tokenizers`` library.
        names: Old to new names. The new ones must not be in the vocabulary.
    """
    tokenizer._tokenizer = renamed(tokenizer._tokenizer, names)
    for attribute, value in dict(tokenizer.special_tokens_map).items():
        if isinstance(value, str) and value in names:
            setattr(tokenizer, attribute, names[value])
    if getattr(tokenizer, "_extra_special_tokens", None):
        tokenizer._extra_special_tokens = [names.get(str(token), token) for token in tokenizer._extra_special_tokens]

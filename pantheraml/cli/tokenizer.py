"""The tokenizer of a model, without its weights."""

from __future__ import annotations

import argparse
from typing import Any

from ..models.source import Hub, find_file, load_config, resolve_source
from ..models.tokenizers import has_tokenizer, load_tokenizer, prepare_tokenizer

# The longest sequence of `pantheraml` without flags.
MAX_LENGTH = 2048


def tokenizer_of(name: str, args: argparse.Namespace, length: int | None) -> tuple[Any, int]:
    """Load the tokenizer that training would load.

    Args:
        name: Model folder, adapter folder or hub id.
        args: ``hub_token`` and ``trust_remote_code`` are read.
        length: Longest sequence; None takes 2048, or what the model has if that is less.

    Returns:
        The tokenizer, and the longest sequence.
    """
    source = resolve_source(name, Hub(token=args.hub_token))
    places = [(source.base, source.hub)]
    own = Hub(token=args.hub_token)
    if source.adapter is not None and has_tokenizer(source.name, own):
        places.insert(0, (source.name, own))
    if length is None:
        length = MAX_LENGTH
        if find_file(source.base, "config.json", source.hub) is not None:
            text = load_config(source, trust_remote_code=args.trust_remote_code).get_text_config()
            maximum = getattr(text, "max_position_embeddings", None)
            length = min(length, maximum) if isinstance(maximum, int) else length
    tokenizer = load_tokenizer(places, trust_remote_code=args.trust_remote_code, multimodal=False)
    return prepare_tokenizer(None, tokenizer, max_seq_length=length), length

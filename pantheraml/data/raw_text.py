"""Running text cut into overlapping windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from ..errors import ConfigError, DataError


def windows(length: int, chunk_size: int, stride: int) -> list[tuple[int, int]]:
    """Return the half-open windows that cover ``length`` tokens.

    Args:
        length: Number of tokens.
        chunk_size: Tokens in a window, at least 1.
        stride: Tokens that a window shares with the one before, at least 0 and below ``chunk_size``.

    Returns:
        Windows in order; the last one may be shorter. No window lies wholly inside another.

    Raises:
        ConfigError: ``chunk_size`` or ``stride`` is out of range.
    """
    if chunk_size < 1:
        raise ConfigError(f"chunk_size is {chunk_size}", where="argument chunk_size", hint="give at least 1 token")
    if not 0 <= stride < chunk_size:
        raise ConfigError(
            f"stride is {stride}, with a chunk_size of {chunk_size}",
            where="argument stride",
            why="the stride is the overlap of neighbouring chunks in tokens",
            hint="give a stride from 0 to below chunk_size",
        )
    last = max(length - stride, 1)
    return [(start, min(start + chunk_size, length)) for start in range(0, last, chunk_size - stride)] if length else []


def chunk_documents(texts: Iterable[str], tokenizer: Any, *, chunk_size: int = 2048, stride: int = 512) -> Dataset:
    """Tokenise documents and cut each into overlapping chunks for causal language modelling.

    A document begins with the special tokens that ``tokenizer`` puts in front of a text, if it does, and ends with the
    end-of-sequence token, so that beginnings and ends are learnt where they really are.

    Args:
        texts: The documents.
        tokenizer: Tokenizer of the model.
        chunk_size: Tokens in a chunk. Default 2048.
        stride: Tokens that neighbouring chunks share. Default 512.

    Returns:
        A data set with the column ``input_ids``.

    Raises:
        ConfigError: ``chunk_size`` or ``stride`` is out of range.
        DataError: there is no text.
    """
    windows(0, chunk_size, stride)
    chunks: list[list[int]] = []
    for text in texts:
        if not text.strip():
            continue
        # verbose=False: a whole document is longer than the model's limit on purpose.
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and ids[-1] != end:
            ids.append(end)
        chunks.extend(ids[start:stop] for start, stop in windows(len(ids), chunk_size, stride))
    if not chunks:
        raise DataError("the text is empty", where="raw text", hint="give a file with text in it")
    return Dataset.from_dict({"input_ids": chunks})

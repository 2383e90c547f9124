"""Running text cut into overlapping windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset

from ..errors import ArgumentError, ConfigError, DataError, UnsupportedError
from . import sources
from .stored import stored

# File name endings by format; anything else is read as plain text.
_FORMATS = {
    ".txt": "txt",
    ".md": "md",
    ".markdown": "md",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}

Chunk = dict[str, list[int]]
_BATCH = 1000


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


def token_chunks(text: str, tokenizer: Any, *, chunk_size: int, stride: int) -> list[list[int]]:
    """Tokenise one document and cut it into overlapping chunks.

    The document begins with the special tokens that ``tokenizer`` puts in front of a text, if it does, and ends with
    the end-of-sequence token, so that beginnings and ends are learnt where they really are. A last chunk of one token,
    which comes about without overlap only, is left out.

    Args:
        text: The document. Text of white space only gives no chunk.
        tokenizer: Tokenizer of the model.
        chunk_size: Tokens in a chunk.
        stride: Tokens that neighbouring chunks share.

    Returns:
        Token ids of each chunk.

    Raises:
        ConfigError: ``chunk_size`` or ``stride`` is out of range.
    """
    windows(0, chunk_size, stride)
    if not text.strip():
        return []
    # verbose=False: a whole document is longer than the model's limit on purpose.
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    chunks = [ids[start:stop] for start, stop in windows(len(ids), chunk_size, stride)]
    # A token alone has none to be predicted from; a batch of it would have no loss.
    return chunks[:-1] if len(chunks) > 1 and len(chunks[-1]) == 1 else chunks


def text_chunks(text: str, tokenizer: Any, *, chunk_size: int, stride: int, with_end: bool = True) -> list[str]:
    """Cut one document into overlapping chunks of its own text, each ``chunk_size`` tokens long.

    The cuts are those of ``token_chunks`` without the tokens that ``tokenizer`` adds, which it will add to each chunk
    when that is tokenised. A character of several tokens
    that a cut goes through stands in both chunks.

    Args:
        text: The document. Text of white space only gives no chunk.
        tokenizer: Tokenizer of the model, a fast one.
        chunk_size: Tokens in a chunk.
        stride: Tokens that neighbouring chunks share.
        with_end: Whether the text of the end-of-sequence token is put at the end. Default True.

    Returns:
        The text of each chunk.

    Raises:
        ConfigError: ``chunk_size`` or ``stride`` is out of range.
        UnsupportedError: the tokenizer cannot say which characters a token stands for.
    """
    windows(0, chunk_size, stride)
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "text chunks need a tokenizer that knows the place of each token",
            why=f"{type(tokenizer).__name__} is a slow tokenizer",
            hint="use its fast version, or return_tokenized=True",
        )
    if not text.strip():
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = [tuple(place) for place in encoded["offset_mapping"]]
    if not places:
        return []
    # Characters that the tokenizer leaves out, white space mostly, stay with the token before them.
    starts = [0, *(start for start, _ in places[1:])]
    stops = [max(stop, following) for (_, stop), following in zip(places, [*starts[1:], len(text)])]
    end = tokenizer.eos_token or "" if with_end else ""
    if end and not text.endswith(end):
        starts, stops = [*starts, len(text)], [*stops, len(text)]
    else:
        end = ""
    chunks = [text[starts[first] : stops[last - 1]] for first, last in windows(len(starts), chunk_size, stride)]
    return [*chunks[:-1], chunks[-1] + end]


def chunk_documents(texts: Iterable[str], tokenizer: Any, *, chunk_size: int = 2048, stride: int = 512) -> Dataset:
    """Tokenise documents and cut each into overlapping chunks for causal language modelling, as ``token_chunks`` does.

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

    def tables() -> Iterator[pa.Table]:
        waiting: list[list[int]] = []
        for text in texts:
            waiting += token_chunks(text, tokenizer, chunk_size=chunk_size, stride=stride)
            if len(waiting) >= _BATCH:
                yield _table(waiting)
                waiting = []
        if waiting:
            yield _table(waiting)

    chunks = stored(tables(), "Tokenizing running text")
    if not len(chunks):
        raise _no_text()
    return chunks


def _table(chunks: list[list[int]]) -> pa.Table:
    return pa.table({"input_ids": pa.array(chunks, pa.list_(pa.int32()))})


def _no_text(where: str = "raw text") -> DataError:
    return DataError("the text is empty", where=where, hint="give a file with text in it")


class RawTextDataLoader:
    """Turns files of running text into data sets for continued pretraining.

    Args:
        tokenizer: Tokenizer or processor of the model.
        chunk_size: Tokens in a chunk. Default 2048.
        stride: Tokens that neighbouring chunks share, from 0 to below ``chunk_size``. Default 512.
        return_tokenized: Whether chunks are token ids (the default) or text.

    Raises:
        ConfigError: ``chunk_size`` or ``stride`` is out of range.
        ArgumentError: ``tokenizer`` is none.
    """

    def __init__(
        self, tokenizer: Any, chunk_size: int = 2048, stride: int = 512, return_tokenized: bool = True
    ) -> None:
        windows(0, chunk_size, stride)
        if not callable(tokenizer):
            raise ArgumentError(f"{type(tokenizer).__name__} is no tokenizer", where="argument tokenizer")
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.chunk_size = chunk_size
        self.stride = stride
        self.return_tokenized = return_tokenized

    def detect_format(self, file_path: str | Path) -> str:
        """Return ``txt``, ``md``, ``json``, ``jsonl`` or ``csv`` by the file's name; unknown endings are ``txt``."""
        return _FORMATS.get(Path(file_path).suffix.lower(), "txt")

    def load_from_file(self, file_path: str | Path, return_tokenized: bool | None = None) -> Dataset:
        """Read one file and cut it into chunks.

        A text file is one document; of a json, jsonl or csv file, each row's column ``text`` is one.

        Args:
            file_path: The file, in UTF-8.
            return_tokenized: Token ids or text. Default: as the loader was made.

        Returns:
            A data set, see ``create_causal_dataset``.

        Raises:
            DataError: the file is not there, is not text, has no column ``text`` or no text.
        """
        return self.load_from_files([file_path], return_tokenized)

    def load_from_files(self, file_paths: Sequence[str | Path], return_tokenized: bool | None = None) -> Dataset:
        """Read several files into one data set; no chunk holds text of two documents.

        Args:
            file_paths: The files.
            return_tokenized: Token ids or text. Default: as the loader was made.

        Returns:
            A data set, see ``create_causal_dataset``.

        Raises:
            DataError: a file is not there, is not text, has no column ``text`` or no text.
            ArgumentError: one path instead of a list.
            ConfigError: no path.
        """
        if isinstance(file_paths, str | Path):
            raise ArgumentError("load_from_files takes a list of paths", hint="use load_from_file for one file")
        if not file_paths:
            raise ConfigError("there is no file to load", where="argument file_paths")

        def tables() -> Iterator[pa.Table]:
            for path in file_paths:
                waiting: list[Chunk | str] = []
                some = False
                for text in _documents(path):
                    waiting += self.chunk_text(text, return_tokenized)
                    some = some or bool(waiting)
                    if len(waiting) >= _BATCH:
                        yield self.create_causal_dataset(waiting).data.table
                        waiting = []
                if not some:
                    raise _no_text(str(path))
                if waiting:
                    yield self.create_causal_dataset(waiting).data.table

        return stored(tables(), "Cutting running text")

    def chunk_text(self, text: str, return_tokenized: bool | None = None) -> list[Chunk] | list[str]:
        """Cut a text with the loader's chunk size and stride; see ``smart_chunk_text``."""
        tokenized = self.return_tokenized if return_tokenized is None else return_tokenized
        return self.smart_chunk_text(text, self.chunk_size, self.stride, tokenized)

    def smart_chunk_text(
        self, text: str, chunk_size: int, stride: int, return_tokenized: bool = True
    ) -> list[Chunk] | list[str]:
        """Cut a text into overlapping chunks of tokens; its last chunk ends with the end-of-sequence token.

        Args:
            text: The text. White space only gives no chunk.
            chunk_size: Tokens in a chunk.
            stride: Tokens that neighbouring chunks share.
            return_tokenized: Whether chunks are token ids (the default) or text.

        Returns:
            Chunks with ``input_ids`` and ``attention_mask``, or texts.

        Raises:
            ConfigError: ``chunk_size`` or ``stride`` is out of range.
            ArgumentError: ``text`` is no text.
            UnsupportedError: text chunks with a slow tokenizer.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"the text is {type(text).__name__}, not str", where="argument text")
        if not return_tokenized:
            return text_chunks(text, self.tokenizer, chunk_size=chunk_size, stride=stride)
        chunks = token_chunks(text, self.tokenizer, chunk_size=chunk_size, stride=stride)
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in chunks]

    def create_causal_dataset(self, chunks: Sequence[Chunk | str]) -> Dataset:
        """Make a data set of chunks.

        Args:
            chunks: What ``chunk_text`` returned.

        Returns:
            A data set with ``input_ids``, ``attention_mask`` and ``labels`` (equal to the ids; models shift them), or
            with ``text``.

        Raises:
            DataError: there is no chunk.
            ArgumentError: token ids and texts are mixed.
        """
        if not chunks:
            raise _no_text("chunks")
        if all(isinstance(chunk, str) for chunk in chunks):
            return Dataset.from_dict({"text": list(chunks)})
        if not all(isinstance(chunk, Mapping) for chunk in chunks):
            raise ArgumentError("the chunks mix token ids and texts", where="argument chunks")
        rows = cast("Sequence[Chunk]", chunks)
        ids = [row["input_ids"] for row in rows]
        masks = [row["attention_mask"] for row in rows]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": ids})


def _documents(path: str | Path) -> Iterator[str]:
    dataset = sources.load_text(path).dataset
    for batch in dataset.iter(batch_size=1000):
        for text in cast("Mapping[str, list[Any]]", batch)["text"]:
            if text is not None and not isinstance(text, str):
                raise DataError(f"the column 'text' holds {type(text).__name__}, not text", where=str(path))
            yield text or ""

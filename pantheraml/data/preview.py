"""What training will see of a data set: token ids and labels of each row, and what is cut off, lost or misread."""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from datasets import Dataset

from ..errors import DataError
from . import formats
from .formats import Kind
from .markers import render
from .masking import IGNORED, response_masker
from .pieces import Pieces, pieces_of, text_part, unmarked
from .responses import Labeller

_BINS = 10
_STEPS = (1, 2, 5, 10)
_BATCH = 500
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass
class Finding:
    """Rows that have something in common.

    Attributes:
        rows: How many.
        first: The place of the first one, ``file:line``; None when there is none.
        detail: What was found in that one.
    """

    rows: int = 0
    first: str | None = None
    detail: str | None = None

    def add(self, place: str, detail: str | None = None) -> None:
        """Count one more row."""
        if not self.rows:
            self.first, self.detail = place, detail
        self.rows += 1


@dataclass(frozen=True)
class Example:
    """One row as it is trained.

    Attributes:
        place: ``file:line`` of the row.
        tokens: Length of the row in tokens before it is cut.
        cut: Tokens that are cut off.
        segments: Runs of text and whether their tokens are trained.
    """

    place: str
    tokens: int
    cut: int
    segments: list[tuple[str, bool]]


@dataclass
class Preview:
    """What ``look`` saw.

    Attributes:
        max_length: Longest sequence in tokens.
        lengths: Length of each row in tokens before it is cut.
        examples: The first rows.
        truncated: Rows longer than ``max_length``.
        empty: Rows without a trained token; ``cut_off`` counts those that had one before they were cut.
        cut_off: See ``empty``.
        control: Rows whose content spells a special token, which the tokenizer reads as that token; None where texts
            come with their special tokens.
        double_bos: Rows that begin with two beginning-of-sequence tokens.
        spelt_bos: Rows that spell the token which the tokenizer adds too, and that get one of them only, as training
            gives to data whose first row is like that.
        tokens: Tokens of the trained rows after cutting.
        supervised: Those of them that are trained.
        sequences: Sequences of ``max_length`` that best-fit packing needs for the trained rows.
    """

    max_length: int
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    examples: list[Example] = field(default_factory=list)
    truncated: Finding = field(default_factory=Finding)
    empty: Finding = field(default_factory=Finding)
    cut_off: int = 0
    control: Finding | None = None
    double_bos: Finding = field(default_factory=Finding)
    spelt_bos: Finding = field(default_factory=Finding)
    tokens: int = 0
    supervised: int = 0
    sequences: int = 0

    @property
    def efficiency(self) -> float:
        """Share of the packed sequences that holds tokens."""
        return self.tokens / (self.sequences * self.max_length) if self.sequences else 0.0

    def length_summary(self) -> dict[str, float]:
        """Smallest, median, mean, 95th percentile and largest length in tokens."""
        ordered = sorted(self.lengths)
        last = len(ordered) - 1
        return {
            "min": ordered[0],
            "median": statistics.median(ordered),
            "mean": round(statistics.fmean(ordered), 1),
            "p95": ordered[round(0.95 * last)],
            "max": ordered[last],
        }


def histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """Count lengths in at most ten ranges of equal, round width.

    Returns:
        ``(first, last, count)`` of each range from that of the shortest length to that of the longest, ends included.
    """
    counts = Counter(lengths)
    if not counts:
        return []
    low, high = min(counts), max(counts)
    widths = (step * 10**power for power in itertools.count() for step in _STEPS[:-1])
    width = next(width for width in widths if high // width - low // width < _BINS)
    bins: Counter[int] = Counter()
    for length, count in counts.items():
        bins[length // width] += count
    return [(i * width, (i + 1) * width - 1, bins[i]) for i in range(low // width, high // width + 1)]


def packed_sequences(lengths: Iterable[int], size: int) -> int:
    """Number of sequences of ``size`` tokens into which rows fit, longest first, each where it leaves least space.

    Best-fit decreasing: https://en.wikipedia.org/wiki/Bin_packing_problem

    Args:
        lengths: Tokens of each row; longer rows count as ``size``, empty ones not at all.
        size: Tokens of a sequence.
    """
    waiting = Counter(min(length, size) for length in lengths if length > 0)
    spaces: list[int] = []  # the distinct free spaces, ascending
    count_of: Counter[int] = Counter()
    sequences = 0
    for length in sorted(waiting, reverse=True):
        for _ in range(waiting[length]):
            index = bisect.bisect_left(spaces, length)
            if index < len(spaces):
                space = spaces[index]
                count_of[space] -= 1
                if not count_of[space]:
                    del spaces[index]
            else:
                space = size
                sequences += 1
            left = space - length
            if left and not count_of[left]:
                bisect.insort(spaces, left)
            count_of[left] += 1
    return sequences


def segments(ids: Sequence[int], labels: Sequence[int], pieces: Pieces) -> list[tuple[str, bool]]:
    """The text of token ids, in runs of trained and of masked tokens."""
    runs = itertools.groupby(zip(pieces.of(ids), labels), key=lambda pair: pair[1] != IGNORED)
    found = []
    for trained, pairs in runs:
        data = b"".join(unmarked(piece) for piece, _ in pairs)
        found.append((data.decode("utf-8", "replace"), trained))
    return found


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that the tokenizer reads out of plain text, longest first."""
    inner = text_part(tokenizer)
    if getattr(inner, "split_special_tokens", False):
        return ()
    special = {token.content for token in inner.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(str.strip, special), key=lambda token: (-len(token), token)))


def _contents(row: Mapping[str, Any]) -> Iterator[str]:
    """What people wrote in a checked row; template and end tokens are not part of it."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for message in value:
                content = message.get("content") if isinstance(message, Mapping) else None
                parts = content if isinstance(content, list) else [{"text": content}]
                yield from (part["text"] for part in parts if isinstance(part.get("text"), str))


def _typed(row: Mapping[str, Any], tokens: Sequence[str], tokenizer: Any) -> str | None:
    """The first special token that a row's contents spell; a BOS at their start and an EOS at their end are meant."""
    for text in _contents(row):
        text = text.strip()
        text = text.removeprefix(tokenizer.bos_token or "").removesuffix(tokenizer.eos_token or "")
        found = next((token for token in tokens if token in text), None)
        if found is not None:
            return found
    return None


class _Encoder:
    """Token ids and labels of training rows, as TRL's ``SFTTrainer`` makes them for an adapted model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.inner = text_part(tokenizer)
        bos = self.inner.bos_token_id
        self.adds_bos = bos is not None and self.inner("a")["input_ids"][:1] == [bos]
        self.one_bos = False

    def begin(self, row: Mapping[str, Any]) -> None:
        """Take the first row: when it spells the BOS that the tokenizer adds, training sees to one in every row."""
        self.one_bos = self.spells_bos(row)

    def spells_bos(self, row: Mapping[str, Any]) -> bool:
        """Whether a text begins with the beginning-of-sequence token that the tokenizer adds by itself."""
        text = row.get("prompt", row.get("text"))
        return self.adds_bos and isinstance(text, str) and text.lstrip().startswith(self.inner.bos_token)

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids and labels, not cut."""
        if "input_ids" in row:
            return row["input_ids"], list(row["input_ids"])
        if "messages" in row:
            ids = self._chat(row["messages"], row)
            return ids, list(ids)
        if "text" in row:
            ids = self._text(self._ended(row["text"]))
            return ids, list(ids)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            start = self._chat(prompt, row, add_generation_prompt=True)
            ids = self._chat([*prompt, *completion], row)
        else:
            start, ids = self._text(prompt), self._text(self._ended(prompt + completion))
        shared = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), min(len(start), len(ids)))
        return ids, [IGNORED] * shared + ids[shared:]

    def _text(self, text: str) -> list[int]:
        own = self.one_bos and self.spells_bos({"text": text})
        return self.inner(text, add_special_tokens=not own, verbose=False)["input_ids"]

    def _ended(self, text: str) -> str:
        end = self.inner.eos_token
        return text if not end or text.endswith(end) else text + end

    def _chat(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], **options: Any) -> list[int]:
        tools = row.get("tools")
        if tools:
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        text = render([dict(message) for message in messages], self.tokenizer, **options)
        return self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(batch_size=_BATCH):
        names = list(batch)
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values))


def look(
    checked: Dataset,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int,
    responses_only: bool = False,
    packing: bool = False,
    shown: int = 3,
    origin: Callable[[int], str] = lambda index: f"row {index + 1}",
) -> Preview:
    """Tokenise and label every row as training will.

    Every token of a text or of a conversation is trained, and of a prompt with completion the completion. With
    ``responses_only`` it is what ``train_on_responses_only`` leaves.

    Args:
        checked: Rows that ``formats.check`` returned, or rows of ``input_ids``.
        kind: How they are read.
        tokenizer: Tokenizer or processor.
        max_length: Longest sequence in tokens; the rest of a row is cut off.
        responses_only: Whether only replies are trained.
        packing: Whether rows are packed, so that rows without a trained token are not dropped.
        shown: Number of rows that are kept as examples.
        origin: Names the place of a row, given its index.

    Returns:
        The counts, and the first rows.

    Raises:
        DataError: the tokenizer has no chat template or cannot write a row with it.
        ConfigError: with ``responses_only``, nothing marks replies.
    """
    chunks = "input_ids" in checked.column_names
    training = checked if chunks else formats.render(checked, kind, tokenizer)
    encode, pieces, inner = _Encoder(tokenizer), pieces_of(tokenizer), text_part(tokenizer)
    label = Labeller(response_masker(tokenizer), tokenizer) if responses_only else None
    encode.begin(training[0])
    controls = control_tokens(tokenizer)
    preview = Preview(max_length, control=None if kind == "text" else Finding())
    kept = array("Q")

    def labelled(row: Mapping[str, Any], ids: list[int], labels: list[int]) -> list[int]:
        return label({**row, "input_ids": ids, "labels": labels})["labels"] if label else labels

    for index, (written, row) in enumerate(zip(_rows(checked), _rows(training), strict=True)):
        place = origin(index)
        try:
            ids, every = encode(row)
        except _TEMPLATE_ERRORS as error:
            raise DataError(
                "the chat template refuses a conversation", where=place, why=str(error), hint="mend or drop the row"
            ) from error
        cut_ids = ids[:max_length]
        labels = labelled(row, cut_ids, every[:max_length])
        trained = sum(token != IGNORED for token in labels)
        preview.lengths.append(len(ids))
        if len(ids) > max_length:
            preview.truncated.add(place)
        if not trained:
            preview.empty.add(place)
            had = len(ids) > max_length and any(token != IGNORED for token in labelled(row, ids, every))
            preview.cut_off += had
        if trained or packing:
            kept.append(len(cut_ids))
            preview.supervised += trained
        if inner.bos_token_id is not None and ids[:2] == [inner.bos_token_id] * 2:
            preview.double_bos.add(place)
        if encode.one_bos and encode.spells_bos(row):
            preview.spelt_bos.add(place)
        if preview.control is not None and (token := _typed(written, controls, inner)) is not None:
            preview.control.add(place, token)
        if index < shown:
            runs = segments(cut_ids, labels, pieces)
            preview.examples.append(Example(place, len(ids), len(ids) - len(cut_ids), runs))
    preview.tokens = sum(kept)
    preview.sequences = packed_sequences(kept, max_length)
    return preview

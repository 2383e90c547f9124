"""What training will see of a data set: token ids and labels of each row, and what is cut off, lost or misread."""

from __future__ import annotations

import bisect
import itertools
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset

from ..errors import DataError
from . import formats
from .control import control_tokens
from .encoding import Encoded, Encoder, RefusedRowError
from .formats import Kind
from .masking import IGNORED, response_masker
from .pieces import Pieces, pieces_of, text_part, unmarked
from .prepare import BATCH_ROWS
from .responses import Labeller

_BINS = 10
_STEPS = (1, 2, 5, 10)
_BATCH = 500


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
        control: Rows that spell special tokens which stay text, for somebody typed them.
        read: Rows that come as a whole text and spell special tokens, which the tokenizer reads as such.
        double_bos: Rows that begin with two beginning-of-sequence tokens.
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
    control: Finding = field(default_factory=Finding)
    read: Finding = field(default_factory=Finding)
    double_bos: Finding = field(default_factory=Finding)
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


def _spelt(text: str, tokens: Sequence[str], tokenizer: Any) -> str | None:
    """The first special token that a text spells; a BOS at its start and an EOS at its end are not counted."""
    text = text.strip().removeprefix(tokenizer.bos_token or "").removesuffix(tokenizer.eos_token or "")
    return next((token for token in tokens if token in text), None)


def _batches(dataset: Dataset) -> Iterator[tuple[dict[str, list[Any]], list[dict[str, Any]]]]:
    """Batches of rows by column and row by row."""
    for columns in dataset.iter(batch_size=_BATCH):
        batch = cast("dict[str, list[Any]]", columns)
        yield batch, [dict(zip(batch, values)) for values in zip(*batch.values(), strict=True)]


def look(
    checked: Dataset,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int,
    responses_only: bool = False,
    packing: bool = False,
    parse_control: bool | None = None,
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
        parse_control: Whether control tokens that people typed are read as such. Default None, see ``Encoder``.
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
    encode, pieces, inner = Encoder(tokenizer, parse_control=parse_control), pieces_of(tokenizer), text_part(tokenizer)
    encode.begin(training[:BATCH_ROWS].get("prompt", ()))
    # Of a prompt with completion only the completion is trained anyway.
    first: Any = next(iter(training), {})
    wants_replies = responses_only and not isinstance(first.get("prompt"), str)
    label = Labeller(response_masker(tokenizer), tokenizer) if wants_replies else None
    controls = control_tokens(tokenizer)
    preview = Preview(max_length)
    kept = array("Q")

    def labelled(row: Mapping[str, Any], ids: list[int], labels: list[int]) -> list[int]:
        return label({**row, "input_ids": ids, "labels": labels})["labels"] if label else labels

    index = -1
    for columns, rows in _batches(training):
        try:
            encoded = Encoded(columns["input_ids"], [0] * len(rows), [None] * len(rows)) if chunks else encode(columns)
        except RefusedRowError as error:
            raise DataError(
                "the chat template refuses a conversation",
                where=origin(index + 1 + error.index),
                why=str(error),
                hint="mend or drop the row",
            ) from error
        for row, ids, start, typed in zip(rows, encoded.ids, encoded.starts, encoded.typed):
            index += 1
            place = origin(index)
            every = [IGNORED] * start + ids[start:]
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
            if typed is not None:
                preview.control.add(place, typed)
            else:
                texts = [row[name] for name in ("text", "prompt", "completion") if isinstance(row.get(name), str)]
                spelt = _spelt("".join(texts), controls, inner)
                if spelt is not None:
                    preview.read.add(place, spelt)
            if index < shown:
                runs = segments(cut_ids, labels, pieces)
                preview.examples.append(Example(place, len(ids), len(ids) - len(cut_ids), runs))
    preview.tokens = sum(kept)
    preview.sequences = packed_sequences(kept, max_length)
    return preview

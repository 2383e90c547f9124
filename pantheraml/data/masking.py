"""Labels that train on replies only, for token ids: replies are found by what the chat template writes around them.

Where the messages are at hand, :mod:`pantheraml.data.replies` gives the same labels from renderings of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from .markers import Markers, detect_markers
from .pieces import OPEN, Pieces, marked, pieces_of, text_part

IGNORED = -100
Span = tuple[int, int]


@dataclass(frozen=True)
class ResponseMasker:
    """Masks token ids outside replies. Called with a row of a data set, it returns the row's ``labels``.

    Attributes:
        pieces: Bytes of each token.
        response: Finds what opens a reply.
        stop: Finds what ends it: its groups are ``end`` (part of the reply) or none (a following turn).
        markers: The texts looked for.
        last_response_only: Whether only the last reply of a conversation is trained.
    """

    pieces: Pieces
    response: re.Pattern[bytes]
    stop: re.Pattern[bytes]
    markers: Markers
    last_response_only: bool = False

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """The ``labels`` of a row with ``input_ids``, and perhaps ``labels``, ``attention_mask``, ``seq_lengths``."""
        return {"labels": self.batch({name: [value] for name, value in row.items() if name in COLUMNS})["labels"][0]}

    def batch(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """The ``labels`` of a batch of rows, given as columns."""
        ids = [_plain(row) for row in rows["input_ids"]]
        lengths = [None if row is None else _plain(row) for row in rows.get("seq_lengths") or [None] * len(ids)]
        labelled = [self.labels(row, several) for row, several in zip(ids, lengths)]
        names = [name for name in rows if name in COLUMNS]
        singles = (dict(zip(names, values)) for values in zip(*(rows[name] for name in names)))
        return {"labels": [masked_before(labels, row) for labels, row in zip(labelled, singles)]}

    def labels(self, input_ids: Sequence[int], seq_lengths: Sequence[int] | None = None) -> list[int]:
        """The labels of one row of token ids."""
        ends = itertools.accumulate([len(input_ids)] if seq_lengths is None else seq_lengths, initial=0)
        return self.flat_labels(np.asarray(input_ids, np.int64), list(ends)).tolist()

    def flat_labels(self, ids: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
        """The labels of many documents that lie one after the other.

        Args:
            ids: Token ids of all, [N].
            bounds: Where in ``ids`` each document begins, and where the last one ends.

        Returns:
            The labels, [N], of the type of ``ids``.
        """
        pieces = self.pieces.of(ids.tolist())
        data = b"".join(pieces)
        starts = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)), out=starts[1:])
        spans: list[Span] = []
        edges = starts[np.asarray(bounds)].tolist()
        for begin, end in itertools.pairwise(edges):
            if begin < end:
                spans += self._spans(data, begin, end)
        labels = np.full_like(ids, IGNORED)
        if spans:
            of_spans = np.array(spans)
            first = np.searchsorted(starts, of_spans[:, 0], "right") - 1
            for start, end in zip(first.tolist(), np.searchsorted(starts, of_spans[:, 1], "left").tolist()):
                labels[start:end] = ids[start:end]
        return labels

    def has_response(self, input_ids: Sequence[int]) -> bool:
        """Whether something in the row opens a reply."""
        return self.response.search(b"".join(self.pieces.of(input_ids))) is not None

    def _spans(self, data: bytes, begin: int, end: int) -> list[Span]:
        spans = list(_spans(data, begin, end, self.response, self.stop, has_end=bool(self.markers.ends)))
        return spans[-1:] if self.last_response_only else spans


COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths")


def _plain(values: Any) -> list[int]:
    """A list of numbers, of the list or tensor that a data set gives."""
    return values.tolist() if hasattr(values, "tolist") else values


def masked_before(labels: list[int], row: Mapping[str, Any]) -> list[int]:
    """``labels``, masked as well where the row's own ``labels`` or ``attention_mask`` are."""
    for name, ignored in (("labels", IGNORED), ("attention_mask", 0)):
        other = row.get(name)
        if other is not None and len(other) == len(labels):
            labels = [IGNORED if there == ignored else label for label, there in zip(labels, other)]
    return labels


def _spans(
    data: bytes, begin: int, limit: int, response: re.Pattern[bytes], stop: re.Pattern[bytes], *, has_end: bool
) -> Iterator[Span]:
    """The replies in the document ``data[begin:limit]``."""
    position = begin
    while (opening := response.search(data, position, limit)) is not None:
        start = opening.end()
        closing = stop.search(data, start, limit)
        if closing is not None and closing["end"] is not None:
            end = position = closing.end()
        else:
            end = position = limit if closing is None else closing.start()
            if closing is not None or not has_end:
                # Not cut off: what separates turns is no part of the reply.
                end = start + len(data[start:end].rstrip())
        if end > start:
            yield start, end


def response_masker(
    tokenizer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    force_match: bool = True,
    last_response_only: bool = False,
) -> ResponseMasker:
    """Make what masks token ids of one tokenizer.

    Args:
        tokenizer: Tokenizer or processor that made the token ids.
        instruction_part: Text before each user message; None together with ``response_part`` takes both from the chat
            template.
        response_part: Text before each assistant message.
        force_match: Whether given markers match with the spaces and newlines at their ends only. Default True.
        last_response_only: Whether only the last reply of a conversation is trained. Default False.

    Returns:
        The masker.

    Raises:
        ConfigError: one marker is given without the other, a marker is blank, or none can be found.
    """
    automatic = instruction_part is None and response_part is None
    if automatic:
        markers = detect_markers(tokenizer)
    elif instruction_part is None or response_part is None:
        missing = "instruction_part" if instruction_part is None else "response_part"
        raise ConfigError(
            f"{missing} is missing",
            where=f"argument {missing}",
            why="the text before user messages and the text before assistant messages are needed together",
            hint="pass both, or neither to take them from the chat template",
        )
    else:
        markers = Markers(instruction_part, response_part, _known_ends(tokenizer))
        for name, text in (("instruction_part", instruction_part), ("response_part", response_part)):
            if not text.strip():
                raise ConfigError(f"{name} is blank", where=f"argument {name}", hint="pass the text of the marker")
    inner = text_part(tokenizer)
    pieces = pieces_of(inner)
    strict = force_match and not automatic
    instruction = _pattern(pieces.encode(markers.instruction, inner), strict=strict)
    response = _pattern(pieces.encode(markers.response, inner), strict=strict)
    prefill = re.escape(pieces.encode(markers.prefill, inner)) if markers.prefill else b""
    stops = [rb"(?P<end>" + _ending(markers.ends, pieces, inner) + rb")"]
    # A template that closes each reply closes it there, whatever the reply quotes.
    closed = automatic and bool(markers.ends)
    stops += [marker for marker in (response, instruction) if marker and (OPEN in marker or not closed)]
    if inner.pad_token is not None and inner.pad_token != inner.eos_token:
        stops.append(re.escape(marked(inner.pad_token)))
    opening = re.compile(response + b"(?:" + prefill + b")?")
    return ResponseMasker(pieces, opening, re.compile(b"|".join(stops)), markers, last_response_only)


def _known_ends(tokenizer: Any) -> tuple[str, ...]:
    """What closes replies in the chat template, where there is one that can be understood."""
    try:
        return detect_markers(tokenizer).ends
    except ConfigError:
        return ()


def _pattern(marker: bytes, *, strict: bool) -> bytes:
    core = marker.strip()
    if strict or not core:
        return re.escape(marker)
    # The spaces that follow belong to the marker as far as they are there.
    after = marker[len(marker.rstrip()) :]
    optional = b""
    for byte in reversed(after):
        optional = b"(?:" + re.escape(bytes([byte])) + optional + b")?"
    return re.escape(core) + optional


def _ending(ends: Sequence[str], pieces: Pieces, tokenizer: Any) -> bytes:
    """A pattern of what closes a reply. The end-of-sequence token after the last one is part of it."""
    eos = re.escape(marked(tokenizer.eos_token)) if tokenizer.eos_token else None
    found = sorted({pieces.encode(end, tokenizer).strip() for end in ends} - {b""}, key=lambda text: (-len(text), text))
    choices = [re.escape(end) for end in found]
    if eos is None:
        return b"|".join(choices) or rb"(?!)"
    last = rb"(?:\s*" + eos + rb"\Z)?"
    return b"|".join([*(choice + last for choice in choices if choice != eos), eos])


def mask_non_responses(
    data: Any,
    tokenizer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    force_match: bool = True,
    last_response_only: bool = False,
) -> Any:
    """Labels that are the token ids inside replies and -100 everywhere else.

    A reply begins after ``response_part`` and ends with what closes it (the template's end-of-turn token or the
    end-of-sequence token), which is trained too; without any, it ends before the next ``instruction_part``. A token
    that has a letter of the reply and a letter of the marker is trained.

    Args:
        data: Token ids of one text; a list of such lists; or a data set with ``input_ids``, map-style or streaming,
            or a dict of them. A data set's rows may be packed (``seq_lengths``); labels that are -100 stay so.
        tokenizer: Tokenizer or processor that made the token ids.
        instruction_part: Text before each user message; None together with ``response_part`` takes both from the chat
            template.
        response_part: Text before each assistant message.
        force_match: Whether given markers match with the spaces and newlines at their ends only. Default True.
        last_response_only: Whether only the last reply of a text is trained. Default False.

    Returns:
        A list of labels, a list of such lists, or the data set (dict of them) with a column ``labels``. No row is
        dropped.

    Raises:
        ConfigError: one marker is given without the other, a marker is blank, or none can be found.
    """
    masker = response_masker(
        tokenizer, instruction_part, response_part, force_match=force_match, last_response_only=last_response_only
    )
    if isinstance(data, Mapping):
        masked: Any = {name: part.map(masker) for name, part in data.items()}
        return masked if type(data) is dict else type(data)(masked)  # type: ignore[call-arg]
    if hasattr(data, "map"):
        return data.map(masker)
    data = _plain(data)
    if len(data) and not isinstance(data[0], int):
        return [masker.labels(_plain(ids)) for ids in data]
    return masker.labels(data)

"""Rows whose types fit one another, found a batch at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import Rejections, Row, type_name

NumberedBatch = list[tuple[int, Row]]

BATCH_ROWS = 1000
_BATCH_LETTERS = 16 * 1024**2
_INT64 = 1 << 63
_TOO_LARGE = "a number beyond 64 bits"


def _walk(value: Any, path: str, found: list[tuple[str, str]]) -> None:
    if value is None:
        return
    kind = type_name(value)
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        kind = _TOO_LARGE
    found.append((path, kind))
    if isinstance(value, list):
        for item in value:
            _walk(item, f"{path}[]", found)
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(item, f"{path}.{key}" if path else key, found)


class Kinds:
    """The type of each column, also inside lists and objects: that of most rows of the first batch that has it."""

    def __init__(self) -> None:
        self.expected: dict[str, str] = {}

    def split(self, batch: list[Row]) -> tuple[list[int], dict[int, str]]:
        """Return the indices of rows whose types fit the other rows', and the reason for each that does not."""
        found: list[list[tuple[str, str]]] = []
        counts: dict[str, Counter[str]] = {}
        for row in batch:
            pairs: list[tuple[str, str]] = []
            for key, value in row.items():
                _walk(value, key, pairs)
            found.append(pairs)
            for path, kind in pairs:
                if path not in self.expected:
                    counts.setdefault(path, Counter())[kind] += 1
        self.expected |= {path: counter.most_common(1)[0][0] for path, counter in counts.items()}
        good, bad = [], {}
        for index, pairs in enumerate(found):
            wrong = next(((p, kind) for p, kind in pairs if kind != self.expected[p] or kind == _TOO_LARGE), None)
            if wrong is None:
                good.append(index)
            else:
                path, kind = wrong
                bad[index] = f"wrong type: {path!r} is {kind} where other rows have {self.expected[path]}"
        return good, bad


def batches(numbered: Iterator[tuple[int, Row]]) -> Iterator[NumberedBatch]:
    """Rows a batch at a time, so that only one batch exists as Python objects."""
    batch: NumberedBatch = []
    letters = 0
    for item in numbered:
        batch.append(item)
        letters += _letters(item[1])
        if len(batch) == BATCH_ROWS or letters >= _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _letters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_letters, parts))


def fitting(file: Path, batch: NumberedBatch, kinds: Kinds, rejections: Rejections) -> NumberedBatch:
    """Those rows of a batch whose types fit."""
    good, bad = kinds.split([row for _, row in batch])
    for index, reason in bad.items():
        line, row = batch[index]
        rejections.add(f"{file}:{line}", reason, row)
    return [batch[index] for index in good]

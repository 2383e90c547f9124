"""Rows of data files, and the bad ones among them with their places and reasons."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, DataError

Row = dict[str, Any]
NumberedRows = Iterator[tuple[int, Row]]

_SHOWN = 10
_KEPT_CHARACTERS = 2000
_KEPT_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row that cannot be trained on.

    Attributes:
        where: ``file:line``, or the row's number where there are no lines.
        reason: What is wrong with it.
        row: The row as text, cut to its first 2000 characters.
    """

    where: str
    reason: str
    row: str


class Rejections:
    """The bad rows of one data set, and how many of them are tolerated.

    Args:
        max_bad_fraction: Largest share of bad rows, 0 <= share < 1, that is dropped instead of raising. Default 0.
    """

    def __init__(self, max_bad_fraction: float = 0.0) -> None:
        if not 0.0 <= max_bad_fraction < 1.0:
            raise ConfigError(
                f"max_bad_fraction is {max_bad_fraction}",
                where="argument max_bad_fraction",
                hint="give the tolerated share of bad rows, from 0 (none) to below 1",
            )
        self.max_bad_fraction = max_bad_fraction
        self.total = 0
        self._count = 0
        self._first: list[str] = []
        self._reasons: Counter[str] = Counter()
        # Every row of a large data set may be bad: what does not fit in memory goes to a file.
        self._records: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_KEPT_BYTES)  # noqa: SIM115 - open as long as this

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rejected]:
        """The bad rows in order."""
        self._records.seek(0)
        for line in self._records:
            yield Rejected(**json.loads(line))

    def add(self, where: str, reason: str, row: object) -> None:
        """Count one bad row."""
        text = row if isinstance(row, str) else repr(row)
        self._add(Rejected(where, reason, text[:_KEPT_CHARACTERS]))

    def extend(self, other: Rejections) -> None:
        """Count the rows of another data set as well."""
        for item in other:
            self._add(item)
        self.total += other.total

    def _add(self, item: Rejected) -> None:
        self._count += 1
        self._reasons[item.reason.partition(":")[0]] += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"    {item.where}: {item.reason}")
        self._records.seek(0, os.SEEK_END)
        self._records.write(json.dumps(asdict(item), ensure_ascii=True).encode() + b"\n")

    def check(self, source: str) -> None:
        """Raise when more rows of ``source`` are bad than tolerated.

        Raises:
            DataError: lists the first ten bad rows, and the totals by reason.
        """
        if self._count <= self.max_bad_fraction * self.total:
            return
        shown = list(self._first)
        if self._count > _SHOWN:
            shown.append(f"    ... and {self._count - _SHOWN} more")
        totals = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(_SHOWN))
        raise DataError(
            f"{self._count} of {self.total} rows cannot be used:\n" + "\n".join(shown),
            where=source,
            why=totals,
            hint="repair these rows, or drop them with max_bad_fraction (--max_bad_fraction 0.01 tolerates 1 %)",
        )

    def write(self, path: Path) -> None:
        """Write the bad rows as json lines with the keys ``where``, ``reason`` and ``row``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._records.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._records, file)


def type_name(value: Any) -> str:
    """The json name of a value's type: ``text``, ``number``, ``true or false``, ``list``, ``object`` or ``null``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "object"

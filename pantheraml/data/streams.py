"""Rows that are read while they are trained on: nothing is stored, and training begins with the first of them.

They are checked as rows that are read beforehand are. What differs is when a bad row shows: when it is reached.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError, DataError, UnsupportedError
from . import formats, readers, sources
from .chats import BadRowError
from .fitting import Kinds, batches, fitting
from .formats import Format
from .rows import Rejected, Rejections, Row

# Of so many rows at the beginning the columns are detected, and the share of bad ones is not judged before.
HEAD_ROWS = 1000
# Each look at the beginning of a stream fetches these again.
_FETCHED_ROWS = 100
Batch = list[tuple[str, Row]]


class _Met(Rejections):
    """The bad rows of one reading. The first reading that comes to a row tells of it."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.max_bad_fraction)
        self._stream = stream

    def _add(self, item: Rejected) -> None:
        super()._add(item)
        if len(self) > self._stream.rejected:
            self._stream.rejected = len(self)
            self._stream.keep(item)

    def judge(self) -> None:
        """Raise when too many of the rows so far are bad, and enough were read to say so."""
        if self.max_bad_fraction == 0 or self.total >= HEAD_ROWS:
            self.check(f"{self._stream.spec} (read so far)")


@dataclass
class Stream:
    """A source of rows that is read from its beginning each time, and never held.

    Attributes:
        spec: What was asked for.
        description: One line for the user.
        max_bad_fraction: Share of bad rows that is dropped instead of raising.
        source: The data files, or rows that can be iterated over.
        start: The first row that is read, and ``stop``, the one behind the last; None for all.
        stop: See ``start``.
        rejected: Bad rows met so far.
        rejected_file: Json lines file to which bad rows are appended as they are met; None for none so far.
    """

    spec: str
    description: str
    max_bad_fraction: float
    source: list[Path] | IterableDataset | Dataset
    start: int
    stop: int | None
    rejected: int = 0
    rejected_file: Path | None = None
    _waiting: list[Rejected] = field(default_factory=list)

    def keep(self, item: Rejected) -> None:
        """Write a bad row to the file of them, or hold it until there is one."""
        if self.rejected_file is None:
            self._waiting.append(item)
        else:
            self._append([item])

    def write_rejected(self, path: Path) -> None:
        """Append the bad rows met so far to a json lines file, and from here on each that is met."""
        self.rejected_file = path
        self._append(self._waiting)
        self._waiting = []

    def _append(self, items: list[Rejected]) -> None:
        if items and self.rejected_file is not None:
            self.rejected_file.parent.mkdir(parents=True, exist_ok=True)
            with self.rejected_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(item)) + "\n" for item in items)

    def head(self) -> Dataset:
        """The first rows, as a data set.

        Raises:
            DataError: there is none, or too many of them are bad.
        """
        rejections = _Met(self)
        batch = next(self._batches(rejections), [])
        rejections.judge()
        if not batch:
            rejections.check(self.spec)
            raise DataError(
                "the data set is empty",
                where=self.spec,
                why=f"all {rejections.total} rows were rejected" if len(rejections) else "it holds no rows",
                hint="give a data set with at least one row",
            )
        return formats.from_rows(row for _, row in batch)

    def rows(self, format: Format) -> Iterator[tuple[str, Row]]:
        """The good rows in canonical columns, each with its place.

        Raises:
            DataError: more bad rows than tolerated, or no good one.
        """
        rejections = _Met(self)
        check = formats.row_check(format)
        some = False
        for batch in self._batches(rejections):
            good: Batch = []
            for place, row in batch:
                try:
                    good.append((place, check(row)))
                except BadRowError as error:
                    rejections.add(place, str(error), row)
            rejections.judge()
            some = some or bool(good)
            yield from good
        rejections.check(self.spec)
        if not some:
            raise DataError("no row is left to train on", where=self.spec, why=f"{len(rejections)} rows were rejected")

    def first(self, format: Format) -> tuple[Dataset, list[str]]:
        """The first good rows in canonical columns, and their places: those of the slice, or of 1000 rows."""
        count = HEAD_ROWS if self.stop is None else self.stop - self.start
        rows = list(itertools.islice(self.rows(format), count))
        return formats.from_rows(row for _, row in rows), [place for place, _ in rows]

    def checked(self, format: Format) -> IterableDataset:
        """``rows`` as a data set that can be iterated over again and again."""

        def generate() -> Iterator[Row]:
            return (row for _, row in self.rows(format))

        return cast("IterableDataset", IterableDataset.from_generator(generate))

    def _batches(self, rejections: Rejections) -> Iterator[Batch]:
        """All rows that can be read, some at a time."""
        left = None if self.stop is None else self.stop
        skip = self.start
        for batch in self._read(rejections):
            kept = batch[skip:] if left is None else batch[skip:left]
            skip = max(0, skip - len(batch))
            left = None if left is None else left - len(batch)
            if kept:
                yield kept
            if left is not None and left <= 0:
                return

    def _read(self, rejections: Rejections) -> Iterator[Batch]:
        if not isinstance(self.source, list):
            rows = enumerate(self.source, start=1)
            try:
                while batch := list(itertools.islice(rows, _FETCHED_ROWS)):
                    rejections.total += len(batch)
                    yield [(f"row {number}", dict(cast("Row", row))) for number, row in batch]
            except (OSError, HfHubHTTPError, DatasetGenerationError) as error:
                raise DataError(
                    f"the stream broke off after {rejections.total} rows",
                    where=self.spec,
                    why=str(error).strip().partition("\n")[0] or type(error).__name__,
                    hint="check the network; --resume auto goes on from the last checkpoint",
                ) from error
            return
        kinds = Kinds()
        for file in self.source:
            with sources.reading(file):
                if file.suffix.lower() == ".parquet":
                    yield from _of_parquet(file, rejections)
                else:
                    numbered = readers.READERS[file.suffix.lower()](file, rejections)
                    for batch in batches(numbered):
                        kept = fitting(file, batch, kinds, rejections)
                        yield [(f"{file}:{line}", row) for line, row in kept]


def _of_parquet(file: Path, rejections: Rejections) -> Iterator[Batch]:
    number = 0
    for batch in sources.parquet_batches(file):
        rejections.total += batch.num_rows
        yield [(f"{file}:{number + index}", row) for index, row in enumerate(batch.to_pylist(), start=1)]
        number += batch.num_rows


def open_stream(
    spec: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    max_bad_fraction: float = 0.0,
    token: str | None = None,
) -> Stream:
    """Open a source of rows without reading more than its beginning.

    Args:
        spec: What ``sources.load`` takes, but for text files.
        split: ``train``, ``test``, ...; a slice such as ``train[:1000]`` counts rows from the start.
        config: Configuration of a hub data set that has several.
        max_bad_fraction: Share of bad rows that is dropped instead of raising, 0 <= share < 1. It is judged of the rows
            read so far, of at least 1000, and at the end.
        token: Hub token; without one the login of ``hf auth login`` is used.

    Returns:
        The stream.

    Raises:
        DataError: nothing there, or it cannot be read.
        ConfigError: ``split`` or ``max_bad_fraction`` cannot be understood, or the split needs the number of rows.
        UnsupportedError: the source is running text.
    """
    Rejections(max_bad_fraction)  # Raises where it is out of range.
    name, start, stop = _bounds(split)
    path = sources.local_path(spec)
    if path is None:
        source: list[Path] | IterableDataset | Dataset = _of_hub(str(spec), name, config, token)
        description = f"a stream of the hub data set {spec} ({split})"
    else:
        description = f"a stream of {path}"
        if sources.is_saved(path):
            source = sources.load_saved(path, name)
        else:
            source = sources.data_files(path, name)
            if source[0].suffix.lower() == ".txt":
                raise UnsupportedError(
                    "running text is not streamed",
                    where=str(path),
                    why="a text file is cut into chunks as a whole",
                    hint="leave --streaming out, or give the text as rows of a json lines file",
                )
            description += f" ({len(source)} files)" if len(source) > 1 else ""
    return Stream(str(spec), description, max_bad_fraction, source, start, stop)


def _bounds(split: str) -> tuple[str, int, int | None]:
    match = sources.split_expression(split)
    bounds = [match["start"] or "0", match["stop"]]
    for text in bounds:
        if text is not None and not text.isdecimal():
            raise ConfigError(
                f"the split {split!r} needs the number of rows, which a stream does not know",
                hint="write a slice of row numbers from the start, such as 'train[:1000]'",
            )
    return match["name"], int(bounds[0] or 0), None if bounds[1] is None else int(bounds[1])


def _of_hub(name: str, split: str, config: str | None, token: str | None) -> IterableDataset:
    try:
        dataset: Any = load_dataset(name, config, split=split, token=token, streaming=True)
    except (OSError, ValueError, HfHubHTTPError, DatasetGenerationError) as error:
        raise sources.not_loaded(name, split, config, error) from error
    return dataset

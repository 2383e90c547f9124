"""Where rows come from: a hub data set, a local file, or a folder of files."""

from __future__ import annotations

import bisect
import contextlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError, DataError
from . import readers
from .fitting import BATCH_ROWS, Kinds, batches, fitting
from .rows import Rejections
from .stored import stored

SUFFIXES = (*readers.READERS, ".parquet")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_EXPRESSION = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass
class Loaded:
    """Rows and where they came from.

    Attributes:
        dataset: The good rows, with every column of the source.
        description: One line for the user.
        path: The local file or folder; None for the hub.
        rejections: The bad rows met so far, and how many are tolerated.
        documents: Whether each row is a whole text file, to be cut into chunks before training.
        origins: What names each row's place; see ``origin``.
    """

    dataset: Dataset
    description: str
    path: Path | None
    rejections: Rejections
    documents: bool
    origins: Origins

    def origin(self, index: int) -> str:
        """Return ``file:line`` of a row of ``dataset``, or its number where the source has no lines."""
        return self.origins.name(index)


class Origins:
    """The place of each row, kept as one number a row."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._names: list[str] = []
        self._lines = array("Q")
        self._offset = 0

    def begin(self, name: str) -> None:
        """Say that the rows added from here on come from ``name``."""
        self._starts.append(len(self._lines))
        self._names.append(name)

    def add(self, line: int) -> None:
        """Record the line of the next row."""
        self._lines.append(line)

    def extend(self, rows: int) -> None:
        """Record ``rows`` rows numbered from 1."""
        self._lines.extend(range(1, rows + 1))

    def shift(self, offset: int) -> None:
        """Drop the first ``offset`` rows."""
        self._offset += offset

    def name(self, index: int) -> str:
        """Return the place of row ``index``, counted from 0."""
        index += self._offset
        if index >= len(self._lines):
            return f"row {index + 1}"
        return f"{self._names[bisect.bisect_right(self._starts, index) - 1]}:{self._lines[index]}"


def looks_local(spec: str) -> bool:
    """Whether ``spec`` can only mean a path: it begins like one, or ends like a data file."""
    return spec.startswith((".", "/", "~", "\\")) or Path(spec).suffix.lower() in SUFFIXES or spec.count("/") > 1


def load(
    spec: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    max_bad_fraction: float = 0.0,
    token: str | None = None,
) -> Loaded:
    """Load rows from a hub data set, a local file or a folder of files.

    Args:
        spec: Hub name, or path of a json, jsonl, csv, tsv, parquet or txt file, of a folder of such files, or of a
            folder that ``Dataset.save_to_disk`` wrote. An existing path wins over a hub name.
        split: ``train``, ``test``, ...; a slice such as ``train[:1000]`` or ``train[10%:20%]`` is understood too. In a
            folder, files whose name says ``test`` or ``validation`` belong to that split, all others to ``train``.
        config: Configuration of a hub data set that has several.
        max_bad_fraction: Share of bad rows that is dropped instead of raising, 0 <= share < 1.
        token: Hub token; without one the login of ``hf auth login`` is used.

    Returns:
        The rows; bad ones that were tolerated are in ``rejections``.

    Raises:
        DataError: nothing there, unreadable, empty, or more bad rows than tolerated.
        ConfigError: ``split`` or ``max_bad_fraction`` cannot be understood.
    """
    rejections = Rejections(max_bad_fraction)
    path = local_path(spec)
    if path is not None:
        loaded = _load_local(path, split, rejections)
    else:
        loaded = _load_hub(str(spec), split, config, token, rejections)
    rejections.check(str(spec))
    if len(loaded.dataset) == 0:
        raise DataError(
            "the data set is empty",
            where=f"{spec} (split {split})",
            why=f"all {rejections.total} rows were rejected" if len(rejections) else "it holds no rows",
            hint="give a data set with at least one row",
        )
    return loaded


def local_path(spec: str | Path) -> Path | None:
    """The file or folder that ``spec`` names; None where it names a hub data set.

    Raises:
        DataError: it can only mean a path, and nothing is there.
    """
    path = Path(spec).expanduser()
    if path.exists():
        return path
    if looks_local(str(spec)):
        raise DataError(
            f"there is no data file {str(spec)!r}",
            where=str(path.absolute()),
            hint="check the path; a hub data set is named like 'owner/name'",
        )
    return None


def load_text(path: str | Path) -> Loaded:
    """Load running text: any text file as one document, or the text of the rows of a data file.

    Args:
        path: A text file (``.txt``, ``.md``, ...), or a json, jsonl, csv, tsv or parquet file with a column ``text``.

    Returns:
        One document a row, in the column ``text``.

    Raises:
        DataError: nothing there, not text, or empty.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no text file {str(path)!r}", where=str(path.absolute()), hint="check the path")
    if path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".txt":
        loaded = load(path)
        if "text" not in loaded.dataset.column_names:
            raise DataError(
                "the file has no column 'text'",
                where=str(path),
                why=f"found: {', '.join(loaded.dataset.column_names)}",
                hint="give running text, or use the file as a data set",
            )
        loaded.dataset = cast("Dataset", loaded.dataset.select_columns(["text"]))
    else:
        rejections = Rejections()
        documents = [row for _, row in readers.read_text(path, rejections)]
        rejections.check(str(path))
        if not documents:
            raise DataError("the file is empty", where=str(path), hint="give a file with text in it")
        description = f"{len(documents[0]['text'])} characters of {path}"
        loaded = Loaded(Dataset.from_list(documents), description, path, rejections, True, Origins())
    loaded.documents = True
    return loaded


def split_expression(split: str) -> re.Match[str]:
    """Take ``name[start:stop]`` apart.

    Raises:
        ConfigError: it is none.
    """
    match = _SPLIT_EXPRESSION.fullmatch(split.strip())
    if match is None:
        raise ConfigError(
            f"the split {split!r} cannot be understood", hint="write a name, or a slice such as 'train[:1000]'"
        )
    return match


def _slice(split: str, rows: int) -> tuple[int, int]:
    """Return the half-open range of rows that ``split`` names among ``rows``."""
    match = split_expression(split)
    bounds = []
    for part, default in (("start", 0), ("stop", rows)):
        text = match[part]
        number = default if text is None else int(text.rstrip("%"))
        if text is not None and text.endswith("%"):
            number = round(rows * number / 100)
        bounds.append(min(max(number + rows if number < 0 else number, 0), rows))
    return bounds[0], max(bounds)


def _load_hub(name: str, split: str, config: str | None, token: str | None, rejections: Rejections) -> Loaded:
    try:
        dataset = load_dataset(name, config, split=split, token=token)
    except (OSError, ValueError, HfHubHTTPError, DatasetGenerationError) as error:
        raise not_loaded(name, split, config, error) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"the data set {name!r} has no rows under split {split!r}", hint="name one of its splits")
    rejections.total = len(dataset)
    description = f"{len(dataset)} rows of the hub data set {name} ({split})"
    return Loaded(dataset, description, None, rejections, False, Origins())


def not_loaded(name: str, split: str, config: str | None, error: BaseException) -> DataError:
    """What to raise where a hub data set cannot be had."""
    return DataError(
        f"the data set {name!r} could not be loaded",
        where=f"hub data set {name!r}, configuration {config or 'default'}, split {split!r}",
        why=_first_line(error),
        hint="check the name and the network, or give a local json, jsonl, csv, parquet or txt file",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load_local(path: Path, split: str, rejections: Rejections) -> Loaded:
    name = split_expression(split)["name"]
    if is_saved(path):
        dataset, files, origins = load_saved(path, name), [], Origins()
        rejections.total = len(dataset)
    else:
        files = data_files(path, name)
        dataset, origins = _read_files(files, rejections)
    start, stop = _slice(split, len(dataset))
    if (start, stop) != (0, len(dataset)):
        dataset = cast("Dataset", dataset.select(range(start, stop)))
        origins.shift(start)
    documents = bool(files) and files[0].suffix.lower() == ".txt"
    unit = "text files" if documents else "rows"
    description = f"{len(dataset)} {unit} of {path}" + (f" ({len(files)} files)" if len(files) > 1 else "")
    return Loaded(dataset, description, path, rejections, documents, origins)


def is_saved(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote this folder."""
    return path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())


def load_saved(path: Path, split: str) -> Dataset:
    """The rows of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DataError("the saved data set cannot be read", where=str(path), why=_first_line(error)) from error
    if isinstance(saved, DatasetDict):
        splits = [str(name) for name in saved]
        if split not in splits:
            raise DataError(
                f"the data set has no split {split!r}", where=str(path), hint=f"it has: {', '.join(splits)}"
            )
        return saved[split]
    return saved


def _split_of(path: Path, folder: Path) -> str:
    words = set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder).with_suffix("")).lower()))
    for split in ("test", "validation"):
        if words & set(_SPLIT_WORDS[split]):
            return split
    return "train"


def data_files(path: Path, split: str) -> list[Path]:
    """The data files of a path; in a folder those of one split and one kind."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"files named {path.suffix or path.name!r} are not read",
                where=str(path),
                hint=f"give one of {', '.join(SUFFIXES)}",
            )
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    # Notes and licences lie beside data as text files, so text counts only where nothing else is.
    found = [file for file in found if file.suffix.lower() != ".txt"] or found
    if not found:
        raise DataError("the folder holds no data file", where=str(path), hint=f"put {', '.join(SUFFIXES)} files there")
    split = next((known for known, words in _SPLIT_WORDS.items() if split in words), split)
    chosen = [file for file in found if _split_of(file, path) == split]
    if not chosen:
        splits = sorted({_split_of(file, path) for file in found})
        raise DataError(f"the folder has no split {split!r}", where=str(path), hint=f"it has: {', '.join(splits)}")
    kinds = sorted({file.suffix.lower() for file in chosen})
    if len(kinds) > 1 and not set(kinds) <= {".json", ".jsonl", ".ndjson"}:
        raise DataError(
            f"the folder mixes {' and '.join(kinds)} files", where=str(path), hint="name one file, or keep one kind"
        )
    return chosen


def _read_files(files: list[Path], rejections: Rejections) -> tuple[Dataset, Origins]:
    origins = Origins()
    try:
        return stored(_tables(files, rejections, origins), "Reading rows"), origins
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            "the files do not fit together", where=", ".join(map(str, files[:3])), why=_first_line(error)
        ) from error


def _tables(files: list[Path], rejections: Rejections, origins: Origins) -> Iterator[pa.Table]:
    """The good rows of all files, some at a time."""
    kinds = Kinds()
    for file in files:
        origins.begin(str(file))
        with reading(file):
            if file.suffix.lower() == ".parquet":
                yield from _parquet_tables(file, rejections, origins)
            else:
                numbered = readers.READERS[file.suffix.lower()](file, rejections)
                for batch in batches(numbered):
                    rows = fitting(file, batch, kinds, rejections)
                    for line, _ in rows:
                        origins.add(line)
                    names = dict.fromkeys(name for _, row in rows for name in row)
                    yield pa.table({name: pa.array([row.get(name) for _, row in rows]) for name in names})


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise ``DataError`` for what goes wrong with a file."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DataError("the file cannot be read", where=str(file), why=_first_line(error)) from error
    except OSError as error:
        raise DataError("the file cannot be opened", where=str(file), why=_first_line(error)) from error


def _parquet_tables(file: Path, rejections: Rejections, origins: Origins) -> Iterator[pa.Table]:
    for batch in parquet_batches(file):
        rejections.total += batch.num_rows
        yield pa.Table.from_batches([batch])
    origins.extend(pq.read_metadata(file).num_rows)


def parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file, a thousand at a time.

    Raises:
        DataError: two columns have the same name.
    """
    with pq.ParquetFile(file, memory_map=True) as reader:
        names = Counter(reader.schema_arrow.names)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise DataError(f"the column {twice!r} stands twice", where=str(file), hint="rename one of them")
        yield from reader.iter_batches(BATCH_ROWS)

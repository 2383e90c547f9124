"""A data set gets token ids and labels: in threads, a batch at a time, cached by what it was made from.

One pass renders, encodes, labels and cuts. Encoding runs outside of Python's lock, so that threads use all cores
without copies of the data set and the tokenizer, and one renders while another encodes. What is made goes to a file
that is mapped into memory as it is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import psutil
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.utils import tqdm

from ..errors import DataError
from .encoding import Encoded, Encoder, RefusedRowError
from .masking import IGNORED
from .stored import MEMORY_BYTES, folder

Keep = Literal["keep_start", "keep_end"]

MAX_WORKERS = 8
# What a batch of the size below needs at most in a worker, encodings included.
WORKER_BYTES = 256 * 1024**2
# The encodings of so many rows are soon freed and stay near the processor.
BATCH_ROWS = 100
# For fewer rows a thread more gains nothing.
_WORKER_ROWS = 500
BATCH_BYTES = 1024**2
# Below it, making the rows again takes as long as finding them.
CACHED_BYTES = MEMORY_BYTES
_STREAM_ROWS = 100
# Goes up when the same settings give other token ids or labels.
_FORMAT = 2
_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "trained": pa.bool_()})


@dataclass(frozen=True)
class Cut:
    """How rows are cut, and whether those without a trained token go.

    Attributes:
        length: Longest row in tokens; None leaves all.
        keep: Which end of a longer row is kept.
        drop: Whether rows without a trained token are dropped.
    """

    length: int | None = None
    keep: Keep = "keep_start"
    drop: bool = True


@dataclass
class Counts:
    """What was seen while rows were prepared.

    Attributes:
        rows: How many.
        dropped: Those without a trained token.
        cut: Those longer than the longest row.
        typed: Those that spell control tokens, which stay text.
        first: The number of the first of these, from 1, and ``token``, what it spells.
        token: See ``first``.
    """

    rows: int = 0
    dropped: int = 0
    cut: int = 0
    typed: int = 0
    first: int | None = None
    token: str | None = None


def workers_for(rows: int) -> int:
    """How many threads encode this many rows: one a core, 500 rows, and 256 MiB of half the free memory, at most 8."""
    affordable = psutil.virtual_memory().available // 2 // WORKER_BYTES
    return int(max(1, min(MAX_WORKERS, _cores(), affordable, -(-rows // _WORKER_ROWS))))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _one_thread_a_batch(workers: int) -> Iterator[None]:
    """Where our threads take all cores, those of ``tokenizers`` would only take turns with them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if workers < _cores():
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def prepare(
    dataset: Dataset, encoder: Encoder, cut: Cut, *, workers: int | None = None, description: str = "Tokenizing"
) -> tuple[Dataset, Counts]:
    """Add the columns ``input_ids`` and ``labels``.

    Args:
        dataset: Rows that ``encoder`` can read.
        encoder: Encodes them.
        cut: How rows are cut and dropped.
        workers: Threads. Default None: see ``workers_for``.
        description: What the progress bar says.

    Returns:
        The data set with the two columns, each a list of 32-bit integers, and the counts. Labels are -100 where a
        token is not trained.

    Raises:
        DataError: the chat template refuses a row.
    """
    make = functools.partial(
        _made, dataset, encoder, cut, workers=workers or workers_for(len(dataset)), description=description
    )
    if dataset.data.nbytes < CACHED_BYTES:
        sink = pa.BufferOutputStream()
        counts = make(sink)
        table = pa.ipc.open_stream(sink.getvalue()).read_all()
        made = Dataset(table)
    else:
        key = _key(dataset, encoder, cut) if datasets.is_caching_enabled() else uuid.uuid4().hex
        made, counts = _cached(_folder(dataset), key, make)
    trained = made.data.column("trained").to_numpy()
    added = cast("Dataset", made.remove_columns("trained"))
    whole = concatenate_datasets([dataset, added], axis=1)
    if counts.dropped:
        whole = cast("Dataset", whole.select(np.flatnonzero(trained)))
    return whole, counts


def prepare_stream(dataset: IterableDataset, encoder: Encoder, cut: Cut) -> IterableDataset:
    """Add the columns ``input_ids`` and ``labels`` to a stream; see ``prepare``. Rows are dropped as they come."""
    first: Any = next(iter(dataset), {})
    encoder.begin([row["prompt"] for row in dataset.take(BATCH_ROWS)] if isinstance(first.get("prompt"), str) else ())

    def columns(rows: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        made = _columns(_encoded(encoder, rows, 0), cut)
        return {"input_ids": [list(ids) for ids, _ in made], "labels": [list(labels) for _, labels in made]}

    labelled = dataset.map(columns, batched=True, batch_size=_STREAM_ROWS)
    return labelled.filter(_is_trained) if cut.drop else labelled


def _is_trained(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _made(dataset: Dataset, encoder: Encoder, cut: Cut, sink: Any, *, workers: int, description: str) -> Counts:
    """Write the columns of all rows to ``sink`` in the Arrow stream format."""
    rows = cast("Dataset", dataset.select_columns(encoder.reads(dataset.column_names)))
    encoder.begin(rows[:BATCH_ROWS].get("prompt", ()))
    counts = Counts()
    with (
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        tqdm(total=len(dataset), desc=description, unit=" rows") as bar,
        _one_thread_a_batch(workers),
    ):
        for encoded in _in_order(_tables(rows), encoder, workers):
            writer.write_batch(_batch(encoded, cut, counts))
            bar.update(len(encoded.ids))
    return counts


def _in_order(tables: Iterator[tuple[int, pa.Table]], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """Encode tables in threads, with few of them in flight."""

    def encode(offset: int, table: pa.Table) -> Encoded:
        return _encoded(encoder, table.to_pydict(), offset)

    if workers == 1:
        yield from itertools.starmap(encode, tables)
        return
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers, "tokenize") as pool:
        try:
            for offset, table in tables:
                waiting.append(pool.submit(encode, offset, table))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _tables(dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
    """The rows in tables of bounded size, each with the number of its first row."""
    offset = 0
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for part in _halved(table):
            yield offset, part
            offset += part.num_rows


def _halved(table: pa.Table) -> Iterator[pa.Table]:
    if table.num_rows <= 1 or table.nbytes <= BATCH_BYTES:
        yield table
        return
    middle = table.num_rows // 2
    yield from _halved(table.slice(0, middle))
    yield from _halved(table.slice(middle))


def _encoded(encoder: Encoder, columns: Mapping[str, list[Any]], offset: int) -> Encoded:
    try:
        return encoder(columns)
    except RefusedRowError as error:
        raise DataError(
            "the chat template refuses a conversation",
            where=f"row {offset + error.index + 1}",
            why=str(error),
            hint="mend or drop the row",
        ) from error


def _columns(encoded: Encoded, cut: Cut) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, cut."""
    rows = []
    for ids, start in zip(encoded.ids, encoded.starts):
        kept = cut_range(len(ids), cut)
        rows.append((ids[kept], ([IGNORED] * start + ids[start:])[kept]))
    return rows


def cut_range(length: int, cut: Cut) -> slice:
    """What is left of a row of ``length`` tokens."""
    if cut.length is None or length <= cut.length:
        return slice(0, length)
    return slice(0, cut.length) if cut.keep == "keep_start" else slice(length - cut.length, length)


def _batch(encoded: Encoded, cut: Cut, counts: Counts) -> pa.RecordBatch:
    """The columns of a batch, and what they add to the counts."""
    kept = [cut_range(len(ids), cut) for ids in encoded.ids]
    ids = [row if part.stop - part.start == len(row) else row[part] for row, part in zip(encoded.ids, kept)]
    sizes = np.fromiter(map(len, ids), np.int32, len(ids))
    offsets = np.concatenate(([0], np.cumsum(sizes, dtype=np.int32)), dtype=np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(offsets[-1]))
    masked = np.array([max(0, start - part.start) for start, part in zip(encoded.starts, kept)], np.int32)
    masked = np.minimum(masked, sizes)
    labels = flat
    if masked.any():
        position = np.arange(len(flat), dtype=np.int32) - np.repeat(offsets[:-1], sizes)
        labels = np.where(position < np.repeat(masked, sizes), np.int32(IGNORED), flat)
    trained = masked < sizes if cut.drop else np.ones(len(ids), bool)
    for index, token in enumerate(encoded.typed):
        if token is not None:
            counts.typed += 1
            if counts.first is None:
                counts.first, counts.token = counts.rows + index + 1, token
    counts.rows += len(ids)
    counts.cut += sum(part.stop - part.start < len(row) for row, part in zip(encoded.ids, kept))
    counts.dropped += int(len(ids) - trained.sum())
    columns = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for values in (flat, labels)]
    return pa.RecordBatch.from_arrays([*columns, pa.array(trained)], schema=_SCHEMA)


# ---- the cache


def _key(dataset: Dataset, encoder: Encoder, cut: Cut) -> str:
    """A name for what comes of these rows, this tokenizer and template, and these settings."""
    settings = {"rows": dataset._fingerprint, "format": _FORMAT, "cut": asdict(cut), **encoder.settings()}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _folder(dataset: Dataset) -> Path:
    """Where files of this data set go: beside its own, or to the folder of files of rows."""
    files = dataset.cache_files
    own = Path(files[0]["filename"]).parent if files and datasets.is_caching_enabled() else None
    return own if own is not None and os.access(own, os.W_OK) else folder()


def _cached(folder: Path, key: str, make: Callable[[Any], Counts]) -> tuple[Dataset, Counts]:
    """The rows in the file of this key, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, counts = folder / f"cache-pantheraml-{key}.arrow", folder / f"cache-pantheraml-{key}.json"
    # The counts are written last, so that they are there only with all rows.
    if not counts.is_file():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
            part = Path(made) / rows.name
            with pa.OSFile(str(part), "wb") as sink:
                found = make(sink)
            told = Path(made) / counts.name
            told.write_text(json.dumps(asdict(found)), encoding="utf-8")
            part.replace(rows)
            told.replace(counts)
    return Dataset.from_file(str(rows)), Counts(**json.loads(counts.read_text(encoding="utf-8")))

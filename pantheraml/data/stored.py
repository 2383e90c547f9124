"""Tables become a data set whose size does not show in memory: many rows lie in a file that is mapped as it is read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable
from datasets.utils import tqdm

# Fewer bytes stay in memory.
MEMORY_BYTES = 16 * 1024**2


def folder() -> Path:
    """Where files of rows lie: in the cache of ``datasets``; for this run only where that is off or not writable."""
    if datasets.is_caching_enabled():
        kept = Path(datasets.config.HF_DATASETS_CACHE) / "pantheraml"
        with contextlib.suppress(OSError):
            kept.mkdir(parents=True, exist_ok=True)
            if os.access(kept, os.W_OK):
                return kept
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pantheraml-")


def stored(tables: Iterable[pa.Table], description: str | None = None) -> Dataset:
    """Join tables in order.

    Columns and fields that some tables lack are null there. Types are brought together as
    ``pyarrow.concat_tables(promote_options="permissive")`` does.

    Args:
        tables: Tables, of which one at a time is held once they are many.
        description: What the progress bar says once they are; None for no bar.

    Returns:
        The rows: in memory below 16 MiB, otherwise in a file of the cache of ``datasets``. It is named after its
        content, so that the same rows are stored once.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: the types of a column cannot be brought together.
    """
    waiting: list[pa.Table] = []
    size = 0
    remaining = (table for table in tables if table.num_rows)
    for table in remaining:
        waiting.append(table)
        size += table.nbytes
        if size >= MEMORY_BYTES:
            break
    else:
        return Dataset(pa.concat_tables(waiting, promote_options="permissive")) if waiting else Dataset.from_dict({})
    place = folder()
    with tempfile.TemporaryDirectory(dir=place, prefix=".making-") as made:
        # The list is emptied as it is written.
        held = (waiting.pop(0) for _ in range(len(waiting)))
        bar = tqdm(desc=description, unit=" rows", disable=description is None)

        def counted() -> Iterator[pa.Table]:
            for table in itertools.chain(held, remaining):
                yield table
                bar.update(table.num_rows)

        with bar:
            path = _written(counted(), Path(made))
        digest = _digest(path)
        file = place / f"rows-{digest}.arrow"
        path.replace(file)
    return Dataset(MemoryMappedTable.from_file(str(file)), fingerprint=digest)


def _written(tables: Iterator[pa.Table], directory: Path) -> Path:
    """Write tables to one file of one schema."""
    parts: list[Path] = []
    schema: pa.Schema | None = None
    sink = writer = None
    try:
        for table in tables:
            known = [table.schema] if schema is None else [schema, table.schema]
            united = pa.unify_schemas(known, promote_options="permissive")
            if writer is None or united != schema:
                _close(writer, sink)
                parts.append(directory / f"part-{len(parts)}.arrow")
                sink = pa.OSFile(str(parts[-1]), "wb")
                writer = pa.ipc.new_stream(sink, united)
                schema = united
            writer.write_table(_promoted(table, united))
    finally:
        _close(writer, sink)
    if len(parts) == 1:
        return parts[0]
    assert schema is not None
    whole = directory / "whole.arrow"
    with pa.OSFile(str(whole), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for part in parts:
            with pa.OSFile(str(part), "rb") as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    writer.write_table(_promoted(pa.Table.from_batches([batch]), schema))
            part.unlink()
    return whole


def _close(*files: pa.ipc.RecordBatchStreamWriter | pa.NativeFile | None) -> None:
    for file in files:
        if file is not None:
            file.close()


def _promoted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if table.schema.equals(schema):
        return table
    return pa.concat_tables([schema.empty_table(), table], promote_options="permissive").cast(schema)


def _digest(path: Path) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1024**2):
            hashed.update(block)
    return hashed.hexdigest()

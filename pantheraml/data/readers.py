"""Strict readers of data files: every row comes with its line, every bad row with its reason."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

from ..errors import DataError
from .json_rows import UnusableRowError, decode_whole, read_json, read_jsonl, refuse_utf16
from .rows import NumberedRows, Rejections, Row


def _csv_delimiter(path: Path, header: str) -> str:
    if path.suffix == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def read_csv(path: Path, rejections: Rejections) -> NumberedRows:
    """Read comma (or semicolon) separated rows under a header, tab separated ones in ``.tsv`` files."""
    with path.open("rb") as file:
        start = file.readline()
    refuse_utf16(path, start)
    delimiter = _csv_delimiter(path, start.decode("utf-8", "replace"))
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # surrogateescape keeps a byte that is not UTF-8 visible in its own row instead of ending the file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if not header:
                return
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise DataError(f"the column {twice[0]!r} stands twice", where=f"{path}:1", hint="rename one of them")
            while True:
                line = reader.line_num + 1
                fields: list[str] = []
                try:
                    fields = next(reader)
                    if fields:
                        rejections.total += 1
                        yield line, _csv_row(header, fields)
                except StopIteration:
                    return
                except csv.Error as error:
                    rejections.total += 1
                    rejections.add(f"{path}:{line}", f"broken csv: {error}", "")
                except UnusableRowError as error:
                    shown = delimiter.join(fields).encode("utf-8", "backslashreplace").decode("utf-8")
                    rejections.add(f"{path}:{line}", str(error), shown)
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise UnusableRowError(f"wrong number of fields: {len(fields)} where the header names {len(header)}")
    for field in fields:
        if "\x00" in field:
            raise UnusableRowError("NUL character in the text")
        if not field.isascii():
            try:
                field.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UnusableRowError(f"not UTF-8: byte 0x{ord(field[error.start]) & 0xFF:02x}") from error
    return dict(zip(header, fields))


def read_text(path: Path, rejections: Rejections) -> NumberedRows:
    """Read a whole text file as one row with the column ``text``."""
    text = decode_whole(path)
    if not text.strip():
        return
    rejections.total += 1
    if "\x00" in text:
        before = text[: text.index("\x00")]
        line = before.count("\n") + 1
        rejections.add(f"{path}:{line}", "NUL character in the text", before)
        return
    yield 1, {"text": text.replace("\r\n", "\n")}


READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
}

"""Strict readers of data files: every row comes with its line, every bad row with its reason."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError

Row = dict[str, Any]
NumberedRows = Iterator[tuple[int, Row]]

_SHOWN = 10
_KEPT_CHARACTERS = 2000
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


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
        self.items: list[Rejected] = []
        self.total = 0

    def __len__(self) -> int:
        return len(self.items)

    def add(self, where: str, reason: str, row: object) -> None:
        """Count one bad row."""
        text = row if isinstance(row, str) else repr(row)
        self.items.append(Rejected(where, reason, text[:_KEPT_CHARACTERS]))

    def check(self, source: str) -> None:
        """Raise when more rows of ``source`` are bad than tolerated.

        Raises:
            DataError: lists the first ten bad rows, and the totals by reason.
        """
        if len(self.items) <= self.max_bad_fraction * self.total:
            return
        shown = [f"    {item.where}: {item.reason}" for item in self.items[:_SHOWN]]
        if len(self.items) > _SHOWN:
            shown.append(f"    ... and {len(self.items) - _SHOWN} more")
        reasons = Counter(item.reason.partition(":")[0] for item in self.items)
        totals = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_SHOWN))
        raise DataError(
            f"{len(self.items)} of {self.total} rows cannot be used:\n" + "\n".join(shown),
            where=source,
            why=totals,
            hint="repair these rows, or drop them with max_bad_fraction (--max_bad_fraction 0.01 tolerates 1 %)",
        )

    def write(self, path: Path) -> None:
        """Write the bad rows as json lines with the keys ``where``, ``reason`` and ``row``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for item in self.items:
                record = {"where": item.where, "reason": item.reason, "row": item.row}
                file.write(json.dumps(record, ensure_ascii=True) + "\n")


class _BadRowError(ValueError):
    """A row that parses but may not be used."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _BadRowError(f"duplicate key: {twice!r}")
    return row


def _no_constant(name: str) -> Any:
    raise _BadRowError(f"not json: the number {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if "\x00" in value:
            raise _BadRowError("NUL character in the text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadRowError(f"lone surrogate: \\u{ord(value[error.start]):04x} is half a character") from error
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)


def _check_row(value: Any) -> Row:
    if value is None:
        raise _BadRowError("null where an object is expected")
    if not isinstance(value, dict):
        raise _BadRowError(f"not an object: {type_name(value)}")
    if not value:
        raise _BadRowError("empty object")
    return value


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


def _parse(text: str) -> Row:
    try:
        row = _check_row(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        raise _BadRowError(f"broken json: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _BadRowError("broken json: nested too deeply") from error
    # Only an escape can smuggle these characters past the UTF-8 decoder, so most rows need no walk.
    if "\\u" in text:
        _check_strings(row)
    return row


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start.startswith(_UTF16_BOMS):
        raise DataError("the file is UTF-16", where=str(path), hint="save it as UTF-8")


def read_jsonl(path: Path, rejections: Rejections) -> NumberedRows:
    """Read one json object a line; empty lines are skipped, a BOM and CRLF line ends are accepted."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(path, raw)
                raw = raw.removeprefix(_BOM)
            raw = raw.rstrip(b"\r\n")
            if not raw.strip():
                continue
            rejections.total += 1
            try:
                if b"\x00" in raw:
                    raise _BadRowError("NUL character in the line")
                yield number, _parse(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                rejections.add(f"{path}:{number}", reason, raw.decode("utf-8", "backslashreplace"))
            except ValueError as error:
                rejections.add(f"{path}:{number}", str(error), raw.decode("utf-8", "backslashreplace"))


def _decode_whole(path: Path) -> str:
    raw = path.read_bytes()
    _refuse_utf16(path, raw)
    try:
        return raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"the file is not UTF-8: byte 0x{raw[error.start]:02x}", where=f"{path}:{line}", hint="save it as UTF-8"
        ) from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_array(path: Path, text: str, position: int, rejections: Rejections) -> NumberedRows:
    """Walk the elements of a json array, so that each has a line; a broken element ends the file."""

    def broken(at: int, why: str) -> DataError:
        line = text.count("\n", 0, at) + 1
        column = at - (text.rfind("\n", 0, at) + 1) + 1
        return DataError(
            "broken json",
            where=f"{path}:{line}",
            why=f"{why} at column {column}",
            hint="repair the array there; a json lines file (one object a line) lets bad rows be skipped",
        )

    line, counted = 1, 0
    position = _skip_space(text, position + 1)
    if position < len(text) and text[position] == "]":
        return
    while True:
        position = _skip_space(text, position)
        line, counted, start = line + text.count("\n", counted, position), position, position
        row, reason = {}, None
        try:
            try:
                value, position = _DECODER.raw_decode(text, start)
                row = _check_row(value)
                if text.find("\\u", start, position) >= 0:
                    _check_strings(row)
            except _BadRowError as error:
                reason = str(error)
                _, position = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except RecursionError as error:
            raise broken(start, "nested too deeply") from error
        rejections.total += 1
        if reason is None:
            yield line, row
        else:
            rejections.add(f"{path}:{line}", reason, text[start:position])
        position = _skip_space(text, position)
        if position < len(text) and text[position] == ",":
            position += 1
        elif position < len(text) and text[position] == "]":
            if _skip_space(text, position + 1) < len(text):
                raise broken(position + 1, "text after the end of the array")
            return
        else:
            raise broken(min(position, len(text) - 1), "expected ',' or ']'")


def _wrapped_rows(whole: Row) -> list[Any] | None:
    """The only list of objects inside an object such as ``{"data": [...]}``, unless that list is one chat."""
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1 or {"role", "from"} & set(lists[0][0]):
        return None
    return lists[0]


def read_json(path: Path, rejections: Rejections) -> NumberedRows:
    """Read an array of objects, an object that wraps one such array, or json lines under the name ``.json``."""
    text = _decode_whole(path)
    start = _skip_space(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _read_array(path, text, start, rejections)
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        yield from read_jsonl(path, rejections)
        return
    rows = _wrapped_rows(whole) if isinstance(whole, dict) else None
    for index, value in enumerate([whole] if rows is None else rows, start=1):
        rejections.total += 1
        try:
            row = _check_row(value)
            _check_strings(row)
            yield index, row
        except _BadRowError as error:
            rejections.add(f"{path}: row {index}", str(error), value)


def _csv_delimiter(path: Path, header: str) -> str:
    if path.suffix == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def read_csv(path: Path, rejections: Rejections) -> NumberedRows:
    """Read comma (or semicolon) separated rows under a header, tab separated ones in ``.tsv`` files."""
    with path.open("rb") as file:
        start = file.readline()
    _refuse_utf16(path, start)
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
                except _BadRowError as error:
                    shown = delimiter.join(fields).encode("utf-8", "backslashreplace").decode("utf-8")
                    rejections.add(f"{path}:{line}", str(error), shown)
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise _BadRowError(f"wrong number of fields: {len(fields)} where the header names {len(header)}")
    for field in fields:
        if "\x00" in field:
            raise _BadRowError("NUL character in the text")
        if not field.isascii():
            try:
                field.encode("utf-8")
            except UnicodeEncodeError as error:
                raise _BadRowError(f"not UTF-8: byte 0x{ord(field[error.start]) & 0xFF:02x}") from error
    return dict(zip(header, fields))


def read_text(path: Path, rejections: Rejections) -> NumberedRows:
    """Read a whole text file as one row with the column ``text``."""
    text = _decode_whole(path)
    if not text.strip():
        return
    rejections.total += 1
    if "\x00" in text:
        at = text.index("\x00")
        rejections.add(f"{path}:{text.count(chr(10), 0, at) + 1}", "NUL character in the text", text[:at])
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

"""Strict readers of json: an array of objects, an object around one, or one object a line."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .rows import NumberedRows, Rejections, Row, type_name

# A file that is no list of lines is read in blocks of at least this size.
_BLOCK = 1024**2
# How far behind a value json may have to look: a pair of surrogates takes twelve letters.
_LOOKAHEAD = 16
_VISIBLE = re.compile(r"[^ \t\r\n]")
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class UnusableRowError(ValueError):
    """A row that parses but may not be used."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UnusableRowError(f"duplicate key: {twice!r}")
    return row


def _no_constant(name: str) -> Any:
    raise UnusableRowError(f"not json: the number {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if "\x00" in value:
            raise UnusableRowError("NUL character in the text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableRowError(f"lone surrogate: \\u{ord(value[error.start]):04x} is half a character") from error
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)


def _check_row(value: Any) -> Row:
    if value is None:
        raise UnusableRowError("null where an object is expected")
    if not isinstance(value, dict):
        raise UnusableRowError(f"not an object: {type_name(value)}")
    if not value:
        raise UnusableRowError("empty object")
    return value


def _parse(text: str) -> Row:
    try:
        row = _check_row(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        raise UnusableRowError(f"broken json: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UnusableRowError("broken json: nested too deeply") from error
    # Only an escape can smuggle these characters past the UTF-8 decoder, so most rows need no walk.
    if "\\u" in text:
        _check_strings(row)
    return row


def refuse_utf16(path: Path, start: bytes) -> None:
    """Raise for a file whose first bytes are ``start`` where they are those of UTF-16."""
    if start.startswith(_UTF16_BOMS):
        raise DataError("the file is UTF-16", where=str(path), hint="save it as UTF-8")


def read_jsonl(path: Path, rejections: Rejections) -> NumberedRows:
    """Read one json object a line; empty lines are skipped, a BOM and CRLF line ends are accepted."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                refuse_utf16(path, raw)
                raw = raw.removeprefix(_BOM)
            raw = raw.rstrip(b"\r\n")
            if not raw.strip():
                continue
            rejections.total += 1
            try:
                if b"\x00" in raw:
                    raise UnusableRowError("NUL character in the line")
                yield number, _parse(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                rejections.add(f"{path}:{number}", reason, raw.decode("utf-8", "backslashreplace"))
            except ValueError as error:
                rejections.add(f"{path}:{number}", str(error), raw.decode("utf-8", "backslashreplace"))


def decode_whole(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it is not UTF-8.
    """
    raw = path.read_bytes()
    refuse_utf16(path, raw)
    try:
        return raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"the file is not UTF-8: byte 0x{raw[error.start]:02x}", where=f"{path}:{line}", hint="save it as UTF-8"
        ) from error


class _Window:
    """The text of a file, of which only the part that is being read is held.

    Args:
        path: A file in UTF-8.
        file: The same file, opened for reading bytes.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.text = ""
        self.ended = False
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._line = 1
        self._column = 1

    def grow(self, start: int) -> None:
        """Drop the text before ``start``, which then stands at 0, and read more behind it.

        Raises:
            DataError: the file is not UTF-8.
        """
        self._line, self._column = self.place(start)
        self.text = self.text[start:]
        block = self._file.read(max(_BLOCK, len(self.text)))
        self.ended = not block
        try:
            self.text += self._decode.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"the file is not UTF-8: byte 0x{error.object[error.start]:02x}",
                where=f"{self.path}:{self.place(len(self.text))[0] + error.object.count(10, 0, error.start)}",
                hint="save it as UTF-8",
            ) from error

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of a position in ``text``."""
        lines = self.text.count("\n", 0, position)
        before = self.text.rfind("\n", 0, position)
        return self._line + lines, position - before if lines else self._column + position

    def skip_space(self, position: int) -> int:
        """Where the next letter stands; ``text`` may have moved. At the end of the file, the length of ``text``."""
        while True:
            found = _VISIBLE.search(self.text, position)
            if found:
                return found.start()
            if self.ended:
                return len(self.text)
            self.grow(len(self.text))
            position = 0

    def decode(self, start: int) -> tuple[Any, str | None, int, int]:
        """The json value at ``start``: itself, or why it may not be used, and where it begins and ends.

        Raises:
            json.JSONDecodeError: there is none.
            RecursionError: it is nested too deeply.
        """
        while True:
            value = reason = None
            try:
                try:
                    value, end = _DECODER.raw_decode(self.text, start)
                except UnusableRowError as error:
                    reason = str(error)
                    _, end = json.JSONDecoder().raw_decode(self.text, start)
                # What comes next may belong to it, as in 1.5 after 1.
                if self.ended or end < len(self.text) - _LOOKAHEAD:
                    return value, reason, start, end
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LOOKAHEAD
                if self.ended or not cut_off:
                    raise
            self.grow(start)
            start = 0


def _read_array(window: _Window, position: int, rejections: Rejections) -> NumberedRows:
    """Walk the elements of a json array, so that each has a line; a broken element ends the file."""

    def broken(at: int, why: str) -> DataError:
        line, column = window.place(at)
        return DataError(
            "broken json",
            where=f"{window.path}:{line}",
            why=f"{why} at column {column}",
            hint="repair the array there; a json lines file (one object a line) lets bad rows be skipped",
        )

    position = window.skip_space(position + 1)
    if window.text.startswith("]", position):
        return
    line = counted = 0
    text = ""
    while True:
        position = window.skip_space(position)
        try:
            value, reason, position, end = window.decode(position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except RecursionError as error:
            raise broken(position, "nested too deeply") from error
        if text is window.text:
            line += text.count("\n", counted, position)
        else:
            text, line = window.text, window.place(position)[0]
        counted = position
        row: Row = {}
        if reason is None:
            try:
                row = _check_row(value)
                if text.find("\\u", position, end) >= 0:
                    _check_strings(row)
            except UnusableRowError as error:
                reason = str(error)
        rejections.total += 1
        if reason is None:
            yield line, row
        else:
            rejections.add(f"{window.path}:{line}", reason, text[position:end])
        position = window.skip_space(end)
        if window.text.startswith(",", position):
            position += 1
        elif window.text.startswith("]", position):
            position = window.skip_space(position + 1)
            if position < len(window.text):
                raise broken(position, "text after the end of the array")
            return
        else:
            raise broken(max(0, min(position, len(window.text) - 1)), "expected ',' or ']'")


def _wrapped_rows(whole: Row) -> list[Any] | None:
    """The only list of objects inside an object such as ``{"data": [...]}``, unless that list is one chat."""
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1 or {"role", "from"} & set(lists[0][0]):
        return None
    return lists[0]


def _begins_with_lines(window: _Window, start: int) -> bool:
    """Whether a whole object stands on the first line, and something on another one."""
    end = window.text.find("\n", start)
    if end < 0 or window.text.find("{", end) < 0:
        return False
    try:
        return isinstance(json.loads(window.text[start:end]), dict)
    except (ValueError, RecursionError):
        return False


def read_json(path: Path, rejections: Rejections) -> NumberedRows:
    """Read an array of objects, an object that wraps one such array, or json lines under the name ``.json``."""
    with path.open("rb") as file:
        refuse_utf16(path, file.read(2))
        file.seek(0)
        window = _Window(path, file)
        start = window.skip_space(0)
        if start == len(window.text):
            return
        if window.text[start] == "[":
            yield from _read_array(window, start, rejections)
            return
        if _begins_with_lines(window, start):
            yield from read_jsonl(path, rejections)
            return
    try:
        whole = json.loads(decode_whole(path))
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
        except UnusableRowError as error:
            rejections.add(f"{path}: row {index}", str(error), value)

"""What commands print: plain lines, safe for a terminal whatever a model or a data set holds."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import env

_KEPT = {0x09, 0x0A}
# Control characters move the cursor or recolour the screen; the bidirectional ones reorder what a reader sees.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROL if code not in _KEPT}


def printable(text: str) -> str:
    """Return ``text`` with every control character but newline and tab written out as its hexadecimal code."""
    return text.translate(_VISIBLE)


def program() -> str:
    """Return what the reader types to run this program again: its name where that is found, else its path."""
    name = "pantheraml"
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("cli", "__main__.py"):
        return name if shutil.which(name) else "python -m pantheraml.cli"
    if started.suffix == ".py":
        return f"python {shlex.quote(str(started))}"
    return name if shutil.which(name) or started.stem != name else shlex.quote(str(started))


class Output:
    """Lines for the reader on standard output; with ``json`` they go to standard error and the record to output.

    Args:
        json: Print one json record at the end instead of text.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self.record: dict[str, Any] = {}

    def say(self, text: str = "") -> None:
        """Print one line or several, on the main process of a launch."""
        if env.rank():
            return
        stream = sys.stderr if self.json else sys.stdout
        stream.write(printable(text) + "\n")
        stream.flush()

    def table(self, rows: Iterable[Sequence[str]], *, indent: str = "  ") -> None:
        """Print rows in aligned columns."""
        rows = [[printable(cell) for cell in row] for row in rows]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)] if rows else []
        for row in rows:
            self.say(indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

    def note(self, **values: Any) -> None:
        """Add values to the json record."""
        self.record |= values

    def finish(self) -> None:
        """Print the json record, if that was asked for."""
        if self.json and not env.rank():
            sys.stdout.write(json.dumps(self.record, indent=2, ensure_ascii=True, default=str) + "\n")
            sys.stdout.flush()

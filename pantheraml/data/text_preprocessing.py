"""Raw text made ready for training: cleaned, taken apart, marked, and looked over."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, ConfigError, DataError

# Characters that end a line besides \n: CR LF and CR, vertical tab, form feed, NEL, line and paragraph separator.
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters, zero-width space, byte-order mark, soft hyphen, halves of surrogate pairs. Zero-width joiners
# stay: they are part of words in several scripts, and of emoji.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff]")
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_RUN_OF_SPACES = re.compile(r"(?<=\S)[ \t]+")
_BLANK_LINES = re.compile(r"\n{3,}")

_HEADINGS = {"#": "chapter", "##": "section", "###": "subsection"}
_HEADING = re.compile(r"^(#{1,3})[ \t]+(.+?)[ \t]*#*$")
_FENCE = re.compile(r"^(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*$")

# What add_structure_tokens writes besides the text; a code block's language follows <|code|> on its line.
STRUCTURE_TOKENS = (
    *(token for name in _HEADINGS.values() for token in (f"<|{name}|>", f"<|/{name}|>")),
    "<|code|>",
    "<|/code|>",
)
_SHORT = 10


class TextPreprocessor:
    """Steps between raw text and ``RawTextDataLoader``; each may be used alone."""

    def clean_text(self, text: str) -> str:
        """Return ``text`` with one kind of line end and space, and without invisible characters.

        Line ends become line feeds, special spaces a space, runs of spaces inside a line one space; spaces at the end
        of lines, and blank lines beyond one, are removed; indentation stays. The text is in Unicode's NFC form, and
        cleaning it again changes nothing.

        Args:
            text: Any text.

        Returns:
            The cleaned text, without blank lines at its ends.

        Raises:
            ArgumentError: ``text`` is no text.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"the text is {type(text).__name__}, not str", where="clean_text")
        text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
        text = unicodedata.normalize("NFC", _SPACES.sub(" ", text))
        lines = [_RUN_OF_SPACES.sub(" ", line.rstrip()) for line in text.split("\n")]
        return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")

    def extract_sections(self, text: str, patterns: Sequence[str]) -> list[str]:
        """Return the stretches of ``text`` that match any of ``patterns``, in the order of the text.

        Args:
            text: The text.
            patterns: Regular expressions; ``^`` and ``$`` match at lines, ``.`` matches line ends too. Where a pattern
                has groups, its first group is the section.

        Returns:
            The sections, stripped; empty ones are left out.

        Raises:
            ConfigError: a pattern is no regular expression.
            ArgumentError: one pattern instead of a list.
        """
        if isinstance(patterns, str):
            raise ArgumentError("extract_sections takes a list of patterns", where="argument patterns")
        found: list[tuple[int, int, str]] = []
        for order, pattern in enumerate(patterns):
            try:
                compiled = re.compile(pattern, re.MULTILINE | re.DOTALL)
            except re.error as error:
                raise ConfigError(
                    f"the pattern {pattern!r} is no regular expression", where="argument patterns", why=str(error)
                ) from error
            for match in compiled.finditer(text):
                section = match[1 if compiled.groups else 0]
                found.append((match.start(), order, (section or "").strip()))
        return [section for *_, section in sorted(found) if section]

    def add_structure_tokens(self, text: str) -> str:
        """Put tokens around Markdown headings of levels 1 to 3 and around fenced code.

        ``# Title`` becomes ``<|chapter|>Title<|/chapter|>``, ``##`` a section, ``###`` a subsection; a code block
        begins with ``<|code|>`` and its language and ends with ``<|/code|>``. Headings inside code are code.
        ``STRUCTURE_TOKENS`` lists the tokens, for ``add_new_tokens``.

        Args:
            text: Markdown text.

        Returns:
            The text with tokens.

        Raises:
            DataError: a code block does not end.
        """
        lines: list[str] = []
        fence, begun = "", 0
        for number, line in enumerate(text.split("\n"), start=1):
            mark = _FENCE.match(line)
            if fence:
                closes = mark is not None and mark[1].startswith(fence) and not mark[2]
                lines.append("<|/code|>" if closes else line)
                fence = "" if closes else fence
            elif mark is not None:
                fence, begun = mark[1], number
                lines.append(f"<|code|>{mark[2]}")
            else:
                lines.append(_HEADING.sub(_heading, line))
        if fence:
            raise DataError("a code block does not end", where=f"line {begun}", hint=f"close it with {fence}")
        return "\n".join(lines)

    def validate_dataset(self, dataset: Any) -> dict[str, Any]:
        """Look over the texts of a data set; nothing is changed and nothing raises for bad text.

        Args:
            dataset: A data set, or any iterable of rows, with the column ``text``, or with ``input_ids``.

        Returns:
            ``total_samples``, ``empty_samples``, ``min_length``, ``max_length`` and ``avg_length`` (in characters, or
            in tokens for ``input_ids``), ``repeated_content`` (rows that occurred before), ``encoding_issues`` (texts
            with replacement or control characters) and ``warnings``, a list of sentences.

        Raises:
            DataError: there is no row, or no such column.
        """
        lengths: list[int] = []
        seen: set[int] = set()
        counts = {"empty_samples": 0, "repeated_content": 0, "encoding_issues": 0}
        for row in dataset:
            value = _value(row)
            is_text = isinstance(value, str)
            lengths.append(len(value))
            counts["empty_samples"] += not (value.strip() if is_text else value)
            # Hashes, so that a large data set is not held twice.
            mark = hash(value if is_text else tuple(value))
            counts["repeated_content"] += mark in seen
            seen.add(mark)
            counts["encoding_issues"] += is_text and bool(_INVISIBLE.search(value) or "\ufffd" in value)
        if not lengths:
            raise DataError("the data set has no rows", where="validate_dataset")
        short = sum(length < _SHORT for length in lengths)
        problems = {
            "empty": counts["empty_samples"],
            "repeated": counts["repeated_content"],
            "damaged by a wrong encoding or control characters": counts["encoding_issues"],
            f"shorter than {_SHORT}": short,
        }
        return {
            "total_samples": len(lengths),
            "min_length": min(lengths),
            "max_length": max(lengths),
            "avg_length": statistics.fmean(lengths),
            **counts,
            "warnings": [f"{count} of {len(lengths)} rows are {what}" for what, count in problems.items() if count],
        }


def _heading(match: re.Match[str]) -> str:
    name = _HEADINGS[match[1]]
    return f"<|{name}|>{match[2]}<|/{name}|>"


def _value(row: Any) -> Any:
    value = row.get("text", row.get("input_ids")) if isinstance(row, Mapping) else None
    if value is None and isinstance(row, Mapping) and ("text" in row or "input_ids" in row):
        return ""
    if not isinstance(value, str | list):
        raise DataError(
            "the rows have neither 'text' nor 'input_ids'",
            where="validate_dataset",
            why=f"found: {', '.join(row) if isinstance(row, Mapping) else type(row).__name__}",
        )
    return value

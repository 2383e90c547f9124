"""The bytes that each token of a vocabulary stands for, so that text is found in token ids wherever tokens merge.

A row of token ids becomes one string of bytes with known token boundaries. Special and added tokens stand in it between
two bytes that no UTF-8 text holds: text that merely looks like a special token is never mistaken for one.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

OPEN, CLOSE = b"\xff", b"\xfe"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes a space


def text_part(tokenizer: Any) -> Any:
    """Return the text tokenizer of a processor, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def marked(token: str) -> bytes:
    """The bytes of a special or added token: its text between two bytes that are in no text."""
    return OPEN + token.encode("utf-8", "replace") + CLOSE


def unmarked(data: bytes) -> bytes:
    """``data`` with special tokens as their plain text."""
    return data.replace(OPEN, b"").replace(CLOSE, b"")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Printable Latin-1 letters stand for themselves, the others for 256 and up in order. Source: the byte-level encoding
    of GPT-2 (https://github.com/openai/gpt-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _of_byte_level(token: str) -> bytes:
    letters = _byte_of_letter()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode("utf-8", "replace")


def _of_sentencepiece(token: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(token)
    return bytes([int(byte.group(1), 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "replace")


@dataclass(frozen=True)
class Pieces:
    """What the tokens of one tokenizer stand for.

    Attributes:
        table: Bytes of each token id.
        leading_space: Whether the tokenizer puts a space before a text.
        added: The special and added tokens, longest first.
    """

    table: tuple[bytes, ...]
    leading_space: bool = False
    added: tuple[str, ...] = ()

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each of ``ids``."""
        table = self.table
        try:
            return [table[token] for token in ids]
        except IndexError:
            raise DataError(
                f"token id {max(ids)} is not in the vocabulary",
                why=f"the tokenizer has {len(table)} tokens",
                hint="pass the tokenizer that made the token ids",
            ) from None

    def encode(self, text: str, tokenizer: Any) -> bytes:
        """The bytes that ``text`` has inside a row of token ids, with its special tokens recognised."""
        data = b"".join(self.of(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return data[1:] if self.leading_space and data[:1] == b" " else data


@dataclass(frozen=True)
class Row:
    """Token ids as bytes: ``data``, and where each token starts in it (with the end as one more entry)."""

    data: bytes
    starts: tuple[int, ...]

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> Row:
        """Join the bytes of tokens."""
        return cls(b"".join(pieces), tuple(itertools.accumulate(map(len, pieces), initial=0)))

    def tokens(self, start: int, end: int) -> range:
        """Positions of the tokens that have a byte in ``data[start:end]``."""
        first = bisect.bisect_right(self.starts, start) - 1
        return range(first, bisect.bisect_left(self.starts, end)) if start < end else range(0)


def pieces_of(tokenizer: Any) -> Pieces:
    """Read the vocabulary of a tokenizer.

    Args:
        tokenizer: Tokenizer or processor: byte-level, sentencepiece-like, or of any other kind whose tokens can be
            decoded one at a time.

    Returns:
        The bytes of every token.
    """
    tokenizer = text_part(tokenizer)
    size, known = _known.get(tokenizer, (-1, None))
    if known is None or size != len(tokenizer):
        known = _read(tokenizer)
        _known[tokenizer] = (len(tokenizer), known)
    return known


# Reading a large vocabulary takes a tenth of a second.
_known: weakref.WeakKeyDictionary[Any, tuple[int, Pieces]] = weakref.WeakKeyDictionary()


def _read(tokenizer: Any) -> Pieces:
    vocabulary = tokenizer.get_vocab()
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    table = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
    decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    if "ByteLevel" in decoder:
        convert = _of_byte_level
    elif "Metaspace" in decoder or _SPACE in decoder:
        convert = _of_sentencepiece
    else:
        # A token decoded behind another one keeps its leading space, or is joined to it.
        anchor = next((token for token in ("a", "e", "0") if token in vocabulary), next(iter(vocabulary), ""))
        before = tokenizer.convert_tokens_to_string([anchor])

        def convert(token: str) -> bytes:
            return tokenizer.convert_tokens_to_string([anchor, token])[len(before) :].encode("utf-8", "replace")

    for token, index in vocabulary.items():
        table[index] = convert(token)
    for index, token in added.items():
        table[index] = marked(token)
    probe = tokenizer("x", add_special_tokens=False)["input_ids"]
    leading = bool(probe) and table[probe[0]][:1] == b" "
    named: list[str] = sorted({token for token in added.values() if token.strip()}, key=lambda text: (-len(text), text))
    return Pieces(tuple(table), leading, tuple(named))

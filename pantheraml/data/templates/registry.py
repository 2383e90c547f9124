"""The chat templates by name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError, nearest

_GROUPS = ("plain", "chatml", "llama", "mistral", "gemma", "phi", "harmony")


@dataclass(frozen=True)
class ChatTemplate:
    """One chat format.

    Args:
        name: Its first name.
        text: The Jinja template, or a function that chooses it by the tokenizer.
        aliases: Its other names.
        turn_end: Token that ends an assistant's turn; None when that is the tokenizer's own EOS.
        becomes_eos: Whether the tokenizer's EOS is set to ``turn_end``.
        stops: Other tokens at which generation stops.
        system_message: Default system message; None when the format has none.
        tokens: Other control tokens that the text holds.
        renames: Tokens of the tokenizer that take the names of this format's.
        source: Where the format is published.
    """

    name: str
    text: str | Callable[[Any], str]
    aliases: tuple[str, ...] = ()
    turn_end: str | None = None
    becomes_eos: bool = False
    stops: tuple[str, ...] = ()
    system_message: str | None = None
    tokens: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def jinja(self, tokenizer: Any) -> str:
        """The template's text for ``tokenizer``."""
        return (self.text if isinstance(self.text, str) else self.text(tokenizer)).strip()


@functools.cache
def templates() -> dict[str, ChatTemplate]:
    """Every template by each of its names."""
    table: dict[str, ChatTemplate] = {}
    for group in _GROUPS:
        for template in importlib.import_module(f".{group}", __package__).TEMPLATES:
            table |= dict.fromkeys((template.name, *template.aliases), template)
    return table


def find_template(name: str) -> ChatTemplate:
    """Return the template called ``name``, in any case.

    Raises:
        ConfigError: there is none; the text names the nearest one and all others.
    """
    known = templates()
    found = known.get(name) or known.get(name.strip().lower())
    if found is not None:
        return found
    close = nearest(name.strip().lower(), known)
    raise ConfigError(
        f"there is no chat template {name!r}" + (f" (did you mean {close!r}?)" if close else ""),
        where="argument chat_template",
        hint=f"use one of {', '.join(known)}; 'auto' for the tokenizer's own; or a tuple (Jinja text, end token)",
    )

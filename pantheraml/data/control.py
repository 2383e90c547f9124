"""Control tokens that people type stay text: the tokenizer reads only those that a template writes.

A message with ``<|im_end|>`` in it would otherwise end its turn in the token ids, whatever the chat template means by
it. In a conversation that spells a control token, what was typed is hidden behind a letter of a private-use area while
the template is rendered. Then the control tokens of the rendering, all written by the template now, get letters of
their own, what was typed comes back, and the text is encoded by a copy of the tokenizer that knows the control tokens
by those letters only. Every other conversation is encoded as it is.
"""

from __future__ import annotations

import functools
import itertools
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .markers import detect_markers, render
from .pieces import text_part
from .templates.vocabulary import can_rename, renamed

Span = tuple[int, int]

# The last letters of the last private-use plane: http://www.unicode.org/faq/private_use.html
_END = 0x10FFFE
_REPLACEMENT = "\ufffd"


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that the tokenizer reads out of plain text, longest first."""
    inner = text_part(tokenizer)
    if getattr(inner, "split_special_tokens", False):
        return ()
    special = {token.content for token in inner.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(str.strip, special), key=lambda token: (-len(token), token)))


class TypedControl:
    """Finds control tokens in messages, and encodes conversations that have some.

    In what the assistant writes, only the tokens that delimit turns are taken for typed; others, such as those around
    a tool call, are the model's to write. So is an end token at the very end of a reply.

    Args:
        tokenizer: Tokenizer or processor with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._inner = text_part(tokenizer)
        tokens = control_tokens(tokenizer) if can_rename(self._inner) else ()
        first = _END - 2 * len(tokens)
        self._hidden = {token: chr(first + index) for index, token in enumerate(tokens)}
        self._alias = {token: chr(first + len(tokens) + index) for index, token in enumerate(tokens)}
        self._typed_by = {letter: token for token, letter in self._hidden.items()}
        # Typed letters must not pass for tokens.
        self._reserved = re.compile(f"[{chr(first)}-{chr(_END - 1)}]" if tokens else "(?!)")
        delimiters, self._ends = _delimiters(tokenizer, tokens)
        self._anyone = _pattern(tuple(map(re.escape, tokens)))
        self._assistant = _pattern(tuple(map(re.escape, delimiters)))
        self._written = _pattern((*map(re.escape, tokens), *self._typed_by))

    def typed(self, chat: Sequence[Mapping[str, Any]], tools: Any = None) -> str | None:
        """The first control token that ``chat`` or ``tools`` spells and that stays text; None when there is none."""
        for message in chat:
            pattern = self._assistant if message.get("role") == "assistant" else self._anyone
            for key, value in message.items():
                if key == "role" or value is None:
                    continue
                # Most values are texts without any.
                if (type(value) is not str or pattern.search(value)) and (found := self._find(value, pattern)):
                    return found
        return self._find(tools, self._anyone) if tools else None

    def hide(self, chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``chat`` with a letter in place of each control token that stays text, for rendering."""
        return [
            self._hide(message, self._assistant if message.get("role") == "assistant" else self._anyone)
            for message in chat
        ]

    def hide_all(self, value: Any) -> Any:
        """``value``, the description of tools for example, with a letter in place of each control token."""
        return self._hide(value, self._anyone)

    def places(self, text: str, *, reply: bool = False, own_bos: bool = False) -> list[Span]:
        """Where ``text`` spells control tokens that stay text.

        Args:
            text: What somebody wrote, a prompt or a field of a row.
            reply: Whether it is what the model is to write; see ``TypedControl``. Default False.
            own_bos: Whether a beginning-of-sequence token at its start is meant. Default False.
        """
        pattern = self._assistant if reply else self._anyone
        bos = self._inner.bos_token
        start = len(bos) if bos and own_bos and text.startswith(bos) else 0
        return [match.span() for match in pattern.finditer(text, start, self._reach(text, pattern))]

    def hide_places(self, text: str, places: Iterable[Span]) -> str:
        """``text`` with a letter in place of the control tokens at ``places``."""
        parts, at = [], 0
        for start, end in places:
            parts += [self._reserved.sub(_REPLACEMENT, text[at:start]), self._hidden[text[start:end]]]
            at = end
        return "".join((*parts, self._reserved.sub(_REPLACEMENT, text[at:])))

    def encode(self, rendered: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of what ``hide_places`` returned, or of the rendering of what ``hide`` returned."""
        text = self._written.sub(self._settle, rendered)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_places(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """``encode``, and where in ``text(rendered)`` each token stands."""
        text = self._written.sub(self._settle, rendered)
        encoding = self._backend.encode(text, add_special_tokens=False)
        token_of = {letter: token for token, letter in self._alias.items()}
        at = list(itertools.accumulate((len(token_of.get(letter, letter)) for letter in text), initial=0))
        return encoding.ids, [(at[start], at[end]) for start, end in encoding.offsets]

    def text(self, rendered: str) -> str:
        """The rendering as people read it, with what was typed in its place."""
        return self._written.sub(lambda match: self._typed_by.get(match[0], match[0]), rendered)

    def typed_places(self, rendered: str) -> list[Span]:
        """Where in ``text(rendered)`` control tokens stand that were typed."""
        places: list[Span] = []
        longer = 0
        for match in self._written.finditer(rendered):
            if token := self._typed_by.get(match[0]):
                start = match.start() + longer
                places.append((start, start + len(token)))
                longer += len(token) - 1
        return places

    @functools.cached_property
    def _backend(self) -> Any:
        backend = renamed(self._inner._tokenizer, self._alias)
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _settle(self, match: re.Match[str]) -> str:
        return self._alias[match[0]] if match[0] in self._alias else self._typed_by[match[0]]

    def _find(self, value: Any, pattern: re.Pattern[str]) -> str | None:
        if isinstance(value, str):
            match = pattern.search(value, 0, self._reach(value, pattern))
            return match[0] if match else None
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        return next((found for key, part in parts if key != "role" and (found := self._find(part, pattern))), None)

    def _hide(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            value = self._reserved.sub(_REPLACEMENT, value)
            reach = self._reach(value, pattern)
            return pattern.sub(lambda match: self._hidden[match[0]], value[:reach]) + value[reach:]
        if isinstance(value, Mapping):
            return {key: part if key == "role" else self._hide(part, pattern) for key, part in value.items()}
        return [self._hide(part, pattern) for part in value] if isinstance(value, list) else value

    def _reach(self, value: str, pattern: re.Pattern[str]) -> int:
        """Where the typed text ends: before an end token that closes a reply."""
        if pattern is not self._assistant or not self._ends:
            return len(value)
        stripped = value.rstrip()
        return next((len(stripped) - len(end) for end in self._ends if stripped.endswith(end)), len(value))


def control_of(tokenizer: Any) -> TypedControl:
    """What finds typed control tokens for a tokenizer or processor; made once for each state of it."""
    inner = text_part(tokenizer)
    named = (inner.bos_token, inner.eos_token, inner.pad_token, inner.split_special_tokens)
    state = (repr(tokenizer.chat_template), len(inner), named)
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, TypedControl(tokenizer))
    return known[1]


_known: weakref.WeakKeyDictionary[Any, tuple[Any, TypedControl]] = weakref.WeakKeyDictionary()


def prompt_ids(chat: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation with the generation prompt behind it; control tokens that people typed stay text.

    Args:
        chat: The messages.
        tokenizer: Tokenizer or processor with a chat template.
    """
    control, options = control_of(tokenizer), {"add_generation_prompt": True}
    if control.typed(chat) is not None:
        return control.encode(render(control.hide(chat), tokenizer, **options))
    text = render([dict(message) for message in chat], tokenizer, **options)
    # A conversation longer than the model takes is for the caller to see.
    return list(text_part(tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pattern(choices: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(choices) or "(?!)")


def _delimiters(tokenizer: Any, tokens: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of ``tokens`` that delimit turns, and those of them that end a reply."""
    inner = text_part(tokenizer)
    try:
        markers = detect_markers(tokenizer)
    except ConfigError:
        written, ends = "", ()
    else:
        written, ends = "".join((markers.instruction, markers.response, *markers.ends)), markers.ends
    named = (inner.bos_token, inner.eos_token, inner.pad_token)
    return (
        tuple(token for token in tokens if token in written or token in named),
        tuple(token for token in tokens if token in ends or token == inner.eos_token),
    )

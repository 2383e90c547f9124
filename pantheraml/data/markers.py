"""What a chat template writes around a turn, found by rendering a conversation of known words and looking between them.

Nothing is known about any template here: a template that renders is understood by what it renders.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ..errors import ConfigError
from .pieces import pieces_of, text_part

# Words that no template writes, strips, splits or changes. Starting alike would shift where they are found.
_CONTENTS = ("quarzbeisser", "plimsollkante", "vexierdorn", "jochgimpel")
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_CLOSERS = ">]}\n"
# A template that knows contents as text only writes their parts as Python does.
_PART = "{'type': 'text'"


@dataclass(frozen=True)
class Markers:
    """What stands around the turns of a conversation.

    Attributes:
        instruction: What opens a user turn; empty when the template writes nothing there.
        response: What opens an assistant turn.
        ends: What may close an assistant turn, without the whitespace that may follow it. Empty when nothing does.
        prefill: What a generation prompt writes behind ``response``, such as the start of a thinking block. Where a
            turn begins with it, it is not the model that writes it.
    """

    instruction: str
    response: str
    ends: tuple[str, ...]
    prefill: str = ""


def render(messages: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> str:
    """The text that the tokenizer's chat template makes of ``messages``."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def try_render(messages: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> str | None:
    """The rendering of ``messages``; None where the template refuses them."""
    try:
        return render(messages, tokenizer, **options)
    except _RENDER_ERRORS:
        return None


@functools.lru_cache(maxsize=16)
def _finder(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def common_start(first: str, second: str, tokens: tuple[str, ...]) -> str:
    """The longest start that two texts share without dividing one of ``tokens``."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first.startswith(second[:middle]) else (low, middle - 1)
    reach = max(map(len, tokens), default=0)
    for text in (first, second):
        begin = max(0, low - reach)
        for match in _finder(tokens).finditer(text, begin, low + reach):
            if match.start() < low < match.end():
                low = match.start()
    return first[:low]


def detect_markers(tokenizer: Any, **options: Any) -> Markers:
    """Find out what the chat template writes around turns.

    Args:
        tokenizer: Tokenizer or processor with a chat template.
        options: Passed to the template, such as ``chat_template`` or ``enable_thinking``.

    Returns:
        The markers.

    Raises:
        ConfigError: there is no chat template, it cannot render two turns, or it marks no assistant turn.
    """
    if not (getattr(tokenizer, "chat_template", None) or options.get("chat_template")):
        raise ConfigError(
            "the markers of instruction and response cannot be found",
            where="arguments instruction_part and response_part",
            why="the tokenizer has no chat template",
            hint="pass both, such as instruction_part='### Instruction:\\n', response_part='### Response:\\n'",
        )
    # Rows are labelled one at a time, and this takes as long as rendering six of them.
    inner = text_part(tokenizer)
    state = (repr(tokenizer.chat_template), len(inner), inner.bos_token, inner.eos_token)
    if not options and _known.get(tokenizer, (None,))[0] == state:
        return _known[tokenizer][1]
    tokens = pieces_of(tokenizer).added
    found = (_from(*rendered, tokenizer, tokens) for rendered in _renderings(tokenizer, options))
    markers = next((candidate for candidate in found if candidate is not None), None)
    if markers is None:
        raise ConfigError(
            "the markers of instruction and response cannot be found in the chat template",
            where="arguments instruction_part and response_part",
            why="a conversation of two turns does not render, or nothing marks where an assistant's turn begins",
            hint="pass both: the text before each user message and the text before each assistant message",
        )
    if not options:
        _known[tokenizer] = (state, markers)
    return markers


_known: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _renderings(tokenizer: Any, options: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Two turns, one user message, and that message with a generation prompt; contents as text, then as parts."""
    for as_parts in (False, True):
        chat = [
            {"role": role, "content": [{"type": "text", "text": word}] if as_parts else word}
            for role, word in zip(("user", "assistant") * 2, _CONTENTS)
        ]
        text = try_render(chat, tokenizer, **options)
        if text is not None and _PART not in text:
            asked = try_render(chat[:1], tokenizer, **options) or ""
            prompted = try_render(chat[:1], tokenizer, **options | {"add_generation_prompt": True}) or ""
            yield text, asked, prompted


def _from(text: str, asked: str, prompted: str, tokenizer: Any, tokens: tuple[str, ...]) -> Markers | None:
    parts: list[str] = []
    for word in _CONTENTS:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    head, first, gap, second = parts
    prompt = prompted.partition(_CONTENTS[0])[2]
    addition = prompted[len(asked) :] if prompted.startswith(asked) else ""
    shared = _closing(gap, text, tokens)
    closing = shared or _middle_closing(head, first, gap, addition, tokens)
    ends = {closing.strip(), "" if shared.strip() else _leading_token(text, tokens)}
    between = common_start(first, second, tokens)
    # What follows the generation prompt is for the model to write, an empty thinking block for example.
    opening = common_start(between, prompt, tokens)
    prefill = prompt[len(opening) :]
    response = _response(opening, addition, closing)
    if not response.strip():
        # The template gives no generation prompt.
        response, prefill = _response(between, "", closing), ""
    instruction = gap.removeprefix(closing).lstrip()
    bos = text_part(tokenizer).bos_token
    instruction = instruction.removeprefix(bos) if bos else instruction
    found_ends = tuple(sorted(ends - {""}, key=lambda text: (-len(text), text)))
    if not response.strip() or not (found_ends or instruction.strip()):
        return None
    return Markers(instruction, response, found_ends, prefill)


def _closing(gap: str, tail: str, tokens: tuple[str, ...]) -> str:
    """What closes an assistant's turn: the start that the text between two turns shares with the end of the last."""
    shared = common_start(gap, tail, tokens)
    if not shared or shared in (gap, tail) or shared.endswith(tokens):
        return shared
    # The two went on alike by chance, as in "<|end|>\n<|user|>" and "<|end|>\n<|endoftext|>".
    return shared[: max(shared.rfind(closer) for closer in _CLOSERS) + 1]


def _middle_closing(head: str, first: str, gap: str, addition: str, tokens: tuple[str, ...]) -> str:
    """The special token that closes a turn in the middle, of a template that closes the last one otherwise."""
    token = _leading_token(gap, tokens)
    # It may as well open the user's turn: then it stands before the first one too, and closes no user's turn.
    closes_user = first.lstrip().startswith(token) and not addition.lstrip().startswith(token) and addition.strip()
    return token if closes_user or not head.endswith(gap) else ""


def _leading_token(text: str, tokens: tuple[str, ...]) -> str:
    stripped = text.lstrip()
    return next((token for token in tokens if stripped.startswith(token)), "")


def _response(between: str, addition: str, closing: str) -> str:
    """What opens an assistant's turn.

    Args:
        between: What stands between the user's words and the assistant's.
        addition: What a generation prompt adds; empty when the template adds nothing.
        closing: What closes a turn.
    """
    if addition.strip() and addition.strip() in between:
        return between[between.index(addition.strip()) :]
    rest = between.removeprefix(closing)
    return rest if rest.strip() else "" if closing.strip() else between

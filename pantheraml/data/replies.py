"""Labels that train on replies only, for messages: renderings show where the chat template lets a reply begin.

No generation tags are needed in the template. :mod:`pantheraml.data.masking` gives the same labels for token ids alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError
from .control import control_of
from .markers import Markers, common_start, detect_markers, render, try_render
from .masking import IGNORED, Span
from .pieces import Pieces, Row, pieces_of, text_part, unmarked


def assistant_masks(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    last_response_only: bool = False,
    parse_control_tokens: bool = False,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """Tokenise a conversation, with labels on what the assistant writes and on the token that ends each reply.

    The conversation is rendered up to each reply with the generation prompt: what follows is what the model has to
    write. The chat template needs no generation tags for it.

    Args:
        messages: The conversation: ``role`` and ``content``, and what else the template knows.
        tokenizer: Tokenizer or processor with a chat template and, inside, a fast tokenizer.
        last_response_only: Whether only the last reply is trained. Default False.
        parse_control_tokens: Whether control tokens that messages spell are read as such, not as text. Default False.
        options: Passed to the template, such as ``tools`` or ``enable_thinking``.

    Returns:
        Token ids, and labels of the same length: the token id where it is trained, -100 elsewhere.

    Raises:
        DataError: it cannot be seen where a reply begins.
    """
    chat = [dict(message) for message in messages]
    inner = text_part(tokenizer)
    control = None if parse_control_tokens else control_of(tokenizer)
    if control is not None and control.typed(chat, options.get("tools")) is None:
        control = None
    if control is not None:
        chat = control.hide(chat)
        options |= {"tools": control.hide_all(options["tools"])} if options.get("tools") else {}
    text = render(chat, tokenizer, **options)
    spans = _message_spans(chat, text, tokenizer, options)
    if last_response_only:
        spans = spans[-1:]
    if control is None:
        encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
    else:
        ids, places = control.encode_with_places(text)
        spans = [(len(control.text(text[:start])), len(control.text(text[:end]))) for start, end in spans]
        text = control.text(text)
    labels = [IGNORED] * len(ids)
    for position in _covered(text, spans, ids, places, pieces_of(inner)):
        labels[position] = ids[position]
    return ids, labels


def _covered(
    text: str, spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span], pieces: Pieces
) -> Iterator[int]:
    """Positions of the tokens that have a letter in one of ``spans`` of ``text``."""
    plain = [unmarked(piece) for piece in pieces.of(ids)]
    row = Row.of(plain)
    if row.data == text.encode("utf-8", "replace"):
        # Offsets leave out a token's leading space in some tokenizers, bytes do not.
        for start, end in spans:
            before = len(text[:start].encode("utf-8", "replace"))
            yield from row.tokens(before, before + len(text[start:end].encode("utf-8", "replace")))
        return
    for start, end in spans:
        for position, (first, last) in enumerate(offsets):
            if first < end and (last > start or first == last > start):
                yield position


def _message_spans(chat: Sequence[dict[str, Any]], text: str, tokenizer: Any, options: dict[str, Any]) -> list[Span]:
    """Where in ``text`` each reply stands, with what closes it."""
    tokens = pieces_of(tokenizer).added
    markers = _markers(tokenizer, options)
    eos = text_part(tokenizer).eos_token
    ends = [*(markers.ends if markers else ()), *([eos] if eos else [])]
    closing = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
    spans: list[Span] = []
    cursor = 0
    for index, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        start = _start(chat, index, text, cursor, tokenizer, options, tokens, markers)
        limit = _limit(chat, index, text, tokenizer, options)
        content = _text(message).strip()
        found = text.find(content, start, limit) if content else -1
        if found >= 0 and limit is None and closing.search(text, start, found):
            found = -1  # A later turn says the same.
        written = found + len(content) if found >= 0 else start
        if limit is None:
            following = text.find(markers.instruction.strip(), written) if markers else -1
            limit = following if following > written else len(text)
        match = closing.search(text, written, limit)
        end = match.end() if match else start + len(text[start:limit].rstrip())
        if index == len(chat) - 1 and eos and text[end:].strip() == eos:
            end = text.index(eos, end) + len(eos)
        if end > start:
            spans.append((start, end))
        cursor = max(cursor, end)
    return spans


def _markers(tokenizer: Any, options: dict[str, Any]) -> Markers | None:
    try:
        return detect_markers(tokenizer, **{name: value for name, value in options.items() if name != "tools"})
    except ConfigError:
        return None


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") or "" for part in content if isinstance(part, Mapping)]
        return texts[-1] if texts else ""
    return content or ""


def _start(
    chat: Sequence[dict[str, Any]],
    index: int,
    text: str,
    cursor: int,
    tokenizer: Any,
    options: dict[str, Any],
    tokens: tuple[str, ...],
    markers: Markers | None,
) -> int:
    """Where reply ``index`` begins: behind the text that the model is given before it writes the reply."""
    bare = try_render(chat[:index], tokenizer, **options)
    prompt = try_render(chat[:index], tokenizer, **options | {"add_generation_prompt": True})
    start = -1
    if prompt is not None and text.startswith(prompt):
        start = len(prompt)
    elif prompt is not None and bare is not None and text.startswith(bare):
        # The prompt ends with something else than the reply begins with, such as the start of a thinking block. The
        # first letters of it may be those of the reply by chance.
        shared = len(common_start(prompt, text, tokens))
        opened = markers is not None and text.startswith(markers.response, len(bare))
        limit = len(bare) + len(markers.response) if markers is not None and opened else shared
        start = min(shared, limit) if shared > len(bare) else -1
    if start >= 0 and prompt == bare and markers and text.startswith(markers.response, start):
        start += len(markers.response)  # The template gives no generation prompt, and marks replies all the same.
    if start >= cursor:
        return start
    # The template writes the turns before differently when it stops there: look for the reply itself.
    start = _found(_text(chat[index]).strip(), text, cursor, tokens, markers)
    if start < 0:
        raise DataError(
            f"it cannot be seen where message {index + 1} of a conversation begins",
            why="the chat template changes what stands before it, and its text is not in the rendering",
            hint="use train_on_responses_only with instruction_part and response_part",
        )
    return start


def _found(content: str, text: str, cursor: int, tokens: tuple[str, ...], markers: Markers | None) -> int:
    """Where after ``cursor`` a reply begins, by its content and by what opens replies; -1 when it is not there."""
    if markers is None:
        return text.find(content, cursor) if content else -1
    opening, core = markers.response.lstrip(), re.escape(markers.response.strip())
    starts = [
        match.start() + _opened(opening, markers.prefill, text[match.start() :], tokens)
        for match in re.compile(core).finditer(text, cursor)
    ]
    # Openings that are part of other messages are not followed by this one.
    followed = (start for start in starts if content and text[start:].lstrip().startswith(content))
    return next(followed, starts[0] if starts else -1)


def _opened(opening: str, prefill: str, text: str, tokens: tuple[str, ...]) -> int:
    """How much of ``text`` is what opens a reply, with the prefill where it is all there."""
    if text.startswith(opening + prefill):
        return len(opening + prefill)
    return len(common_start(opening, text, tokens))


def _limit(
    chat: Sequence[dict[str, Any]], index: int, text: str, tokenizer: Any, options: dict[str, Any]
) -> int | None:
    """Where reply ``index`` has ended at the latest; None when that cannot be seen."""
    if index == len(chat) - 1:
        return len(text)
    through = try_render(chat[: index + 1], tokenizer, **options)
    return len(through) if through is not None and text.startswith(through) else None

"""Whether prompts come as a chat template writes them, or as people do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ConfigError
from .control import control_tokens
from .markers import detect_markers, try_render
from .pieces import text_part

_SYSTEM, _USER = "plimsollkante", "quarzbeisser"


def are_rendered(prompts: Sequence[str], tokenizer: Any) -> bool:
    """Whether every prompt has the control tokens of a template, which are meant to be read as such.

    Each begins as a conversation does and ends with what opens a reply, by the tokenizer's chat template; without one,
    each begins and ends with a control token. A single prompt that does not is enough to take the control tokens of the
    others for typed.

    Args:
        prompts: Some prompts of a data set.
        tokenizer: Tokenizer or processor.
    """
    tokens = control_tokens(tokenizer)
    if not any(token in prompt for prompt in prompts for token in tokens):
        return False
    bos = text_part(tokenizer).bos_token or ""
    try:
        markers = detect_markers(tokenizer)
    except ConfigError:
        heads, opening, tails = list(tokens), None, list(tokens)
    else:
        opening = markers.instruction.strip()
        heads = [opening, *_heads(tokenizer, bos)]
        tails = [markers.response.strip(), (markers.response + markers.prefill).strip()]
        # Where nothing stands before a system message, the user's may be anywhere.
        opening = opening if "" in heads else None
    heads, tails = ([text for text in texts if text] for texts in (heads, tails))

    def is_rendered(prompt: str) -> bool:
        body = prompt.strip().removeprefix(bos).strip()
        begins = body.startswith(tuple(heads)) or bool(opening and opening in body)
        return begins and body.endswith(tuple(tails))

    return all(map(is_rendered, prompts))


def _heads(tokenizer: Any, bos: str) -> Iterator[str]:
    """What the template writes before a system message, and before a user's."""
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    for chat, word in (([system, user], _SYSTEM), ([user], _USER)):
        text = try_render(chat, tokenizer, add_generation_prompt=True)
        if text is not None and word in text:
            yield text.partition(word)[0].strip().removeprefix(bos).strip()

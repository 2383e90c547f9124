"""Where generation stops: criteria for ``generate``, and the stop texts of an Ollama ``Modelfile``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, ConfigError
from .markers import detect_markers
from .pieces import text_part
from .templates.apply import stop_token_ids

_OWN = "eos_token"
# A Modelfile holds a stop text in one line between quotes.
_UNWRITABLE = frozenset('\r\n"\\')


def create_stopping_criteria(tokenizer: Any, stop_word: str = _OWN) -> Any:
    """Make criteria that end a generation behind a text, for ``model.generate(..., stopping_criteria=...)``.

    Args:
        tokenizer: Tokenizer or processor of the model.
        stop_word: The text, of one token or of several. The default, ``"eos_token"``, stands for the EOS token and the
            end tokens of the chat template that is set, see ``stop_token_ids``.

    Returns:
        A ``transformers.StoppingCriteriaList`` of one criterion, which looks at each row of a batch by itself.

    Raises:
        ArgumentError: ``stop_word`` is no text.
        ConfigError: ``stop_word`` is empty, or the tokenizer has no EOS token.
    """
    from transformers import EosTokenCriteria, StoppingCriteriaList, StopStringCriteria

    if not isinstance(stop_word, str):
        raise ArgumentError(f"the stop word is {type(stop_word).__name__}, not text", where="argument stop_word")
    if not stop_word:
        raise ConfigError("the stop word is empty", where="argument stop_word", hint="name the text to stop behind")
    inner = text_part(tokenizer)
    if stop_word == _OWN:
        ids = stop_token_ids(tokenizer)
        if not ids:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token",
                where="argument stop_word",
                hint="set tokenizer.eos_token, or name the text to stop behind",
            )
        return StoppingCriteriaList([EosTokenCriteria(ids)])
    added = {token.content: index for index, token in inner.added_tokens_decoder.items()}
    if stop_word in added:
        # Special tokens are no part of the texts that tokens are joined to.
        return StoppingCriteriaList([EosTokenCriteria([added[stop_word]])])
    return StoppingCriteriaList([StopStringCriteria(inner, stop_word)])


def get_ollama_eos_tokens(tokenizer: Any, extra_eos_tokens: Sequence[str] = ()) -> list[str]:
    """The texts behind which Ollama should stop: those of ``PARAMETER stop`` in a ``Modelfile``.

    Args:
        tokenizer: Tokenizer or processor of the model.
        extra_eos_tokens: Texts to add.

    Returns:
        The EOS token, what else ends a reply in the chat template, and the added ones, each once.

    Raises:
        ArgumentError: ``extra_eos_tokens`` is one text instead of a list.
        ConfigError: an added text cannot be written into a ``Modelfile``.
    """
    if isinstance(extra_eos_tokens, str):
        raise ArgumentError("extra_eos_tokens is a list of tokens, got one text", where="argument extra_eos_tokens")
    for text in extra_eos_tokens:
        if not text or _UNWRITABLE & set(text):
            raise ConfigError(
                f"{text!r} cannot be a stop text of a Modelfile",
                where="argument extra_eos_tokens",
                why="it is empty, or holds a line end, a quote or a backslash",
            )
    inner = text_part(tokenizer)
    found = [inner.convert_ids_to_tokens(index) for index in stop_token_ids(tokenizer)]
    # Without a chat template, the EOS token is all that ends a reply.
    with contextlib.suppress(ConfigError):
        found += detect_markers(tokenizer).ends
    usable = [text for text in found if text and not _UNWRITABLE & set(text)]
    return list(dict.fromkeys([*usable, *extra_eos_tokens]))

"""``get_chat_template``: a tokenizer with a chat template, the end token that goes with it, and padding of its own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ... import log
from ...errors import ArgumentError, ConfigError, UnsupportedError
from .registry import ChatTemplate, find_template, templates
from .rewrite import SYSTEM_PLACEHOLDER, check_syntax, rewrite
from .vocabulary import can_rename, rename_tokens

DEFAULT_MAPPING: Mapping[str, str] = MappingProxyType(
    {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
)
_REPAIR_PADDING = "pantheraml.models.tokenizers:repair_padding"
_OWN_EOS = "eos_token"
_MARK = re.compile(r"\{#- chat template: ([\w .-]+) -#\}")
_GEMMA_CHATML = "gemma_chatml"
_GEMMA_TOKENS = {"<start_of_turn>", "<end_of_turn>"}


def _text_tokenizer(tokenizer: Any) -> Any:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if type(inner).__name__.startswith("MistralCommon"):
        raise UnsupportedError(
            "this tokenizer is mistral-common's, which writes its chat format itself and takes no template",
            hint="use its apply_chat_template as it is, or load the tokenizer from tokenizer.json",
        )
    if not hasattr(inner, "apply_chat_template") or not hasattr(inner, "get_vocab"):
        raise ArgumentError(
            f"a tokenizer or processor is needed, got {type(tokenizer).__name__}", where="argument tokenizer"
        )
    return inner


def _names(mapping: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(mapping) - set(DEFAULT_MAPPING))
    if unknown:
        raise ConfigError(
            f"unknown key {', '.join(map(repr, unknown))}",
            where="argument mapping",
            hint=f"the keys are {', '.join(DEFAULT_MAPPING)}, the values are your data's names",
        )
    names = {**DEFAULT_MAPPING, **mapping}
    for key, value in names.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"the name of {key!r} must be a non-empty string, got {value!r}", where="argument mapping"
            )
    if names["role"] == names["content"] or names["user"] == names["assistant"]:
        raise ConfigError("two names are the same", where="argument mapping")
    return names


def _custom(pair: tuple[Any, ...]) -> ChatTemplate:
    if len(pair) != 2 or not all(isinstance(item, str) and item for item in pair):
        raise ConfigError(
            "a chat template of your own is a tuple of two strings: the Jinja text and the token that ends a turn",
            where="argument chat_template",
            hint=f"the end token {_OWN_EOS!r} stands for the tokenizer's own",
        )
    text, end = pair
    check_syntax(text)
    return ChatTemplate("custom", text, turn_end=None if end == _OWN_EOS else end, becomes_eos=True)


def _chosen(chat_template: Any, inner: Any) -> ChatTemplate | None:
    """The template that the argument means; None for the tokenizer's own."""
    if chat_template is None or chat_template == "auto":
        return None
    if isinstance(chat_template, tuple | list):
        return _custom(tuple(chat_template))
    if not isinstance(chat_template, str):
        raise ArgumentError(
            f"chat_template must be a name or a tuple, got {type(chat_template).__name__}",
            where="argument chat_template",
        )
    template = find_template(chat_template)
    if template.name == "chatml" and not _GEMMA_TOKENS - set(inner.get_vocab()):
        return find_template(_GEMMA_CHATML)
    return template


def _own(tokenizer: Any, inner: Any) -> str:
    text = getattr(tokenizer, "chat_template", None) or inner.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise ConfigError(
            "the tokenizer has no chat template of its own",
            where="argument chat_template",
            hint=f"choose one by name: {', '.join(templates())}",
        )
    return text


def _source(template: ChatTemplate, inner: Any, names: Mapping[str, str], system_message: str | None) -> str:
    """The template's final text, with the default system message chosen."""
    text = template.jinja(inner)
    if template.name == "custom":
        has_place = SYSTEM_PLACEHOLDER in text
        if has_place and system_message is None:
            raise ConfigError(
                f"the chat template has {SYSTEM_PLACEHOLDER} and no system message was given",
                where="argument system_message",
            )
    else:
        has_place = template.system_message is not None
        text = f"{{#- chat template: {template.name} -#}}\n{text}"
    if not has_place and system_message is not None:
        log.warning(
            f"the chat template {template.name!r} has no default system message, so system_message is not used; "
            "put a system message at the start of each chat instead"
        )
        system_message = None
    chosen = system_message if system_message is not None else template.system_message
    return rewrite(text, names, chosen if has_place or template.name == "custom" else "")


def _set_end_token(inner: Any, template: ChatTemplate, *, map_eos_token: bool) -> None:
    """Make the end of a turn one token, and the tokenizer's EOS where the format says so."""
    vocabulary = inner.get_vocab()
    renames = {old: new for old, new in template.renames.items() if old in vocabulary and new not in vocabulary}
    if renames and can_rename(inner):
        rename_tokens(inner, renames)
        log.info("tokens renamed, ids unchanged: " + ", ".join(f"{old} -> {new}" for old, new in renames.items()))
        vocabulary = inner.get_vocab()
    end = template.turn_end
    if end is None:
        if not inner.eos_token:
            raise ConfigError(
                f"the chat template {template.name!r} ends each answer with the EOS token, and the tokenizer has none",
                where="argument tokenizer",
                hint="set tokenizer.eos_token first",
            )
        return
    old = inner.eos_token
    if end in vocabulary:
        if template.becomes_eos and map_eos_token and old != end:
            inner.eos_token = end
            log.info(f"EOS token: {end!r}, the end of a turn (was {old!r})")
    elif map_eos_token and old and can_rename(inner):
        rename_tokens(inner, {old: end})
        inner.eos_token = end
        log.info(f"EOS token {old!r} is now called {end!r}, the end of a turn; its id is unchanged")
    else:
        log.warning(
            f"{end!r}, the end of a turn, is not in the vocabulary and is encoded as several tokens; "
            f"pass map_eos_token=True, or add it with add_new_tokens(model, tokenizer, [{end!r}]) first"
        )


def _tell_missing(inner: Any, template: ChatTemplate) -> None:
    vocabulary = inner.get_vocab()
    missing = [token for token in template.tokens if token not in vocabulary]
    if missing:
        log.info(
            f"the chat template {template.name!r} writes {', '.join(missing)} as ordinary text, since the vocabulary "
            "does not have them; add_new_tokens(model, tokenizer, [...]) before this call would give them embeddings"
        )


def _repair_padding(tokenizer: Any, inner: Any) -> None:
    if inner.pad_token_id is not None and inner.pad_token_id != inner.eos_token_id:
        return
    before = len(inner)
    module, _, name = _REPAIR_PADDING.partition(":")
    getattr(importlib.import_module(module), name)(None, tokenizer)
    if len(inner) > before:
        log.warning(
            f"the vocabulary has grown to {len(inner)} by a padding token: load the model with this tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] | None = "chatml",
    mapping: Mapping[str, str] = DEFAULT_MAPPING,
    map_eos_token: bool = True,
    system_message: str | None = None,
    patch_saving: bool = True,
    use_zoo_tokenizer_patch: bool | None = None,
) -> Any:
    """Give a tokenizer a chat template, the end token that goes with it, and a padding token of its own.

    No token is added, so the model's embeddings stay as they are: an end token that the vocabulary lacks takes the
    place of the EOS token (same id, new name), and other control tokens that it lacks are encoded as ordinary text,
    which is told. Where a template's answers are marked as generated, ``apply_chat_template`` can return their mask
    (``return_assistant_tokens_mask=True``); all templates by name are.

    Args:
        tokenizer: Tokenizer or processor, changed in place.
        chat_template: Name of a template; a tuple of Jinja text and end token; None or ``"auto"`` for the tokenizer's
            own. ``"chatml"`` on a Gemma tokenizer is ``"gemma_chatml"``.
        mapping: What the data calls ``role``, ``content``, ``user`` and ``assistant``,
            for example ``{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}``.
        map_eos_token: Whether the end of a turn may become the EOS token.
        system_message: Default system message, for the templates that have one; others warn. In a template of your
            own it fills ``{system_message}``.
        patch_saving: Accepted for compatibility: saving needs no patch, the tokenizer keeps its template.
        use_zoo_tokenizer_patch: Accepted for compatibility, likewise.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: unknown name or mapping, invalid Jinja, or no EOS token where the template needs one.
        ArgumentError: ``tokenizer`` is none, or ``chat_template`` is of another type.
        UnsupportedError: the tokenizer is mistral-common's own.
    """
    inner = _text_tokenizer(tokenizer)
    names = _names(mapping)
    if system_message is not None and not isinstance(system_message, str):
        raise ArgumentError("system_message must be a string", where="argument system_message")
    template = _chosen(chat_template, inner)
    if template is None:
        source = rewrite(_own(tokenizer, inner), names, None)
        if system_message is not None:
            log.warning("system_message is not used with the tokenizer's own chat template")
    else:
        source = _source(template, inner, names, system_message)
        _set_end_token(inner, template, map_eos_token=map_eos_token)
        _tell_missing(inner, template)
    tokenizer.chat_template = source
    inner.chat_template = source
    _repair_padding(tokenizer, inner)
    return tokenizer


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids at which generation should stop: the EOS token, and the end tokens of the chat template that is set.

    A template whose end of turn is not the EOS token (``llama-3``, ``gpt-oss``) needs them:
    ``model.generate(..., eos_token_id=stop_token_ids(tokenizer))``. It works after saving and loading too.

    Args:
        tokenizer: Tokenizer or processor.

    Returns:
        The ids without repetition, the EOS token's first.
    """
    inner = _text_tokenizer(tokenizer)
    ids = [] if inner.eos_token_id is None else [inner.eos_token_id]
    mark = _MARK.search(inner.chat_template) if isinstance(inner.chat_template, str) else None
    if mark is not None and mark.group(1) in templates():
        template = find_template(mark.group(1))
        vocabulary = inner.get_vocab()
        ids += [vocabulary[token] for token in (template.turn_end, *template.stops) if token in vocabulary]
    return list(dict.fromkeys(ids))

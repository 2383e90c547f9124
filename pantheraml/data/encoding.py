"""Training rows become token ids, a batch at a time, and it is said where in each row training begins.

The token ids and labels are those that TRL's ``SFTTrainer`` makes one row at a time, with two differences: control
tokens that people typed stay text (:mod:`pantheraml.data.control`), and a text that spells the beginning-of-sequence
token gets no second one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from .. import log
from ..errors import DataError
from .control import Span, control_of
from .markers import render
from .pieces import text_part
from .prompts import are_rendered

Columns = Mapping[str, Sequence[Any]]

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
# Columns that are read; the text column's name is the user's.
_PLAIN = {"role", "content"}
READ = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
# Beside a text: where it spells control tokens that stay text, as start, end, start, end, ...; null for nowhere.
TYPED = "typed_control_tokens"
# Characters of a wrong value that a message repeats.
MOST_SAID = 60


class RefusedRowError(ValueError):
    """The chat template cannot write a conversation; the message says why.

    Attributes:
        index: Its number in the batch, from 0.
    """

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True)
class Encoded:
    """A batch of rows in token ids.

    Attributes:
        ids: Token ids of each row, not cut.
        starts: For each row, how many tokens at its beginning are not trained.
        typed: For each row, a control token that it spells and that stays text, or None.
    """

    ids: list[list[int]]
    starts: list[int]
    typed: list[str | None]


def _require(kind: type, column: str, values: Sequence[Any]) -> None:
    """Raise for a value that is no text, or no list of messages."""
    for value in values:
        # A format of the data set may make other sequences of lists.
        fits = isinstance(value, str) if kind is str else isinstance(value, Iterable) and not isinstance(value, str)
        if not fits:
            said = repr(value)
            raise DataError(
                f"a row's {column!r} is {said if len(said) < MOST_SAID else type(value).__name__}, and should be "
                f"{'a text' if kind is str else 'a list of messages'}",
                where=f"column {column!r} of the data set",
                hint=f"leave such rows out: dataset.filter(lambda row: isinstance(row[{column!r}], {kind.__name__}))",
            )


class Encoder:
    """Encodes batches of rows: ``messages``; ``prompt`` and ``completion``, as texts or as messages; or a text.

    Args:
        tokenizer: Tokenizer or processor; chats need a chat template.
        text_column: Column of texts. Default ``text``.
        completion_only: Whether only the completion is trained where there is a prompt. Default True.
        parse_control: Whether control tokens that people typed are read as such. Default None: only in prompts that
            come as a template writes them, see ``begin``. In a text that comes as a whole they always are, but for
            those that the column ``typed_control_tokens`` names.
        chat_template: Chat template; None for the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        text_column: str = "text",
        completion_only: bool = True,
        parse_control: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.completion_only = completion_only
        self.parse_control = parse_control
        self.chat_template = chat_template
        self._inner = text_part(tokenizer)
        # A subclass may change what encoding does; the others are called without making masks that nobody reads.
        plain = type(self._inner)._encode_plus is PreTrainedTokenizerFast._encode_plus if self._is_fast() else False
        self._backend = self._inner._tokenizer if plain and not self._inner.split_special_tokens else None
        bos = self._inner.bos_token_id
        self._adds_bos = bos is not None and self._inner("a")["input_ids"][:1] == [bos]
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self._special = dict(self._inner.special_tokens_map)
        self._template = _compiled(tokenizer, chat_template) if has_template else None
        self._control = control_of(tokenizer) if not parse_control else None
        self._prompts_are_rendered = False

    def _is_fast(self) -> bool:
        return isinstance(self._inner, PreTrainedTokenizerFast)

    def settings(self) -> dict[str, Any]:
        """What decides about the token ids, for the key of a cache."""
        inner = self._inner
        return {
            "class": type(inner).__qualname__,
            "tokenizer": inner._tokenizer.to_str() if self._is_fast() else repr(inner) + repr(inner.get_vocab()),
            "special": {name: str(token) for name, token in inner.special_tokens_map.items()},
            "template": self.chat_template or getattr(self.tokenizer, "chat_template", None),
            "split_special_tokens": getattr(inner, "split_special_tokens", False),
            "text_column": self.text_column,
            "completion_only": self.completion_only,
            "parse_control": self.parse_control,
        }

    def reads(self, columns: Sequence[str]) -> list[str]:
        """Those of a data set's columns that are read."""
        return [name for name in columns if name in READ or name in (self.text_column, TYPED)]

    def spells_bos(self, text: Any) -> bool:
        """Whether a text begins with the beginning-of-sequence token that the tokenizer adds by itself."""
        return self._adds_bos and isinstance(text, str) and text.lstrip().startswith(self._inner.bos_token)

    def __call__(self, columns: Columns) -> Encoded:
        """Encode a batch of rows.

        Args:
            columns: The rows' values by column.

        Returns:
            Token ids, starts of training, and typed control tokens.

        Raises:
            RefusedRowError: the chat template cannot write a row.
        """
        prompts = columns.get("prompt")
        if prompts is not None:
            return self._with_prompt(columns, prompts, columns["completion"])
        typed: list[str | None]
        chats = columns.get("messages")
        if chats is not None and not (len(chats) and isinstance(chats[0], str)):
            _require(list, "messages", chats)
            ids, typed = self._chats(chats, columns)
        else:
            _require(str, self.text_column, columns[self.text_column])
            texts = [self._ended(text) for text in columns[self.text_column]]
            ids, typed = self._typed_texts(texts, [_pairs(flat) for flat in columns.get(TYPED) or [None] * len(texts)])
        return Encoded(ids, [0] * len(ids), typed)

    def _with_prompt(self, columns: Columns, prompts: Sequence[Any], completions: Sequence[Any]) -> Encoded:
        typed: list[str | None]
        kind = list if len(prompts) and isinstance(prompts[0], list) else str
        _require(kind, "prompt", prompts)
        _require(kind, "completion", completions)
        if kind is list:
            wholes, typed = self._chats([[*a, *b] for a, b in zip(prompts, completions, strict=True)], columns)
            starts = self._chats(prompts, columns, add_generation_prompt=True)[0] if self.completion_only else []
        else:
            both = [self._ended(a + b) for a, b in zip(prompts, completions, strict=True)]
            places = [self._places(a, b) for a, b in zip(prompts, completions, strict=True)]
            wholes, typed = self._typed_texts(both, places)
            within = [[pair for pair in pairs if pair[1] <= len(a)] for a, pairs in zip(prompts, places)]
            starts = self._typed_texts(prompts, within)[0] if self.completion_only else []
        if not self.completion_only:
            return Encoded(wholes, [0] * len(wholes), typed)
        shared = [
            len(start) if whole[: len(start)] == start else _shared(start, whole)
            for start, whole in zip(starts, wholes)
        ]
        if any(count < len(start) for count, start in zip(shared, starts)):
            log.once(
                "prompts end in other tokens when the completion follows: training begins where they differ",
                key="prompt boundary",
            )
        return Encoded(wholes, shared, typed)

    def _places(self, prompt: str, completion: str) -> list[Span]:
        """Where a prompt and the completion behind it spell control tokens that stay text."""
        if self._control is None or self._prompts_are_rendered:
            return []
        found, count = self._control.places(prompt, own_bos=True), len(prompt)
        return found + [(start + count, end + count) for start, end in self._control.places(completion, reply=True)]

    def _ended(self, text: str) -> str:
        end = self._inner.eos_token
        return text if not end or text.endswith(end) else text + end

    def _texts(self, texts: Sequence[str]) -> list[list[int]]:
        own = [self.spells_bos(text) for text in texts] if self._adds_bos else []
        if not any(own):
            return self._encode(texts, add_special_tokens=True)
        log.once(f"texts begin with {self._inner.bos_token} already: no second one is added", key="own BOS")
        return [self._encode([text], add_special_tokens=not spells)[0] for text, spells in zip(texts, own)]

    def _typed_texts(
        self, texts: Sequence[str], places: Sequence[Sequence[Span]]
    ) -> tuple[list[list[int]], list[str | None]]:
        """Token ids of texts, in each of which the control tokens at ``places`` stay text, and the first such token."""
        control = self._control
        if control is None or not any(places):
            return self._texts(texts), [None] * len(texts)
        rest = iter(self._texts([text for text, own in zip(texts, places) if not own]))
        ids = [
            control.encode(control.hide_places(text, own), add_special_tokens=not self.spells_bos(text))
            if own
            else next(rest)
            for text, own in zip(texts, places)
        ]
        return ids, [text[slice(*own[0])] if own else None for text, own in zip(texts, places)]

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return self._inner(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        # Where each token stands in its text is not needed.
        return [item.ids for item in self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def begin(self, prompts: Sequence[Any] = ()) -> None:
        """Undo the truncation and padding that the last call of the tokenizer may have left, and look at some prompts.

        Args:
            prompts: The first prompts of the data set, where it has any.
        """
        if prompts and self.parse_control is None and all(isinstance(prompt, str) for prompt in prompts):
            self._prompts_are_rendered = are_rendered(prompts, self.tokenizer)
            if self._prompts_are_rendered:
                log.info("prompts come with the control tokens of a template, which are read as such")
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False

    def _chats(
        self, chats: Sequence[Any], columns: Columns, *, add_generation_prompt: bool = False
    ) -> tuple[list[list[int]], list[str | None]]:
        extras = [self._extras(columns, index) for index in range(len(chats))] if _has_extras(columns) else None
        typed: list[str | None] = [None] * len(chats)
        if self._control is not None:
            typed = [
                self._control.typed(chat, extras[index].get("tools") if extras else None)
                for index, chat in enumerate(chats)
            ]
        options: dict[str, Any] = {"add_generation_prompt": True} if add_generation_prompt else {}
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        if extras is None and not any(typed):
            texts = self._render_all(chats, options)
            return self._encode(texts, add_special_tokens=False), typed
        texts = []
        for index, chat in enumerate(chats):
            own = dict(options) | (extras[index] if extras else {})
            if typed[index] is not None and self._control is not None:
                chat, own = self._control.hide(chat), own | {"tools": self._control.hide_all(own.get("tools"))}
            texts.append(self._render(chat, own, index))
        ids = self._encode([text for text, found in zip(texts, typed) if found is None], add_special_tokens=False)
        rest = iter(ids)
        assert self._control is not None or not any(typed)
        return [
            next(rest) if found is None else self._control.encode(text)  # type: ignore[union-attr]
            for text, found in zip(texts, typed)
        ], typed

    def _render_all(self, chats: Sequence[Any], options: dict[str, Any]) -> list[str]:
        try:
            if self._template is not None and all(map(_is_plain, itertools.chain.from_iterable(chats))):
                # What apply_chat_template does besides is for other messages, and takes as long as this.
                prompt = options.get("add_generation_prompt", False)
                values = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._special}
                return _rendered(self._template, chats, values)
            return self.tokenizer.apply_chat_template(list(chats), tokenize=False, **options) if len(chats) else []
        except TEMPLATE_ERRORS:
            # Again one by one, to know which.
            return [self._render(chat, options, index) for index, chat in enumerate(chats)]

    def _render(self, chat: Sequence[Any], options: dict[str, Any], index: int) -> str:
        try:
            return render([dict(message) for message in chat], self.tokenizer, **options)
        except TEMPLATE_ERRORS as error:
            raise RefusedRowError(index, str(error)) from error

    def _extras(self, columns: Columns, index: int) -> dict[str, Any]:
        tools = columns["tools"][index] if "tools" in columns else None
        own = columns["chat_template_kwargs"][index] if "chat_template_kwargs" in columns else None
        return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (own or {})


def _compiled(tokenizer: Any, chat_template: str | None) -> Any:
    """The template as transformers compiles and runs it, in its sandbox; None where that cannot be had."""
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    plain = type(tokenizer).apply_chat_template is PreTrainedTokenizerFast.apply_chat_template
    text = chat_template or tokenizer.chat_template
    if compile_template is None or not plain or not isinstance(text, str):
        return None
    try:
        return compile_template(text)
    except jinja2.TemplateError:
        return None  # Rendering says why.


def _rendered(template: Any, chats: Sequence[Any], values: Mapping[str, Any]) -> list[str]:
    """What ``template.render`` writes, which collects the names of the environment anew each time."""
    named = {**template.globals, **values}
    concat, write, context = template.environment.concat, template.root_render_func, template.new_context
    return [concat(write(context({**named, "messages": chat}, shared=True))) for chat in chats]


def _is_plain(message: Any) -> bool:
    return message.keys() == _PLAIN and type(message["content"]) is str


def _pairs(flat: Sequence[int] | None) -> list[Span]:
    return list(zip(flat[::2], flat[1::2])) if flat else []


def _has_extras(columns: Columns) -> bool:
    return any(value for name in ("tools", "chat_template_kwargs") for value in columns.get(name, ()))


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))

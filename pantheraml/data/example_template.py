"""Chat templates made from an example that shows two turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .. import log
from ..errors import ArgumentError, ConfigError, DataError
from .control import control_of
from .encoding import TYPED
from .pieces import text_part
from .sharegpt import standardize_sharegpt

_LLAMA_3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{INPUT}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{OUTPUT}<|eot_id|>"
)
# The layout of Meta's Llama 3 instruct models (llama.com/docs/model-cards-and-prompt-formats/meta-llama-3).
LLAMA_3_EXAMPLE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>" + _LLAMA_3_TURN * 2
)
DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."

_SYSTEM = "{SYSTEM}"
_TURN = re.compile(r"(\{INPUT\}|\{OUTPUT\})")
_COLUMN = "conversations"


@dataclass(frozen=True)
class ExampleTemplate:
    """A chat template that was made from an example.

    Attributes:
        jinja_template: The template as ``tokenizer.chat_template`` holds it.
        input_part: What stands in front of each user's text; an ``instruction_part`` for response-only training.
        output_part: What stands in front of each answer; a ``response_part``, and the generation prompt.
    """

    jinja_template: str
    input_part: str
    output_part: str


@dataclass(frozen=True)
class _Layout:
    """The literal texts of a chat. ``after_system`` is None where the example has no place for a system message."""

    begins_with_bos: bool
    before_system: str
    after_system: str | None
    separator: str
    input_prefix: str
    input_suffix: str
    output_prefix: str
    output_suffix: str


def _error(what: str, why: str | None = None, hint: str | None = None) -> ConfigError:
    return ConfigError(what, where="argument chat_template", why=why, hint=hint)


def _common_suffix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _cut(example: str) -> tuple[str, str, str, str]:
    """Return the example's texts before the first turn, inside a turn, between the turns and after the second."""
    pieces = _TURN.split(example)
    if pieces[1::2] != ["{INPUT}", "{OUTPUT}"] * 2:
        raise _error(
            "the example does not show two turns",
            why=f"it has, in this order: {', '.join(pieces[1::2]) or 'no placeholder'}",
            hint="write {INPUT} ... {OUTPUT} ... {INPUT} ... {OUTPUT}, with {SYSTEM} before them where it goes",
        )
    head, inside, between, inside_again, tail = pieces[0::2]
    if inside != inside_again:
        raise _error(
            "the two turns of the example differ",
            why=f"between {{INPUT}} and {{OUTPUT}} stands first {inside!r}, then {inside_again!r}",
            hint="repeat the turn character by character",
        )
    if not inside:
        raise _error("nothing stands between {INPUT} and {OUTPUT}", hint="write what begins the answer")
    if example.count(_SYSTEM) > 1 or (_SYSTEM in example and _SYSTEM not in head):
        raise _error("{SYSTEM} stands twice or after the first {INPUT}", hint="write it once, before the turns")
    return head, inside, between, tail


def _ends(tokenizer: Any, extra: Sequence[str] | None) -> list[str]:
    """The tokens that may end an answer, the tokenizer's own first."""
    if isinstance(extra, str):
        raise ArgumentError("extra_eos_tokens is a list of tokens, got one text", where="argument extra_eos_tokens")
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        for token in extra or ():
            if token not in vocabulary:
                raise ConfigError(
                    f"{token!r} is no token of the tokenizer",
                    where="argument extra_eos_tokens",
                    hint="name tokens of its vocabulary, or add it first with add_new_tokens",
                )
    own = getattr(tokenizer, "eos_token", None)
    return [token for token in (own, *(extra or ())) if token]


def _closing(between: str, tail: str, ends: list[str]) -> str:
    """The example's text after an answer, as far as it belongs to the turn."""
    for closing in (tail, tail.rstrip("\n")):
        if between.startswith(closing):
            return closing or next((end for end in ends if between.startswith(end)), "")
    raise _error(
        "the example's second turn does not end as its first",
        why=f"after the first {{OUTPUT}} stands {between!r}, after the second {tail!r}",
        hint="end both turns with the same text",
    )


def _adds_bos(tokenizer: Any) -> bool:
    start = getattr(tokenizer, "bos_token_id", None)
    return start is not None and list(tokenizer("a")["input_ids"])[:1] == [start]


def _layout(tokenizer: Any, example: str, extra_eos_tokens: Sequence[str] | None) -> tuple[_Layout, str]:
    """Take an example apart; also return how its two turns have to come out."""
    head, inside, between, tail = _cut(example)
    ends = _ends(tokenizer, extra_eos_tokens)
    closing = _closing(between, tail, ends)
    end = ""
    if not ends and not closing.strip():
        raise _error("nothing ends the answers", hint="pass a tokenizer with an eos_token, or extra_eos_tokens")
    if ends and not closing.lstrip().startswith(tuple(ends)):
        end = ends[0]
        log.once(f"the answers of the example do not end with {' or '.join(ends)}: {end} is put after each")
    bos = getattr(tokenizer, "bos_token", None) or ""
    begins = bool(bos) and (head.startswith(bos) or _adds_bos(tokenizer))
    head = head.removeprefix(bos)
    turn = f"{{INPUT}}{inside}{{OUTPUT}}{end}"
    whole = (bos if begins else "") + head + turn + between + turn + closing
    before, placeholder, after = head.partition(_SYSTEM)
    region, rest = after if placeholder else head, between[len(closing) :]
    prefix = _common_suffix(region, rest)
    region = region[: len(region) - len(prefix)]
    answer = inside[len(closing) :] if closing and inside.startswith(closing) and inside != closing else inside
    layout = _Layout(
        begins_with_bos=begins,
        before_system=before if placeholder else region,
        after_system=region if placeholder else None,
        separator=rest[: len(rest) - len(prefix)],
        input_prefix=prefix,
        input_suffix=inside[: len(inside) - len(answer)],
        output_prefix=answer,
        output_suffix=end + closing,
    )
    return layout, whole


def _literal(text: str) -> str:
    """A Jinja string of ``text``. Line ends are escaped, since Jinja changes those of its source."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return f"'{text}'"


def _raise(reason: str) -> str:
    return f"{{{{ raise_exception({_literal(reason)}) }}}}"


def _put(*expressions: str) -> str:
    kept = [expression for expression in expressions if expression != "''"]
    return "{{ " + " + ".join(kept) + " }}" if kept else ""


def _jinja(layout: _Layout, default_system: str | None) -> str:
    q = _literal
    parts = [
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        f"{{% else %}}{{% set system = {q(default_system or '')} %}}{{% set turns = messages %}}{{% endif %}}",
        f"{{% if system is not string %}}{_raise('the system message is not text')}{{% endif %}}",
        f"{{% if not turns %}}{_raise('the conversation is empty')}{{% endif %}}",
        "{{ bos_token }}" if layout.begins_with_bos else "",
    ]
    if layout.after_system is None:
        refusal = _raise("the chat template has no place for a system message")
        parts.append(f"{{% if system %}}{refusal}{{% endif %}}{_put(q(layout.before_system))}")
    else:
        # Where turns are told apart by more than space, what begins the first one is known with a system message only.
        absent = "{% else %}" + _raise("the chat template needs a system message") if layout.separator.strip() else ""
        present = _put(q(layout.before_system), "system", q(layout.after_system))
        parts.append(f"{{% if system %}}{present}{absent}{{% endif %}}")
    separator = f"{{% if not loop.first %}}{_put(q(layout.separator))}{{% endif %}}" if layout.separator else ""
    user = _put(q(layout.input_prefix), "message['content']", q(layout.input_suffix))
    assistant = _put(q(layout.output_prefix), "message['content']", q(layout.output_suffix))
    parts += [
        "{% for message in turns %}{% set role = 'user' if loop.index0 % 2 == 0 else 'assistant' %}",
        f"{{% if message['role'] != role %}}{_raise('user and assistant do not take turns, beginning with the user')}",
        f"{{% elif message['content'] is not string %}}{_raise('the content of a message is not text')}",
        f"{{% elif role == 'user' %}}{separator}{user}",
        f"{{% else %}}{assistant}{{% endif %}}",
        "{% endfor %}",
        f"{{% if add_generation_prompt %}}{_put(q(layout.output_prefix))}{{% endif %}}",
    ]
    return "".join(parts)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _render(template: str, messages: list[dict[str, str]], bos: str) -> str:
    """Render with the settings of ``transformers``' own renderer."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template, globals={"raise_exception": _raise_exception})
    return compiled.render(messages=messages, bos_token=bos, add_generation_prompt=False)


def construct_chat_template(
    tokenizer: Any = None,
    chat_template: str = LLAMA_3_EXAMPLE,
    default_system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> ExampleTemplate:
    """Make a chat template from an example with ``{INPUT}`` and ``{OUTPUT}`` twice, and ``{SYSTEM}`` if there is one.

    What repeats from the first turn to the second becomes the template's loop. The template is rendered with the
    placeholders as its messages and has to give the example back. Where an answer of the example ends with none of the
    end tokens, the tokenizer's is put after it, since a model could not learn to stop otherwise; where the tokenizer
    puts a beginning-of-sequence token in front of every text, the template begins with it.

    Args:
        tokenizer: Tokenizer or processor of the model. Without one, the example is taken to have all special tokens.
        chat_template: The example. Default: Llama 3's layout.
        default_system_message: System message of chats without one; None or empty leaves the system part out there.
        extra_eos_tokens: Tokens besides the tokenizer's own that may end an answer.

    Returns:
        The template and the texts that begin a user's turn and an answer.

    Raises:
        ConfigError: the example does not show two equal turns, nothing ends its answers, a default system message was
            chosen and has no place, or an end token is not in the vocabulary.
        ArgumentError: the example is not text.
    """
    if not isinstance(chat_template, str):
        raise ArgumentError(f"the example is {type(chat_template).__name__}, not text", where="argument chat_template")
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    layout, whole = _layout(inner, chat_template, extra_eos_tokens)
    if layout.after_system is None:
        if default_system_message not in (None, "", DEFAULT_SYSTEM_MESSAGE):
            raise ConfigError(
                "the example has no place for the default system message",
                where="argument default_system_message",
                hint="write {SYSTEM} in the example, or leave default_system_message out",
            )
        default_system_message = None
    elif tokenizer is None and not default_system_message:
        raise ConfigError(
            "what remains without a system message can only be told with a tokenizer",
            where="argument default_system_message",
            why="a beginning-of-sequence token in front of {SYSTEM} has to stay",
            hint="pass the tokenizer, or a default system message",
        )
    template = _jinja(layout, default_system_message)
    turns = [{"role": "user", "content": "{INPUT}"}, {"role": "assistant", "content": "{OUTPUT}"}] * 2
    system = [] if layout.after_system is None else [{"role": "system", "content": _SYSTEM}]
    rendered = _render(template, [*system, *turns], getattr(inner, "bos_token", None) or "")
    if rendered != whole:
        raise _error("the example cannot be made into a template", why=f"it comes out as {rendered!r}, not {whole!r}")
    return ExampleTemplate(template, layout.input_prefix, layout.output_prefix)


def apply_chat_template(
    dataset: Any,
    tokenizer: Any = None,
    chat_template: str = LLAMA_3_EXAMPLE,
    default_system_message: str | None = DEFAULT_SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Render the column ``conversations`` into a column ``text``, by a template made from an example.

    The tokenizer keeps the template, so that generation uses the layout of training. Where conversations spell control
    tokens, the column ``typed_control_tokens`` says where they stand in the text, so that they stay text in training.

    Args:
        dataset: A ``Dataset`` or ``IterableDataset``; its conversations may have ``from``/``value`` messages.
        tokenizer: Tokenizer or processor of the model.
        chat_template: The example with two turns, see ``construct_chat_template``.
        default_system_message: System message of chats without one; None or empty leaves the system part out there.
        extra_eos_tokens: Tokens besides the tokenizer's own that may end an answer.

    Returns:
        The data set with the column ``text``; other columns stay, the conversations in ``role`` and ``content``.

    Raises:
        ConfigError: the example cannot be used, or there is no column ``conversations``.
        DataError: a conversation does not fit the template.
        ArgumentError: no tokenizer.
    """
    if tokenizer is None:
        raise ArgumentError("apply_chat_template needs the tokenizer", hint="pass tokenizer=tokenizer")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if _COLUMN not in columns:
        raise ConfigError(
            f"there is no column {_COLUMN!r}",
            where="argument dataset",
            why=f"the columns are: {', '.join(columns)}",
            hint="make it with to_sharegpt, or rename the column that holds the messages",
        )
    template = construct_chat_template(tokenizer, chat_template, default_system_message, extra_eos_tokens)
    for holder in {id(held): held for held in (tokenizer, getattr(tokenizer, "tokenizer", tokenizer))}.values():
        holder.chat_template = template.jinja_template

    control = control_of(text_part(tokenizer))
    standard = standardize_sharegpt(dataset)
    # A stream has the column in any case, since it is read only once.
    told = not isinstance(dataset, Dataset) or any(control.typed(row[_COLUMN] or ()) for row in standard)

    def render(batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        texts, places = [], []
        for row, chat in zip(rows, batch[_COLUMN]):
            typed = told and control.typed(chat or ()) is not None
            try:
                text = tokenizer.apply_chat_template(control.hide(chat) if typed else chat, tokenize=False)
            except TemplateError as error:
                raise DataError(
                    "a conversation does not fit the chat template", where=f"row {row + 1}", why=str(error)
                ) from error
            texts.append(control.text(text) if typed else text)
            places.append([place for span in control.typed_places(text) for place in span] if typed else None)
        return {"text": texts} | ({TYPED: places} if told else {})

    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        options = {"desc": "Applying the chat template"}
        if told:
            # A batch without any would be of another type.
            types = {"text": Value("string"), TYPED: List(Value("int64"))}
            options["features"] = Features({**standard.features, **types})
    return standard.map(render, batched=True, with_indices=True, **options)

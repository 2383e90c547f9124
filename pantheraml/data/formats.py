"""Which columns of a data set are to be trained on, and the rows that TRL's ``SFTTrainer`` takes."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset

from ..errors import ConfigError, DataError
from . import chats
from .chats import BadRowError
from .columns import checked_by_column
from .control import TypedControl, control_of
from .encoding import TYPED
from .rows import Rejections, Row, type_name
from .stored import stored

Kind = Literal["alpaca", "messages", "prompt_completion", "text"]

# Its functions are made as it is imported.
pc: Any = pyarrow.compute

ACCEPTED = (
    "messages or conversations (a list of role/content or from/value objects); instruction, input, output (alpaca); "
    "prompt and completion (or question and answer); text"
)
# Parts of each kind; those in the second tuple need not be there.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("instruction", "output"), ("input",)),
    "messages": (("messages",), ()),
    "prompt_completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
# Column names by which a kind is recognised, tried from the top.
_KNOWN: tuple[tuple[Kind, dict[str, str]], ...] = (
    ("messages", {"messages": "messages"}),
    ("messages", {"messages": "conversations"}),
    ("messages", {"messages": "conversation"}),
    ("messages", {"messages": "chat"}),
    ("alpaca", {"instruction": "instruction", "input": "input", "output": "output"}),
    ("alpaca", {"instruction": "instruction", "input": "context", "output": "response"}),
    ("alpaca", {"instruction": "instruction", "output": "output"}),
    ("alpaca", {"instruction": "instruction", "output": "response"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "completion"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "response"}),
    ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    ("text", {"text": "text"}),
    ("prompt_completion", {"prompt": "query", "completion": "response"}),
    ("prompt_completion", {"prompt": "input", "completion": "output"}),
)
# Prompts under these names are bare questions; under "prompt" they are complete, separator and all.
_BARE_PROMPTS = {"question", "query", "input"}
_PREFERENCE = " (preference data, which supervised fine-tuning does not take)"
_PEEK = 100
_BATCH = 1000

# The prompts with which the Alpaca data set was published (github.com/tatsu-lab/stanford_alpaca).
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Format:
    """How the rows of a data set are read.

    Attributes:
        kind: ``alpaca``, ``messages``, ``prompt_completion`` or ``text``.
        columns: Column that holds each part; for messages also ``role`` and ``content``, the keys inside a message.
    """

    kind: Kind
    columns: dict[str, str]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} from {column!r}" for part, column in self.columns.items())
        return f"{self.kind}: {parts}"


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca prompt up to and including ``### Response:`` and its newline."""
    return "".join(part for part, _ in _alpaca_parts(instruction, input))


def _alpaca_parts(instruction: str, input: str) -> Iterator[tuple[str, bool]]:
    """The stretches of the prompt, and whether each is a field of the row."""
    values = {"instruction": instruction, "input": input}
    for written, name, _, _ in string.Formatter().parse(_ALPACA_WITH_INPUT if input else _ALPACA):
        yield written, False
        if name is not None:
            yield values[name], True


def detect(dataset: Dataset, *, overrides: Mapping[str, str | None] | None = None, where: str = "data set") -> Format:
    """Find out how to read ``dataset`` from its column names.

    Args:
        dataset: The rows.
        overrides: What the user decides: ``format`` (a kind) and the column of a part (``text``, ``prompt``,
            ``completion``, ``messages``, ``instruction``, ``input``, ``output``). None values count as absent.
        where: Name of the data set for messages.

    Returns:
        The kind and its columns.

    Raises:
        DataError: no usable columns, or a named column is not there.
        ConfigError: the overrides name an unknown kind or part, or parts of different kinds.
    """
    chosen = {key: value for key, value in (overrides or {}).items() if value is not None}
    columns = dataset.column_names
    kind = _chosen_kind(chosen)
    chosen.pop("format", None)
    for part, column in chosen.items():
        if column not in columns:
            raise DataError(
                f"there is no column {column!r} for the {part}",
                where=where,
                why=f"the columns are: {', '.join(columns)}",
                hint="name one of them",
            )
    candidates: list[tuple[Kind, dict[str, str]]] = [(known, names) for known, names in _KNOWN if kind in (None, known)]
    if kind in (None, "text"):
        candidates.extend(("text", {"text": name}) for name in _only_text_column(dataset))
    if chosen and kind is not None:
        required, optional = PARTS[kind]
        mixed = {part: part for part in (*required, *optional) if part in columns or part in required} | chosen
        candidates = [(kind, mixed), *((known, names | chosen) for known, names in candidates)]
    for known, names in candidates:
        if all(column in columns for column in names.values()):
            found = _complete(known, names, dataset)
            if found is not None:
                return found
    raise DataError(
        "the data set has no usable columns" + (f" for the format {kind!r}" if kind else ""),
        where=where,
        why=f"found: {', '.join(columns) or 'none'}" + (_PREFERENCE if {"chosen", "rejected"} <= set(columns) else ""),
        hint=f"accepted: {ACCEPTED}; or name the columns (--text_column, --prompt_column, ...)",
    )


def _chosen_kind(chosen: Mapping[str, str]) -> Kind | None:
    kinds = get_args(Kind)
    kind = chosen.get("format")
    if kind is not None and kind not in kinds:
        raise ConfigError(f"unknown format {kind!r}", where="format", hint=f"use one of {', '.join(kinds)}")
    for part in chosen:
        if part == "format":
            continue
        owner = next((k for k, (required, optional) in PARTS.items() if part in (*required, *optional)), None)
        if owner is None:
            raise ConfigError(f"unknown part {part!r}", where="column overrides")
        if kind not in (None, owner):
            raise ConfigError(
                f"a column was named for the {part}, which the format {kind!r} does not have",
                where="column overrides",
                hint=f"{part} belongs to the format {owner!r}",
            )
        kind = owner
    return next((k for k in kinds if k == kind), None)


def _only_text_column(dataset: Dataset) -> list[str]:
    text = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) in _TEXT_DTYPES]
    return text if len(text) == 1 and len(dataset.column_names) == 1 else []


_TEXT_DTYPES = ("string", "large_string")


def _complete(kind: Kind, names: Mapping[str, str], dataset: Dataset) -> Format | None:
    """Add the keys of messages; None when the column does not hold messages."""
    if kind != "messages":
        return Format(kind, dict(names))
    head = dataset.select(range(min(_PEEK, len(dataset))))
    for value in head[names["messages"]]:
        keys = chats.keys_of(value)
        if keys is not None:
            return Format(kind, {**names, "role": keys[0], "content": keys[1]})
    return None


def _string(row: Row, column: str, *, required: bool = True) -> str:
    value = row.get(column)
    if value is None:
        if required:
            raise BadRowError(f"null: {column!r} is empty or not there")
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"wrong type: {column!r} is {type_name(value)}, not text")
    if "\x00" in value:
        raise BadRowError(f"NUL character in {column!r}")
    if required and not value.strip():
        raise BadRowError(f"empty string: {column!r}")
    return value


def _alpaca_row(row: Row, columns: Mapping[str, str]) -> Row:
    optional = columns.get("input")
    return {
        "instruction": _string(row, columns["instruction"]),
        "input": _string(row, optional, required=False) if optional else "",
        "output": _string(row, columns["output"]),
    }


def _messages_row(row: Row, columns: Mapping[str, str]) -> Row:
    messages = chats.normalize(row.get(columns["messages"]), columns["role"], columns["content"])
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})


def _prompt_row(row: Row, columns: Mapping[str, str]) -> Row:
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        keys = chats.keys_of(prompt) or ("role", "content")
        both = chats.normalize([*prompt, *completion], *keys)
        return {"prompt": both[: len(prompt)], "completion": both[len(prompt) :]}
    prompt, completion = _string(row, columns["prompt"]), _string(row, columns["completion"])
    if columns["prompt"] in _BARE_PROMPTS and not prompt[-1].isspace() and not completion[0].isspace():
        prompt += "\n"
    return {"prompt": prompt, "completion": completion}


def _text_row(row: Row, columns: Mapping[str, str]) -> Row:
    return {"text": _string(row, columns["text"])}


_CHECKS: dict[str, Callable[[Row, Mapping[str, str]], Row]] = {
    "alpaca": _alpaca_row,
    "messages": _messages_row,
    "prompt_completion": _prompt_row,
    "text": _text_row,
}


def row_check(format: Format) -> Callable[[Row], Row]:
    """A function that brings one row to the canonical columns and roles, or raises ``BadRowError``."""
    check, columns = _CHECKS[format.kind], format.columns
    return lambda row: check(row, columns)


def from_rows(rows: Iterable[Row], description: str | None = None) -> Dataset:
    """Make a data set of rows a batch at a time, so that only one batch exists as Python objects."""

    def tables() -> Iterator[pa.Table]:
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, _BATCH)):
            names = dict.fromkeys(name for row in batch for name in row)
            yield pa.table({name: pa.array([row.get(name) for row in batch]) for name in names})

    return stored(tables(), description)


def _rows(dataset: Dataset) -> Iterator[Row]:
    for batch in dataset.iter(batch_size=_BATCH):
        names = list(batch)
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values))


def check(
    dataset: Dataset,
    format: Format,
    *,
    rejections: Rejections | None = None,
    origin: Callable[[int], str] | None = None,
    where: str = "data set",
) -> Dataset:
    """Check every row and bring it to the canonical columns and roles; needs no tokenizer.

    Args:
        dataset: The rows.
        format: How to read them, from ``detect``.
        rejections: Collects the bad rows and says how many are tolerated. Default: none is.
        origin: Names the place of a row, given its index.
        where: Name of the data set for messages.

    Returns:
        A data set with each part in the column of its own name, messages with ``role`` and ``content``.

    Raises:
        DataError: more bad rows than tolerated, or none left.
    """
    if rejections is None:
        rejections = Rejections()
        rejections.total = len(dataset)
    if format.kind != "alpaca" and not _BARE_PROMPTS & set(format.columns.values()):
        canonical = checked_by_column(dataset, {part: format.columns[part] for part in PARTS[format.kind][0]}, _BATCH)
        if canonical is not None:
            return canonical
    checked_row = row_check(format)

    def good_rows() -> Iterator[Row]:
        for index, row in enumerate(_rows(dataset)):
            try:
                yield checked_row(row)
            except BadRowError as error:
                rejections.add(origin(index) if origin else f"row {index + 1}", str(error), row)

    try:
        checked = from_rows(good_rows(), "Checking rows")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            "rows mix text prompts and message lists", where=where, why=str(error), hint="keep one kind"
        ) from error
    rejections.check(where)
    if len(checked) == 0:
        raise DataError("no row is left to train on", where=where, why=f"{len(rejections)} rows were rejected")
    return checked


def to_training_rows(dataset: Dataset, format: Format, tokenizer: Any) -> Dataset:
    """Turn rows into what ``SFTTrainer`` takes.

    Args:
        dataset: The rows, as loaded or as ``check`` returned them.
        format: How to read them.
        tokenizer: Tokenizer or processor of the model; its end-of-sequence token ends alpaca and raw text rows.

    Returns:
        A data set with the column ``text``, or ``prompt`` and ``completion``, or ``messages``. Where fields of alpaca
        rows spell control tokens, ``typed_control_tokens`` says where, so that they stay text.

    Raises:
        DataError: a row is bad, or the data needs a chat template and ``tokenizer`` has none.
    """
    return render(check(dataset, format), format.kind, tokenizer)


def render(checked: Dataset, kind: Kind, tokenizer: Any) -> Dataset:
    """Turn rows that ``check`` returned into what ``SFTTrainer`` takes; see ``to_training_rows``."""
    to_text = _renderer(next(iter(checked), {}), kind, tokenizer)
    if to_text is None:
        return checked
    if kind == "alpaca":
        return from_rows(map(to_text, _rows(checked)), "Rendering rows")
    end = tokenizer.eos_token
    tables = cast("Iterator[pa.Table]", checked.with_format("arrow", columns=["text"]).iter(batch_size=_BATCH))
    return stored((pa.table({"text": _ended(table.column("text"), end)}) for table in tables), "Rendering rows")


def render_stream(checked: IterableDataset, kind: Kind, tokenizer: Any) -> IterableDataset:
    """Turn a stream of checked rows into what ``SFTTrainer`` takes; see ``to_training_rows``."""
    to_text = _renderer(next(iter(checked), {}), kind, tokenizer)
    if to_text is None:
        return checked
    # All rows have all columns, since a batch of a stream has those of its first row.
    more = {TYPED: None} if kind == "alpaca" else {}
    required, optional = PARTS[kind]
    return checked.map(lambda row: more | to_text(row), remove_columns=[*required, *optional])


def _renderer(first: Any, kind: Kind, tokenizer: Any) -> Callable[[Row], Row] | None:
    """A function from a row to its text; None where rows are taken as they are."""
    conversational = kind == "messages" or (kind == "prompt_completion" and isinstance(first.get("prompt"), list))
    if conversational and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the data are chats and the tokenizer has no chat template",
            where=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"),
            why="a base model's tokenizer usually has none",
            hint="use the instruct version of the model, set tokenizer.chat_template, or give the rows as prompt and "
            "completion",
        )
    if kind not in ("alpaca", "text"):
        return None
    end = getattr(tokenizer, "eos_token", None)
    if not end:
        raise DataError(
            "the tokenizer has no end-of-sequence token", where="tokenizer.eos_token", hint="set tokenizer.eos_token"
        )
    if kind == "alpaca":
        return functools.partial(_alpaca_text, control=control_of(tokenizer), end=end)
    return lambda row: {"text": row["text"] if row["text"].endswith(end) else row["text"] + end}


def _alpaca_text(row: Row, control: TypedControl, end: str) -> Row:
    """The text of a row, and where its fields spell control tokens."""
    text, places = "", list[int]()
    for part, is_field in (*_alpaca_parts(row["instruction"], row["input"]), (row["output"], True)):
        if is_field:
            found = control.places(part, reply=part is row["output"])
            places += (len(text) + place for span in found for place in span)
        text += part
    return {"text": text if text.endswith(end) else text + end} | ({TYPED: places} if places else {})


def _ended(texts: pa.ChunkedArray, end: str) -> pa.ChunkedArray:
    """``texts``, each with ``end`` at its end."""
    none, missing = (pa.scalar(text, texts.type) for text in ("", end))
    return pc.binary_join_element_wise(texts, pc.if_else(pc.ends_with(texts, end), none, missing), none)

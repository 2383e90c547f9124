"""Whole data sets brought to conversations: from columns of text, and from any spelling to ``role`` and ``content``."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset, IterableDataset, concatenate_datasets

from ..errors import ArgumentError, ConfigError, DataError, UnsupportedError, nearest
from .chats import UnknownRoleError
from .rows import type_name

_COLUMN = "conversations"
_PEEK = 1000


def _keys(dataset: Any) -> tuple[str, str] | None:
    """The keys of role and content; of a message's two keys the role's is the one with fewer distinct values."""
    values: dict[str, set[str]] = {}
    for row in itertools.islice(dataset, _PEEK):
        for message in row[_COLUMN] or ():
            for key, value in message.items():
                if isinstance(value, str):
                    values.setdefault(key, set()).add(value)
    if len(values) < 2:
        return None
    named = next((pair for pair in (("role", "content"), ("from", "value")) if set(pair) <= set(values)), None)
    if named is not None:
        return named
    ordered = sorted(values, key=lambda key: len(values[key]))
    return ordered[0], ordered[-1]


def _roles(aliases: dict[str, Sequence[str]]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for role, names in aliases.items():
        for name in names:
            if roles.setdefault(name, role) != role:
                raise ConfigError(f"the alias {name!r} stands for two roles", hint="name it once")
    return roles


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Bring the column ``conversations`` to lists of ``{"role", "content"}`` with system, user and assistant.

    Args:
        dataset: A ``Dataset`` or ``IterableDataset``. Without a column ``conversations`` it is returned unchanged.
        tokenizer: With a multimodal processor, text contents become lists of one text part.
        aliases_for_system: Names of the system role.
        aliases_for_user: Names of the user role.
        aliases_for_assistant: Names of the assistant role.
        batch_size: Rows handled at a time. Default 1000.
        num_proc: Worker processes for a ``Dataset``. Default: in this process.

    Returns:
        The data set, its other columns untouched.

    Raises:
        UnknownRoleError: a conversation names a role without alias (also a ``TypeError``).
    """
    columns = dataset.column_names
    if not columns or _COLUMN not in columns:
        return dataset
    keys = _keys(dataset)
    if keys is None:
        return dataset
    role_key, content_key = keys
    roles = _roles(
        {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant},
    )
    as_parts = hasattr(tokenizer, "image_processor")

    def message(item: dict[str, Any]) -> dict[str, Any]:
        name = item.get(role_key)
        if name not in roles:
            raise UnknownRoleError(
                f"unknown role {name!r}",
                where=f"column {_COLUMN!r}, key {role_key!r}",
                hint="name it in aliases_for_system, aliases_for_user or aliases_for_assistant",
            )
        content = item.get(content_key)
        if as_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        return {"role": roles[name], "content": content}

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {_COLUMN: [[message(item) for item in chat or ()] for chat in batch[_COLUMN]]}

    options: dict[str, Any] = {"batched": True, "batch_size": batch_size}
    if hasattr(dataset, "num_rows"):
        options |= {"num_proc": num_proc, "desc": "Standardising conversations"}
    # The old struct would be kept by the features otherwise, since the column keeps its name.
    return dataset.map(convert, remove_columns=[_COLUMN], **options)


standardize_data_formats = standardize_sharegpt


def remove_special_tokens(tokenizer: Any, prompt: str) -> str:
    """Return ``prompt`` without a leading beginning-of-sequence token, which the tokenizer adds by itself."""
    start = getattr(tokenizer, "bos_token", None)
    return prompt.removeprefix(start) if start else prompt


_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_BRACKETS = re.compile(r"(\[\[|\]\])")


@dataclass(frozen=True)
class _Part:
    """A stretch of a merged prompt: literal texts and, between each two, the column whose value stands there."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]
    optional: bool

    def fill(self, values: Mapping[str, str | None]) -> str:
        if self.optional and not all(values[column] for column in self.columns):
            return ""
        filled = [text + cast("str", values[column]) for text, column in zip(self.texts, self.columns)]
        return "".join(filled) + self.texts[-1]


def _part(text: str, optional: bool) -> _Part:
    texts, columns, start = [""], [], 0
    for match in _BRACES.finditer(text):
        texts[-1] += text[start : match.start()]
        start = match.end()
        if match[1]:
            columns.append(match[1])
            texts.append("")
        elif len(match[0]) == 2:
            texts[-1] += match[0][0]
        else:
            raise _prompt_error(f"a lone {match[0]!r} in the merged prompt", "write {column}, or {{ and }} for braces")
    texts[-1] += text[start:]
    if optional and not columns:
        raise _prompt_error(f"the optional part {text!r} names no column", "write [[ ... {column} ... ]]")
    return _Part(tuple(texts), tuple(columns), optional)


def _prompt_error(what: str, hint: str) -> ConfigError:
    return ConfigError(what, where="argument merged_prompt", hint=hint)


def _parse_prompt(prompt: str) -> list[_Part]:
    """Split a merged prompt at its ``[[`` and ``]]``."""
    parts: list[_Part] = []
    inside = False
    for piece in _BRACKETS.split(prompt):
        if piece in ("[[", "]]"):
            if inside == (piece == "[["):
                raise _prompt_error(f"a {piece!r} too many in the merged prompt", "pair each [[ with one ]]")
            inside = not inside
        elif piece or inside:
            parts.append(_part(piece, inside))
    if inside:
        raise _prompt_error("a '[[' without its ']]' in the merged prompt", "pair each [[ with one ]]")
    return parts


def _text(value: Any) -> str | None:
    """A cell as text; None where there is nothing, which a NaN of a csv file means too."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        raise ValueError(f"is a {type_name(value)}, not text")
    return str(value)


def _check_columns(named: Iterable[str], columns: Sequence[str], argument: str) -> None:
    for name in named:
        if name not in columns:
            close = nearest(name, columns)
            raise ConfigError(
                f"there is no column {name!r}" + (f" (did you mean {close!r}?)" if close else ""),
                where=f"argument {argument}",
                why=f"the columns are: {', '.join(columns)}",
                hint="name one of them",
            )


def _joined(dataset: Dataset, turns: int, random_state: int) -> Dataset:
    """Join each row's conversation with those of ``turns - 1`` other rows; every row is used ``turns`` times."""
    rows = len(dataset)
    if turns > rows:
        raise ConfigError(
            f"conversation_extension is {turns}, with {rows} rows",
            where="argument conversation_extension",
            why="a chat takes each row once at most",
            hint=f"give {rows} or less",
        )
    # Rows stand in a circle in random order, and each is joined with those at fixed random distances from it.
    generator = random.Random(random_state)  # noqa: S311
    circle = list(range(rows))
    generator.shuffle(circle)
    place = [0] * rows
    for position, row in enumerate(circle):
        place[row] = position
    columns = [dataset]
    for turn, distance in enumerate(generator.sample(range(1, rows), turns - 1), start=1):
        partners = [circle[(place[row] + distance) % rows] for row in range(rows)]
        others: Any = dataset.select_columns([_COLUMN]).rename_column(_COLUMN, f"{_COLUMN} {turn}")
        columns.append(others.select(partners))
    added = [part.column_names[0] for part in columns[1:]]

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {_COLUMN: [list(itertools.chain(*chats)) for chats in zip(*(batch[c] for c in (_COLUMN, *added)))]}

    wide: Any = concatenate_datasets(columns, axis=1)
    return wide.map(join, batched=True, remove_columns=added, desc="Extending conversations")


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Turn columns of text into the column ``conversations``, a list of ``{"from", "value"}`` for each row.

    ``merged_prompt`` is the text of the human's turn, with ``{column}`` where a column's value goes (``{{`` and ``}}``
    for literal braces). A part in ``[[ ]]`` is left out in rows where a column that it names is null or empty.
    ``standardize_sharegpt`` brings the result to ``role`` and ``content``.

    Args:
        dataset: A ``Dataset`` or ``IterableDataset``.
        merged_prompt: How columns become the human's turn. Default: the column ``merged_column_name`` as it is.
        merged_column_name: Column of the human's turn without a ``merged_prompt``; with one, the column that receives
            the merged text where columns are kept. Default ``instruction``.
        output_column_name: Column of the answer. Default ``output``.
        remove_unused_columns: Whether only ``conversations`` stays. Default True.
        conversation_extension: Turns of human and assistant in each chat: every row is followed by this many minus one
            other rows, chosen at random; no chat has a row twice, and each row is used equally often. Default 1.
        random_state: Seed of that choice. Default 3407.

    Returns:
        A data set with as many rows as before.

    Raises:
        ConfigError: an unknown column, a malformed prompt, or an extension below 1 or above the number of rows.
        DataError: a value that has to be there is null, or is a list or an object.
        UnsupportedError: an extension of a streamed data set, which has no random access.
        ArgumentError: ``dataset`` is no data set.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ArgumentError(f"to_sharegpt takes a Dataset, got {type(dataset).__name__}", hint="pass one split")
    if conversation_extension < 1:
        raise ConfigError(f"conversation_extension is {conversation_extension}", hint="give 1 or more")
    if conversation_extension > 1 and not isinstance(dataset, Dataset):
        raise UnsupportedError(
            "conversation_extension joins random rows, and a streamed data set has no random access",
            hint="load the data set without streaming, or leave conversation_extension at 1",
        )
    columns = dataset.column_names or list(next(iter(dataset), {}))
    parts = _parse_prompt(merged_prompt) if merged_prompt else [_Part(("", ""), (merged_column_name,), False)]
    prompt_columns = list(dict.fromkeys(name for part in parts for name in part.columns))
    _check_columns(
        prompt_columns, columns, "argument merged_prompt" if merged_prompt else "argument merged_column_name"
    )
    _check_columns([output_column_name], columns, "argument output_column_name")
    required = {name for part in parts if not part.optional for name in part.columns} | {output_column_name}
    used = [*prompt_columns, *({output_column_name} - set(prompt_columns))]

    def values(batch: Mapping[str, Sequence[Any]], index: int, row: int) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for name in used:
            try:
                found[name] = _text(batch[name][index])
            except ValueError as error:
                raise DataError(f"the column {name!r} {error}", where=f"row {row + 1}") from None
            if found[name] is None and name in required:
                raise DataError(
                    f"the column {name!r} is null",
                    where=f"row {row + 1}",
                    hint="filter such rows out" + ("" if name == output_column_name else ", or put the part in [[ ]]"),
                )
        return found

    def convert(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        prompts: list[str] = []
        chats: list[list[dict[str, str]]] = []
        for index, row in enumerate(rows):
            cells = values(batch, index, row)
            prompts.append("".join(part.fill(cells) for part in parts))
            answer = cast("str", cells[output_column_name])
            chats.append([{"from": "human", "value": prompts[-1]}, {"from": "gpt", "value": answer}])
        merged = {merged_column_name: prompts} if merged_prompt and not remove_unused_columns else {}
        return merged | {_COLUMN: chats}

    replaced = {_COLUMN, merged_column_name} if merged_prompt else {_COLUMN}
    removed = columns if remove_unused_columns else [name for name in columns if name in replaced]
    options: dict[str, Any] = {"desc": "Merging columns"} if isinstance(dataset, Dataset) else {}
    merged = dataset.map(convert, batched=True, with_indices=True, remove_columns=removed, **options)
    if conversation_extension == 1:
        return merged
    return _joined(cast("Dataset", merged), conversation_extension, random_state)

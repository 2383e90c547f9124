"""Conversations of whole data sets brought to ``role`` and ``content``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .chats import UnknownRoleError

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

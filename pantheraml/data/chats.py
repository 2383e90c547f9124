"""Conversations: the roles of data sets brought to the roles of chat templates."""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .rows import type_name

Message = dict[str, Any]

# Spellings of each role in published data sets.
ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "input", "prompter"),
    "assistant": ("assistant", "gpt", "output", "model", "bot", "chatgpt"),
    "tool": ("tool", "function", "observation"),
}
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
KEYS = (("role", "content"), ("from", "value"))


class BadRowError(ValueError):
    """A row that cannot be trained on; the message is the reason."""


class UnknownRoleError(DataError, TypeError):
    """A conversation names a role that is neither system, user nor assistant."""


def role_of(name: Any) -> str | None:
    """The role that ``name`` spells; None for none."""
    return _ROLE_OF.get(name.lower()) if isinstance(name, str) else None


def keys_of(value: Any) -> tuple[str, str] | None:
    """Return the keys of role and content in a list of messages; None when ``value`` is no such list."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    return next((keys for keys in KEYS if set(keys) <= set(value[0])), None)


def _content(value: Any, role: str, *, may_be_empty: bool) -> Any:
    if value is None and may_be_empty:
        return ""
    if value is None:
        raise BadRowError(f"null: the {role} message has no content")
    if not isinstance(value, str | list):
        raise BadRowError(f"wrong type: the content of the {role} message is {type_name(value)}, not text")
    if isinstance(value, str) and "\x00" in value:
        raise BadRowError(f"NUL character in the {role} message")
    if not may_be_empty and not (value.strip() if isinstance(value, str) else value):
        raise BadRowError(f"empty string: the content of the {role} message")
    return value


def normalize(value: Any, role_key: str, content_key: str) -> list[Message]:
    """Bring one conversation to ``role``/``content`` messages with the roles system, user, assistant and tool.

    Other keys of a message (``tool_calls``, ``name``, ...) are kept where they are not null.

    Args:
        value: The conversation, a list of objects.
        role_key: Key that holds the role.
        content_key: Key that holds the text.

    Returns:
        The messages.

    Raises:
        BadRowError: no messages, an unknown role, empty or non-text content, a system message that is not the first,
            two user or two assistant messages in a row, or no assistant message, which leaves nothing to learn.
    """
    if value is None:
        raise BadRowError("null: the conversation is not there")
    if not isinstance(value, list):
        raise BadRowError(f"wrong type: the conversation is {type_name(value)}, not a list of messages")
    if not value:
        raise BadRowError("empty conversation")
    messages: list[Message] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRowError(f"wrong type: message {index + 1} is {type_name(item)}, not an object")
        name = item.get(role_key)
        role = role_of(name)
        if role is None:
            raise BadRowError(f"unknown role: {name!r} in message {index + 1}")
        if role == "system" and index > 0:
            raise BadRowError(f"system message in the middle: message {index + 1}")
        if messages and role in ("user", "assistant") and messages[-1]["role"] == role:
            raise BadRowError(f"two {role} messages in a row: messages {index} and {index + 1}")
        content = _content(item.get(content_key), role, may_be_empty=bool(item.get("tool_calls")) or role == "system")
        extra = {key: kept for key, kept in item.items() if key not in (role_key, content_key) and kept is not None}
        messages.append({**extra, "role": role, "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise BadRowError("no assistant message: nothing to learn")
    return messages

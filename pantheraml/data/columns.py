"""The checks of ``formats`` a column at a time, where that is certain to find what they find row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, Features

from . import chats
from .stored import stored

# Its functions are made as it is imported.
pc: Any = pyarrow.compute

# Where one of these letters stands, Python's str.strip leaves something; the others are looked at one by one.
_VISIBLE = r"[^\pZ\pC]"
_ROLES = tuple(chats.ROLES)
_TOOLS = "tools"


def checked_by_column(dataset: Dataset, columns: Mapping[str, str], batch_size: int) -> Dataset | None:
    """Check texts or conversations, and bring them to canonical columns and roles.

    Args:
        dataset: The rows.
        columns: The column of each part: of ``messages``, or of texts. Each part is one.
        batch_size: Rows that are looked at together.

    Returns:
        What ``formats.check`` makes of them row by row, mostly without a copy; None where it would find a bad row, or
        where that is uncertain.
    """
    source = columns.get("messages")
    names = list(columns.values())
    if source is not None and _TOOLS in dataset.column_names:
        names.append(_TOOLS)
    schema = pa.schema([dataset.data.schema.field(name) for name in names])
    formatted = dataset.format["type"] is not None or dataset.format["columns"] != dataset.column_names
    # Columns that are decoded as they are read may hold anything.
    plain = Features({name: dataset.features[name] for name in names}) == Features.from_arrow_schema(schema)
    if len(dataset) == 0 or formatted or not plain:
        return None
    chosen = cast("Dataset", dataset.select_columns(names))

    def tables() -> Iterator[pa.Table]:
        return cast("Iterator[pa.Table]", chosen.with_format("arrow").iter(batch_size=batch_size))

    if source is None:
        if not all(_are_texts(column) for table in tables() for column in table.columns):
            return None
        return chosen.rename_columns({name: part for part, name in columns.items() if name != part})
    return _chats(chosen, tables, source)


def _are_texts(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether all are texts that are neither empty nor blank nor hold NUL."""
    if not pa.types.is_string(column.type) or column.null_count:
        return False
    visible = pc.all(pc.match_substring_regex(column, _VISIBLE), min_count=0).as_py()
    return visible and not pc.any(pc.match_substring(column, "\x00"), min_count=0).as_py()


@dataclass(frozen=True)
class _Chats:
    """Conversations of a batch in canonical form.

    Attributes:
        messages: Lists of role and content.
        changed: Whether they were something else.
        tools: The tools of each, null for none; None where no conversation has any.
        emptied: Whether some tools were empty and are null now.
    """

    messages: pa.Array
    changed: bool
    tools: pa.Array | None
    emptied: bool


def _chats(dataset: Dataset, tables: Any, source: str) -> Dataset | None:
    changed = emptied = with_tools = False
    for table in tables():
        batch = _batch(table, source)
        if batch is None:
            return None
        changed, emptied = changed or batch.changed, emptied or batch.emptied
        with_tools = with_tools or batch.tools is not None
    if not changed and not (with_tools and emptied):
        kept = cast("Dataset", dataset if with_tools else dataset.select_columns([source]))
        return kept if source == "messages" else kept.rename_column(source, "messages")

    def canonical() -> Iterator[pa.Table]:
        for table in tables():
            batch = _batch(table, source)
            assert batch is not None
            # A table without tools gets nulls beside those with some.
            tools = {} if batch.tools is None else {_TOOLS: batch.tools}
            yield pa.table({"messages": batch.messages, **tools})

    return stored(canonical(), "Checking rows")


def _batch(table: pa.Table, source: str) -> _Chats | None:
    column = _whole(table.column(source))
    if not (pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)) or column.null_count:
        return None
    fields = [field.name for field in column.type.value_type]
    keys = next((keys for keys in chats.KEYS if set(keys) == set(fields)), None)
    sizes = np.diff(column.offsets.to_numpy())
    messages = column.flatten()
    if keys is None or messages.null_count:
        return None
    names, contents = (messages.flatten()[fields.index(key)] for key in keys)
    if not sizes.all() or names.null_count or not pa.types.is_string(names.type) or not _are_texts(contents):
        return None
    encoded = names.dictionary_encode()
    spellings = encoded.dictionary.to_pylist()
    known = {role: index for index, role in enumerate(_ROLES)}
    codes = np.array([known.get(chats.role_of(spelling) or "", -1) for spelling in spellings])
    roles = codes[encoded.indices.to_numpy()]
    if not _are_in_order(roles, sizes):
        return None
    changed = fields != ["role", "content"] or any(spelling not in known for spelling in spellings)
    if changed:
        written = pa.array(_ROLES).take(pa.array(roles))
        structs = pa.StructArray.from_arrays([written, contents], ["role", "content"])
        offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), structs)
    if _TOOLS not in table.column_names:
        return _Chats(column, changed, None, False)
    tools = _whole(table.column(_TOOLS))
    if pa.types.is_string(tools.type):
        empty = pc.equal(tools, "")
    elif pa.types.is_list(tools.type):
        empty = pc.equal(pc.list_value_length(tools), 0)
    elif tools.null_count == len(tools):
        return _Chats(column, changed, None, False)
    else:
        return None
    empty = empty.fill_null(False)
    emptied = pc.any(empty, min_count=0).as_py()
    tools = pc.if_else(empty, pa.scalar(None, tools.type), tools) if emptied else tools
    return _Chats(column, changed, tools if tools.null_count < len(tools) else None, emptied)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _are_in_order(roles: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether ``chats.normalize`` accepts conversations of ``sizes`` messages, given the number of each one's role."""
    user, assistant, system = (_ROLES.index(role) for role in ("user", "assistant", "system"))
    starts = np.cumsum(sizes) - sizes
    first = np.zeros(len(roles), bool)
    first[starts] = True
    twice = (roles[1:] == roles[:-1]) & ~first[1:] & np.isin(roles[1:], (user, assistant))
    late_system = (roles == system) & ~first
    replies = np.add.reduceat(roles == assistant, starts)
    return bool((roles >= 0).all() and not twice.any() and not late_system.any() and replies.all())

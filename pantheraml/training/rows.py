"""What TRL is given to train on: rows it can use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import psutil
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling

from .. import log
from .._compat.trl import explicit_names
from ..data.responses import with_labels
from ..errors import DataError

IGNORED = -100
SAMPLED_ROWS = 100
MOSTLY_MASKED = 0.9
# Starting workers takes seconds, which is what this many rows take to tokenise in one process.
ROWS_WORTH_WORKERS = 20_000
MAX_WORKERS = 8
WORKER_BYTES = 1024**3
# Two sizes, because a function of one row may return two texts for anything.
_PROBED = (2, 3)

_CHATS = ("messages", "conversations", "prompt", "completion")
# Columns of which all together make rows that TRL can train on. The text column's name is the user's.
_USABLE = ({"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"})


class NoColumnError(DataError, RuntimeError):
    """No column of a data set can be trained on."""


def prepare(
    dataset: Any,
    args: Any,
    formatting_func: Callable[..., Any] | None,
    *,
    name: str,
    only_if_needed: bool = False,
) -> Any:
    """Return ``dataset`` with a column that can be trained on.

    Args:
        dataset: A ``datasets`` data set, a dict of them, or None.
        args: The SFT config: ``dataset_text_field`` and ``dataset_num_proc`` are read.
        formatting_func: The user's function from a row to a text, from a row to a list of texts, or from a batch of
            rows to as many texts; None when the rows have their text.
        name: What messages call the data set.
        only_if_needed: Whether to leave rows unformatted that TRL can use as they are, default False.

    Returns:
        The data set, or the dict of them.

    Raises:
        DataError: no rows, or a formatting function that returns no text.
        NoColumnError: no usable column.
    """
    if isinstance(dataset, dict):
        return {
            key: prepare(part, args, formatting_func, name=key, only_if_needed=only_if_needed)
            for key, part in dataset.items()
        }
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    first: Any = next(iter(dataset), None)
    if first is None:
        raise DataError(f"the {name} data set has no rows", where=f"{name}_dataset")
    if "image" in first or "images" in first or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return dataset
    workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    if formatting_func is not None and "input_ids" not in first and not (only_if_needed and is_usable(first, args)):
        dataset = _formatted(dataset, formatting_func, args.dataset_text_field, workers)
        first = dict(next(iter(dataset)))
    dataset = _texts_alone(dataset, first, args)
    if not is_usable(first, args):
        raise NoColumnError(
            f"the {name} data set has no column to train on",
            where=f"{name}_dataset",
            why=f"its columns are {', '.join(map(repr, first))}",
            hint="name the text column with dataset_text_field, pass formatting_func, or provide 'messages' or "
            "'prompt' and 'completion'",
        )
    return dataset


def is_usable(row: Mapping[str, Any], args: Any) -> bool:
    """Whether a row has columns that TRL can train on."""
    return any(needed <= row.keys() for needed in (*_USABLE, {args.dataset_text_field}))


def _texts_alone(dataset: Any, row: Mapping[str, Any], args: Any) -> Any:
    """Leave out the columns that would be trained on instead of texts that the caller means.

    A text beside ``conversations`` has been made of them, and a text column that the caller names is meant, unless an
    option asks for what only the other columns tell.
    """
    field = args.dataset_text_field
    others = [name for name in _CHATS if name in row and name != field]
    if not others or "input_ids" in row or not isinstance(row.get(field), str):
        return dataset
    if getattr(args, "assistant_only_loss", False) or getattr(args, "completion_only_loss", None):
        return dataset
    if others != ["conversations"] and "dataset_text_field" not in explicit_names(args):
        return dataset
    log.info(f"column {field!r} is trained on, not {' and '.join(map(repr, others))} beside it")
    return dataset.remove_columns(others)


def workers_for(dataset: Any) -> int | None:
    """How many processes tokenise ``dataset``: at most 8 and 1 GiB each of half the free memory; None for this one."""
    if not isinstance(dataset, Dataset) or len(dataset) < ROWS_WORTH_WORKERS:
        return None
    affordable = psutil.virtual_memory().available // 2 // WORKER_BYTES
    count = min(MAX_WORKERS, processors(), affordable)
    return count if count > 1 else None


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _formatted(
    dataset: Dataset | IterableDataset, function: Callable[..., Any], field: str, workers: dict[str, Any]
) -> Any:
    columns = list(next(iter(dataset)))
    rows: list[Any] = list(dataset.take(_PROBED[-1]))
    cycled = rows * _PROBED[-1]
    # A function of one row may return as many strings as it gets rows: slices of a list, or one text whatever it gets.
    # So what it makes of one row comes first.
    if isinstance(_tried(function, rows[0]), str):
        return dataset.map(lambda row: {field: function(row)}, remove_columns=columns, **workers)
    if all(_is_batched(function, {column: [row[column] for row in cycled[:n]] for column in columns}) for n in _PROBED):

        def formatted(several: Mapping[str, list[Any]]) -> dict[str, list[str]]:
            texts, count = list(function(several)), len(next(iter(several.values())))
            if len(texts) != count:
                raise DataError(
                    f"formatting_func returns {len(texts)} texts for {count} rows",
                    where="argument formatting_func",
                    hint="return one string for each row of a batch, and leave rows out with dataset.filter before",
                )
            return {field: texts}

        return dataset.map(formatted, batched=True, remove_columns=columns, **workers)
    texts = function(rows[0])
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):

        def exploded(several: Mapping[str, list[Any]]) -> dict[str, list[str]]:
            split = [dict(zip(several, values)) for values in zip(*several.values())]
            return {field: [text for row in split for text in function(row)]}

        return dataset.map(exploded, batched=True, remove_columns=columns, **workers)
    raise DataError(
        "formatting_func returns no text",
        where="argument formatting_func",
        why=f"for the first row it returned {type(texts).__name__}",
        hint="return a string for one row, or a list of strings",
    )


def _tried(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What ``function`` returns; None where it stumbles, as one of a row may over lists, and the other way round."""
    try:
        return function(given)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        return None


def _is_batched(function: Callable[..., Any], batch: Mapping[str, list[Any]]) -> bool:
    """Whether ``function`` takes this batch: it returns a text for each row."""
    texts = _tried(function, batch)
    count = len(next(iter(batch.values())))
    return isinstance(texts, list) and len(texts) == count and all(isinstance(text, str) for text in texts)


def keep_labels(trainer: Any) -> None:
    """Replace a collator of transformers that makes labels of the token ids, where rows have labels of their own."""
    collator, dataset = getattr(trainer, "data_collator", None), trainer.train_dataset
    if type(collator) is not DataCollatorForLanguageModeling or collator.mlm or dataset is None:
        return
    columns = dataset.column_names if isinstance(dataset, Dataset) else next(iter(dataset), {})
    if "labels" in columns:
        trainer.data_collator = with_labels(collator, trainer.processing_class)


def check_labels(dataset: Any) -> None:
    """Look at a hundred rows of a tokenised data set and see that there is something to learn.

    Raises:
        DataError: no row is left, or every label is masked.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return
    hint = "max_length may cut off what is trained on, or the markers of the response may not occur in the texts"
    if not len(dataset):
        raise DataError("no row is left that has a label to train on", where="train_dataset", hint=hint)
    step = -(-len(dataset) // SAMPLED_ROWS)
    sample = dataset.select_columns(["labels"])[::step]["labels"]
    masked = sum(all(label == IGNORED for label in labels) for labels in sample) / len(sample)
    if masked == 1:
        raise DataError(
            "every label is masked, so there is nothing to learn",
            where="train_dataset",
            why=f"all labels are {IGNORED} in {len(sample)} rows looked at",
            hint=hint,
        )
    if masked >= MOSTLY_MASKED:
        log.warning(f"{masked:.0%} of {len(sample)} rows looked at have no label to train on: {hint}")

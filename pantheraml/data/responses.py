"""A trainer's data sets with labels on the replies only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding

from .. import log
from ..errors import ConfigError, DataError
from .masking import IGNORED, ResponseMasker, masked_before, response_masker
from .pieces import text_part
from .replies import assistant_masks

# Rows of a stream that are looked at before training: reading more would delay it.
_PEEK = 100
_SHOWN = 400
_BATCH = 1000
_COLLATED = 2
# Collators of transformers that make labels of the token ids, or cannot pad them.
_WITHOUT_LABELS = (DataCollatorForLanguageModeling, DataCollatorWithPadding)


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    r"""Train on what the assistant writes, and on nothing else.

    The trainer's data sets get ``labels`` that are -100 outside replies. A reply includes the token that ends it. Rows
    without any label left are dropped and counted. Works on ``train_dataset`` and ``eval_dataset`` (a data set or a
    dict of them), map-style and streaming, truncated, packed and tokenised beforehand; a data set that is tokenised by
    the collator gets its labels there.

    Args:
        trainer: A constructed trainer, such as TRL's ``SFTTrainer``. May be None with ``return_function``.
        instruction_part: Text before each user message, such as ``"<|im_start|>user\n"``. Default None: found from the
            chat template, together with ``response_part``.
        response_part: Text before each assistant message, such as ``"<|im_start|>assistant\n"``.
        force_match: Whether given markers match with the spaces and newlines at their ends only. Default True.
        tokenizer: Tokenizer or processor of the rows. Default: the trainer's.
        return_function: Whether to return the function from a batch (``input_ids`` as lists) to its ``labels``, and to
            leave the trainer alone. Default False.
        num_proc: Worker processes for map-style data sets. Default None: this process, which masks some ten thousand
            short rows a second.
        last_response_only: Whether only the last reply of each conversation is trained. Default False.

    Returns:
        The trainer, or the function.

    Raises:
        ConfigError: one marker is given without the other, none can be found, there is no tokenizer, or the trainer's
            collator does not keep labels. Also a ``ValueError``.
        DataError: no row of a data set has a label left. Also a ``ValueError``.
    """
    tokenizer = tokenizer or getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("there is no tokenizer", where="argument tokenizer", hint="pass tokenizer=")
    masker = response_masker(
        tokenizer, instruction_part, response_part, force_match=force_match, last_response_only=last_response_only
    )
    if return_function:
        return masker.batch
    label = Labeller(masker, tokenizer if response_part is None else None)
    found: dict[str, Any] = {}
    told: list[str] = []
    collated = False
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if dataset is None:
            continue
        parts = dataset if isinstance(dataset, dict) else {name.removesuffix("_dataset"): dataset}
        masked = {}
        for key, part in parts.items():
            where = f"{name}[{key!r}]" if isinstance(dataset, dict) else name
            first = next(iter(part), None)
            if first is None:
                raise DataError("there is no row to train on", where=where)
            if "input_ids" not in first:
                collated, masked[key] = True, part
                continue
            with _main_process_first(trainer):
                masked[key], count, message = _labelled(part, label, num_proc)
            if masked[key] is None:
                raise _nothing_left(first, count, masker, tokenizer, where)
            told.append(f"{key}: {message}")
        found[name] = masked if isinstance(dataset, dict) else next(iter(masked.values()))
    for name, dataset in found.items():
        setattr(trainer, name, dataset)
    if collated:
        trainer.data_collator = ResponseCollator(trainer.data_collator, masker)
        told.append("labels are masked as batches are made")
    else:
        _keep_labels(trainer, tokenizer)
    log.info(f"labels on replies after {masker.markers.response!r} only ({'; '.join(told)})")
    return trainer


def _main_process_first(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """The other ranks then find the rows in the cache that the first one wrote."""
    first = getattr(trainer.args, "main_process_first", None)
    return first(desc="masking of all but the replies") if first else contextlib.nullcontext()


def _labelled(dataset: Any, label: Labeller, num_proc: int | None) -> tuple[Any, int, str]:
    """The data set with its labels and without the rows that have none, how many rows, and what to tell about it.

    The data set is None when no row is left.
    """
    if not isinstance(dataset, Dataset):
        labelled = dataset.map(label)
        rows = list(labelled.take(_PEEK))
        empty = sum(not has_label(row) for row in rows)
        message = f"{empty} of the first {len(rows)} rows have no reply left" if empty else "a stream"
        kept = labelled.filter(has_label) if empty < len(rows) else None
        return kept, len(rows), f"{message}, rows without are dropped as they come"
    kept = _mapped(dataset, label, num_proc)
    total, dropped = len(dataset), len(dataset) - len(kept)
    if not dropped:
        return kept, total, f"{total:,} rows"
    message = f"{total:,} rows, of which {dropped:,} without a reply (cut off, or not marked) are dropped"
    return kept if len(kept) else None, total, message


def _mapped(dataset: Dataset, label: Labeller, num_proc: int | None) -> Dataset:
    """The data set with ``label``'s columns, in the format that it has."""
    sample = label.table(cast("pa.Table", dataset.with_format("arrow")[:1]), drop=False)
    features = dataset.features.copy()
    features["labels"] = Features.from_arrow_schema(sample.schema.remove_metadata())["labels"]
    mapped = dataset.with_format("arrow").map(
        label.table,
        batched=True,
        batch_size=_BATCH,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=features,
        desc="Masking all but the replies",
    )
    format = dataset.format
    chosen = [*dict.fromkeys([*format["columns"], "labels"])]
    return cast("Dataset", mapped).with_format(
        format["type"],
        columns=None if len(chosen) == len(mapped.column_names) else chosen,
        output_all_columns=format["output_all_columns"],
        **format["format_kwargs"],
    )


@dataclass(frozen=True)
class Labeller:
    """Labels of rows by their token ids, and by their messages where one of them spells a marker.

    Attributes:
        masker: Finds replies in token ids.
        tokenizer: Tokenizer or processor with the chat template; None where messages are not to be looked at.
    """

    masker: ResponseMasker
    tokenizer: Any

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the labels of a tokenised row, in a dict for ``Dataset.map``."""
        chat = row.get("messages")
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            chat = [*row["prompt"], *row["completion"]]
        if self.tokenizer is None or not isinstance(chat, list) or row.get("seq_lengths") is not None:
            return self.masker(row)
        if not any(text in str(message.get("content")) for text in self._markers() for message in chat):
            return self.masker(row)
        tools = row.get("tools")
        options: dict[str, Any] = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        for parse in (False, True):
            try:
                ids, labels = assistant_masks(chat, self.tokenizer, parse_control_tokens=parse, **options)
            except DataError:
                break
            count = len(row["input_ids"])
            for part in (slice(count), slice(-count, None)):  # cut off at the end, or at the start
                if ids[part] == row["input_ids"]:
                    kept = _last_reply(labels[part]) if self.masker.last_response_only else labels[part]
                    return {"labels": masked_before(kept, row)}
        log.once("a message spells what the chat template writes around replies: what follows it may be trained as one")
        return self.masker(row)

    def table(self, table: pa.Table, *, drop: bool = True) -> pa.Table:
        """A table of rows with their ``labels``.

        Args:
            table: Rows with ``input_ids``.
            drop: Whether rows without a label are left out. Default True.
        """
        column = table.column("input_ids").combine_chunks()
        sizes = column.value_lengths().to_numpy(zero_copy_only=False)
        offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        ids = _flat(table, "input_ids")
        bounds = offsets
        if "seq_lengths" in table.column_names:
            # A packed row holds documents of these lengths.
            bounds = np.concatenate(([0], np.cumsum(_flat(table, "seq_lengths"))))
        labels = self.masker.flat_labels(ids, bounds.tolist())
        for name, ignored in (("labels", IGNORED), ("attention_mask", 0)):
            if name in table.column_names:
                other = _flat(table, name)
                if len(other) == len(labels):
                    labels[other == ignored] = IGNORED
        for index in self._spelling(table):
            row = {name: table.column(name)[index].as_py() for name in table.column_names}
            labels[offsets[index] : offsets[index + 1]] = self(row)["labels"]
        values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels))
        where = table.schema.get_field_index("labels")
        table = table.append_column("labels", values) if where < 0 else table.set_column(where, "labels", values)
        if not drop:
            return table
        count = np.concatenate(([0], np.cumsum(labels != IGNORED)))
        has_label = count[offsets[1:]] > count[offsets[:-1]]
        return table if has_label.all() else table.filter(pa.array(has_label))

    def _markers(self) -> list[str]:
        markers = self.masker.markers
        return [text.strip() for text in (markers.response, *markers.ends)]

    def _spelling(self, table: pa.Table) -> list[int]:
        """The rows of which a message spells a marker, or may."""
        if self.tokenizer is None or "seq_lengths" in table.column_names:
            return []
        found: set[int] = set()
        for name in {"messages", "prompt", "completion"} & set(table.column_names):
            column = table.column(name).combine_chunks()
            message = getattr(column.type, "value_type", None)
            if not isinstance(message, pa.StructType) or message.get_field_index("content") < 0:
                continue
            contents = column.flatten().field("content")
            if not (pa.types.is_string(contents.type) or pa.types.is_large_string(contents.type)):
                return list(range(table.num_rows))
            spells = np.zeros(len(contents), bool)
            for text in self._markers():
                matches = pc.call_function("match_substring", [contents], pc.MatchSubstringOptions(text))
                spells |= matches.fill_null(False).to_numpy(zero_copy_only=False)
            found.update(column.value_parent_indices().filter(pa.array(spells)).to_pylist())
        return sorted(found)


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """The values of a column of lists, one list after the other. They may be those of the table: not to be written."""
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _last_reply(labels: list[int]) -> list[int]:
    """``labels`` with all but the last run of trained tokens masked."""
    end = max((position + 1 for position, label in enumerate(labels) if label != IGNORED), default=0)
    start = max((position + 1 for position in range(end) if labels[position] == IGNORED), default=0)
    return [IGNORED] * start + labels[start:end] + [IGNORED] * (len(labels) - end)


def has_label(row: Mapping[str, Any]) -> bool:
    """Whether a token of a labelled row is trained."""
    return any(label != IGNORED for label in row["labels"])


def _nothing_left(row: Mapping[str, Any], count: int, masker: ResponseMasker, tokenizer: Any, where: str) -> DataError:
    ids = list(row["input_ids"])
    text = text_part(tokenizer).decode(ids)
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
    response = masker.markers.response
    if masker.has_response(ids):
        why = f"{response!r} is in the first row, but no label of a reply is left after it: the row was cut off there, "
        why += "or its labels were masked before"
    else:
        why = (
            f"{response!r} is not in the first row: the row was cut off before a reply, or replies are marked otherwise"
        )
    return DataError(
        f"no row has a label left: all {count:,} rows are without a reply to train on",
        where=where,
        why=f"{why}. The first row ({len(ids)} tokens) reads:\n{shown!r}",
        hint="raise max_length (or max_seq_length) if rows were cut off, or pass instruction_part and response_part as "
        "the texts before user messages and before assistant messages in it",
    )


@dataclass
class ResponseCollator:
    """A collator whose labels are masked outside replies, for rows that are tokenised as batches are made.

    Attributes:
        collator: The collator that makes ``input_ids`` and ``labels``, both [B, T].
        masker: Finds the replies.
    """

    collator: Callable[[list[Any]], Any]
    masker: ResponseMasker

    def __call__(self, features: list[Any]) -> Any:
        """Make a batch and mask its labels."""
        batch = self.collator(features)
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            wanted = self.masker.labels(ids.tolist())
            outside = [position for position, label in enumerate(wanted) if label == IGNORED]
            labels[outside] = IGNORED
        return batch


def with_labels(collator: Any, tokenizer: Any) -> DataCollatorForSeq2Seq:
    """A collator that keeps labels, in place of one that makes them of the token ids."""
    log.info(f"{type(collator).__name__} makes its own labels: DataCollatorForSeq2Seq takes its place")
    return DataCollatorForSeq2Seq(
        text_part(tokenizer), pad_to_multiple_of=collator.pad_to_multiple_of, label_pad_token_id=IGNORED
    )


def _keep_labels(trainer: Any, tokenizer: Any) -> None:
    """See that the trainer's collator gives the model the labels of the rows, and replace one that would not."""
    dataset, collator = getattr(trainer, "train_dataset", None), getattr(trainer, "data_collator", None)
    if dataset is None or collator is None:
        return
    if isinstance(collator, _WITHOUT_LABELS) and not getattr(collator, "mlm", False):
        trainer.data_collator = with_labels(collator, tokenizer)
        return
    rows = [dict(row) for _, row in zip(range(_COLLATED), dataset)]
    if getattr(trainer.args, "remove_unused_columns", False) and hasattr(trainer, "_set_signature_columns_if_needed"):
        trainer._set_signature_columns_if_needed()
    signature = getattr(trainer, "_signature_columns", None)
    given = [{name: row[name] for name in row if not signature or name in signature} for row in rows]
    trained = sum(_count(row["labels"]) for row in rows)
    labels = collator(given).get("labels")
    found = -1 if labels is None else int((labels != IGNORED).sum())
    # A collator that joins documents masks the first label of each, which is of no use to any loss.
    starts = sum(len(row.get("seq_lengths") or [0]) for row in rows)
    if not trained - starts <= found <= trained:
        raise ConfigError(
            f"the trainer's {type(collator).__name__} does not keep the labels of the rows",
            where="argument data_collator",
            why=f"of two rows with {trained} labels it made a batch with {max(found, 0)}",
            hint="leave data_collator out, or use transformers.DataCollatorForSeq2Seq",
        )


def _count(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)

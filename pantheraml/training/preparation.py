"""How the rows of an ``SFTTrainer`` become token ids and labels: in one pass over batches instead of TRL's row by row.

Of this instance only, ``_prepare_dataset`` is replaced; TRL calls it in its constructor and in ``evaluate``. What is
not described here is left to TRL's own: data that need a processor, masks by generation tags, rows that have token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .. import log
from ..data.encoding import Encoder
from ..data.prepare import Counts, Cut, prepare, prepare_stream
from ..errors import DataError

# A key of ``SFTConfig.dataset_kwargs``: whether control tokens that people typed are read as such.
PARSE_CONTROL = "parse_control_tokens"
_PARAMETERS = ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")


def install(trainer: Any) -> None:
    """Give a trainer that is about to be constructed this preparation, where it would have that of ``SFTTrainer``."""
    from trl import SFTTrainer

    original = getattr(SFTTrainer, "_prepare_dataset", None)
    if original is None or getattr(type(trainer), "_prepare_dataset", None) is not original:
        return
    if tuple(inspect.signature(original).parameters)[1:] != _PARAMETERS:
        return

    def prepare_dataset(
        dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if formatting_func is not None or not _is_ours(trainer, dataset, processing_class, args):
            return original(trainer, dataset, processing_class, args, packing, formatting_func, dataset_name)
        encoder = Encoder(
            processing_class,
            text_column=args.dataset_text_field,
            completion_only=bool(trainer.completion_only_loss),
            parse_control=(args.dataset_kwargs or {}).get(PARSE_CONTROL),
            chat_template=getattr(trainer, "chat_template", None),
        )
        return _prepared(dataset, encoder, args, packing, dataset_name)

    vars(trainer)["_prepare_dataset"] = prepare_dataset


def _is_ours(trainer: Any, dataset: Any, processing_class: Any, args: Any) -> bool:
    """Whether the rows are of a kind that is prepared here."""
    if not isinstance(dataset, Dataset | IterableDataset) or not isinstance(processing_class, PreTrainedTokenizerBase):
        return False
    if args.assistant_only_loss or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return False
    if args.max_length is not None and args.truncation_mode not in ("keep_start", "keep_end"):
        return False
    first: Any = next(iter(dataset), None)
    if first is None or {"input_ids", "labels"} & first.keys():
        return False
    kinds = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {args.dataset_text_field})
    return any(needed <= first.keys() for needed in kinds)


def _prepared(dataset: Any, encoder: Encoder, args: Any, packing: bool, name: str) -> Any:
    from trl.data_utils import maybe_convert_to_chatml, pack_dataset

    is_stored = isinstance(dataset, Dataset)
    passes: dict[str, Any] = {"num_proc": args.dataset_num_proc} if is_stored else {}
    dataset = _with_messages(dataset, maybe_convert_to_chatml, passes)
    # Packing cuts rows by itself, and joins those without a trained token with others.
    cut = Cut(drop=False) if packing else Cut(args.max_length, args.truncation_mode)
    if is_stored:
        description = f"Tokenizing {name} dataset"
        dataset, counts = prepare(dataset, encoder, cut, workers=args.dataset_num_proc, description=description)
        _tell(counts, name)
    else:
        dataset = prepare_stream(dataset, encoder, cut)
        if next(iter(dataset), None) is None:
            raise DataError(
                "no row of the stream has a token to train",
                where=f"{name}_dataset",
                why="what is trained of each row is cut off, or there is no row",
                hint="raise max_length (or max_seq_length)",
            )
    if packing:
        documents: Any = dataset.select_columns(["input_ids", "labels"])
        if args.shuffle_dataset:
            documents = documents.shuffle(seed=args.seed)
        dataset = pack_dataset(documents, args.max_length, args.packing_strategy, passes)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _with_messages(dataset: Any, convert: Callable[..., Any], passes: dict[str, Any]) -> Any:
    """Conversations in the ShareGPT form as messages, as TRL brings them there."""
    from trl.data_utils import is_conversational_from_value

    first = next(iter(dataset))
    if not ("conversations" in first or is_conversational_from_value(first)):
        return dataset
    return dataset.map(convert, remove_columns="conversations" if "conversations" in first else None, **passes)


def _tell(counts: Counts, name: str) -> None:
    if counts.dropped:
        log.info(
            f"{name}: {counts.dropped:,} of {counts.rows:,} rows have no token to train and are dropped"
            + (f"; {counts.cut:,} were cut" if counts.cut else "")
        )
    if counts.typed:
        log.info(
            f"{name}: {counts.typed:,} of {counts.rows:,} rows spell control tokens (the first is row {counts.first} "
            f"with {counts.token!r}). They stay text; dataset_kwargs={{{PARSE_CONTROL!r}: True}} has them read as "
            "tokens"
        )

"""The rows that the one-shot fine-tune trains on: read, checked, mixed, and seen to teach something."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from .. import env, log
from ..data import formats, raw_text, sources
from ..data.encoding import Encoder
from ..data.formats import Kind
from ..data.masking import response_masker
from ..data.mixture import mix
from ..data.prepare import Cut, prepare_stream
from ..data.responses import Labeller, has_label
from ..data.rows import Rejections
from ..data.sources import Loaded
from ..data.streams import Stream, open_stream
from ..errors import ConfigError, DataError
from .output import Output

_COLUMN_PARTS = ("text", "prompt", "completion", "messages", "instruction", "input", "output")
_REJECTED_FILE = "rejected.jsonl"


@dataclass
class Rows:
    """Checked rows that still need the tokenizer."""

    dataset: Dataset | IterableDataset
    kind: Kind
    documents: bool
    description: str


def _read(args: argparse.Namespace, spec: str, split: str, output: Output) -> tuple[Loaded | Stream, Rows]:
    open_source = open_stream if args.streaming else sources.load
    source = open_source(
        spec,
        split=split,
        config=args.dataset_config,
        max_bad_fraction=args.max_bad_fraction,
        token=args.hub_token,
    )
    overrides = {part: getattr(args, f"{part}_column") for part in _COLUMN_PARTS}
    overrides["format"] = None if args.format == "auto" else args.format
    known = source.head() if isinstance(source, Stream) else source.dataset
    format = formats.detect(known, overrides=overrides, where=spec)
    if isinstance(source, Stream):
        checked: Dataset | IterableDataset = source.checked(format)
    else:
        checked = formats.check(known, format, rejections=source.rejections, origin=source.origin, where=spec)
    output.say(f"Data: {source.description}")
    output.say(f"Columns: {', '.join(known.column_names)}")
    output.say(f"Format: {format}")
    documents = isinstance(source, Loaded) and source.documents
    return source, Rows(checked, format.kind, documents, source.description)


def weights(args: argparse.Namespace) -> list[float]:
    """The shares of --dataset and of each --mix."""
    weights = [1.0]
    for name, text in args.mix or []:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of --mix {name} is {text!r}", hint="write a number above 0 behind the data set"
            )
        weights.append(weight)
    return weights


def training_rows(args: argparse.Namespace, output: Output) -> tuple[list[Rows], list[Stream]]:
    """The rows of each data set that is trained on; bad ones that are tolerated go to ``rejected.jsonl``."""
    if args.raw_text_file:
        return [_raw_text(args, output)], []
    read, parts = zip(*(_read(args, name, args.train_split, output) for name in _names(args)), strict=True)
    kinds = dict.fromkeys(rows.kind for rows in parts)
    path = Path(args.output_dir) / _REJECTED_FILE
    streams = [source for source in read if isinstance(source, Stream)]
    rejected = Rejections(args.max_bad_fraction)
    for source in read:
        if isinstance(source, Loaded):
            rejected.extend(source.rejections)
    if env.rank() == 0:
        if streams:
            path.unlink(missing_ok=True)
        for stream in streams:
            stream.write_rejected(path)
        if len(rejected):
            rejected.write(path)
            output.say(f"Dropped {len(rejected)} of {rejected.total} rows, see {path}")
    count = None if streams else sum(len(rows.dataset) for rows in parts if isinstance(rows.dataset, Dataset))
    output.note(rows=count, rejected=len(rejected), format=", ".join(kinds))
    return list(parts), streams


def tell_rejected(args: argparse.Namespace, streams: list[Stream], output: Output) -> None:
    """Say how many rows of streams were bad."""
    count = sum(stream.rejected for stream in streams)
    output.note(rejected=count)
    if count:
        output.say(f"Dropped {count} rows, see {Path(args.output_dir) / _REJECTED_FILE}")


def mixed_rows(parts: list[Any], weights: list[float], args: argparse.Namespace) -> Dataset | IterableDataset:
    """One data set of several, by their weights."""
    if len(parts) == 1:
        return parts[0]
    mixed = mix(parts, weights, seed=args.seed, stop=args.mix_stop)
    shares = ", ".join(f"{weight / sum(weights):.0%} of {name}" for weight, name in zip(weights, _names(args)))
    log.info(f"{'' if args.streaming else f'{len(mixed):,} '}rows are drawn: {shares}")
    return mixed


def _names(args: argparse.Namespace) -> list[str]:
    return [args.dataset, *(name for name, _ in args.mix or [])]


def _raw_text(args: argparse.Namespace, output: Output) -> Rows:
    loaded = sources.load_text(args.raw_text_file)
    output.say(f"Data: {loaded.description}")
    output.note(rows=len(loaded.dataset), rejected=0, format="text")
    return Rows(loaded.dataset, "text", True, loaded.description)


def eval_rows(args: argparse.Namespace, output: Output) -> Rows | None:
    """The rows whose loss is measured; None where none were asked for."""
    if not args.eval_dataset and not args.eval_split:
        return None
    return _read(args, args.eval_dataset or args.dataset, args.eval_split or "test", output)[1]


def finished(
    rows: Rows, tokenizer: Any, args: argparse.Namespace, max_seq_length: int, output: Output
) -> Dataset | IterableDataset:
    """What the trainer takes: texts with their ends, chats, or chunks of running text."""
    if isinstance(rows.dataset, IterableDataset):
        stream = formats.render_stream(rows.dataset, rows.kind, tokenizer)
        return stream.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer) if args.shuffle_buffer else stream
    if not rows.documents:
        return formats.render(rows.dataset, rows.kind, tokenizer)
    size, stride = args.chunk_size, args.stride
    if size > max_seq_length:
        if "chunk_size" in args.explicit:
            raise ConfigError(
                f"--chunk_size {size} is more than the longest sequence, {max_seq_length}",
                hint=f"give --chunk_size {max_seq_length}, or a larger --max_seq_length",
            )
        size = max_seq_length
        stride = stride if "stride" in args.explicit else min(stride, size // 4)
    chunks = raw_text.chunk_documents(rows.dataset["text"], tokenizer, chunk_size=size, stride=stride)
    output.say(f"Running text: {len(chunks)} chunks of up to {size} tokens, {stride} shared by neighbours")
    return chunks


def wants_replies(args: argparse.Namespace, dataset: Dataset | IterableDataset) -> bool:
    """Whether replies are still to be found; of a prompt with completion only the completion is trained anyway."""
    first: Any = next(iter(dataset), {})
    return args.responses_only and not isinstance(first.get("prompt"), str)


def check_trained(
    dataset: Dataset | IterableDataset, tokenizer: Any, args: argparse.Namespace, max_seq_length: int
) -> None:
    """Raise where no row has a token to train."""
    if "input_ids" in next(iter(dataset), {}):
        return
    rows = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    encoder = Encoder(tokenizer, parse_control=args.parse_control_tokens or None)
    label = Labeller(response_masker(tokenizer), tokenizer) if wants_replies(args, dataset) else None
    for row in prepare_stream(rows, encoder, Cut(max_seq_length)):
        if label is None or has_label(label(row)):
            return
    raise DataError(
        "no row has a token to train on",
        where=", ".join(_names(args)),
        why=f"what is trained of each row is cut off after {max_seq_length} tokens"
        + (", or no row has a reply as the chat template marks them" if label is not None else ""),
        hint="raise --max_seq_length; `pantheraml data preview` shows what is trained",
    )

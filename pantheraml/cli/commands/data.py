"""``pantheraml data preview``: what training will see of a data set, without loading the model's weights."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from ...data import formats, raw_text, sources
from ...data.formats import Format
from ...data.preview import Example, Finding, Preview, histogram, look
from ...data.streams import open_stream
from ...errors import DataError
from ..finetune import quiet_unless_terminal
from ..output import Output, printable
from ..tokenizer import MAX_LENGTH, tokenizer_of

# What neighbouring chunks share in `pantheraml` without flags.
_STRIDE = 512
_BAR = 40
_MARKS = ("[[", "]]")
_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass
class _Read:
    """Checked rows and where they came from."""

    checked: Dataset
    format: Format
    columns: list[str]
    description: str
    documents: bool
    rejected: str
    rejected_rows: int
    origin: Callable[[int], str]


def _read(args: argparse.Namespace) -> _Read:
    options = {"split": args.train_split, "config": args.dataset_config, "token": args.hub_token}
    parts = {part for required, optional in formats.PARTS.values() for part in (*required, *optional)}
    overrides = {part: getattr(args, f"{part}_column") for part in sorted(parts)}
    overrides["format"] = None if args.format == "auto" else args.format
    if args.streaming:
        stream = open_stream(args.file, max_bad_fraction=args.max_bad_fraction, **options)
        head = stream.head()
        format = formats.detect(head, overrides=overrides, where=args.file)
        checked, places = stream.first(format)
        description = f"the first {len(checked)} rows of {stream.description}"
        bad = str(stream.rejected)
        return _Read(checked, format, head.column_names, description, False, bad, stream.rejected, places.__getitem__)
    loaded = sources.load(args.file, max_bad_fraction=args.max_bad_fraction, **options)
    format = formats.detect(loaded.dataset, overrides=overrides, where=args.file)
    dropped: list[int] = []

    def rejected(index: int) -> str:
        dropped.append(index)
        return loaded.origin(index)

    checked = formats.check(loaded.dataset, format, rejections=loaded.rejections, origin=rejected, where=args.file)
    good = sorted(set(range(len(loaded.dataset))) - set(dropped)) if dropped else range(len(loaded.dataset))
    bad = f"{len(loaded.rejections)} of {loaded.rejections.total}"
    return _Read(
        checked,
        format,
        loaded.dataset.column_names,
        loaded.description,
        loaded.documents,
        bad,
        len(loaded.rejections),
        lambda index: loaded.origin(good[index]),
    )


def _chunk(index: int) -> str:
    return f"chunk {index + 1}"


def _look(args: argparse.Namespace, output: Output) -> Preview:
    read = _read(args)
    checked = read.checked
    output.say(f"Data: {read.description}")
    output.say(f"Columns: {', '.join(read.columns)}")
    output.say(f"Format: {read.format}")
    if read.rejected_rows:
        output.say(f"Bad rows that training drops: {read.rejected}")
    tokenizer, max_length = tokenizer_of(args.model, args, args.max_length)
    origin = read.origin
    if read.documents:
        size = min(MAX_LENGTH, max_length)
        stride = min(_STRIDE, size // 4)
        checked = raw_text.chunk_documents(checked["text"], tokenizer, chunk_size=size, stride=stride)
        output.say(f"Running text: {len(checked)} chunks of up to {size} tokens, {stride} shared by neighbours")
        origin = _chunk
    output.note(
        data=read.description,
        columns=read.columns,
        format=read.format.kind,
        parts=read.format.columns,
        rejected=read.rejected_rows,
    )
    return look(
        checked,
        read.format.kind,
        tokenizer,
        max_length=max_length,
        responses_only=args.responses_only,
        packing=args.packing,
        parse_control=args.parse_control_tokens or None,
        shown=args.rows,
        origin=origin,
    )


def _marked(text: str, trained: bool, colour: bool) -> str:
    text = printable(text)
    if not colour:
        return f"{_MARKS[0]}{text}{_MARKS[1]}" if trained else text
    start = _GREEN if trained else _DIM
    # Each line by itself, so that a pager colours all of them.
    return "\n".join(f"{start}{line}{_PLAIN}" if line else "" for line in text.split("\n"))


def _show_example(example: Example, output: Output) -> None:
    stream = sys.stderr if output.json else sys.stdout
    colour = stream.isatty()
    cut = f", of which {example.cut} are cut off" if example.cut else ""
    output.say(f"\n{example.place} ({example.tokens} tokens{cut})")
    # Not through say(), which would make the colours visible as text.
    stream.write("".join(_marked(text, trained, colour) for text, trained in example.segments) + "\n")
    stream.flush()


def _percent(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else "0"


def _show(preview: Preview, output: Output, *, packing: bool) -> None:
    rows = len(preview.lengths)
    if preview.examples:
        output.say("\nTrained text is " + ("green" if _coloured(output) else f"between {_MARKS[0]} and {_MARKS[1]}"))
    for example in preview.examples:
        _show_example(example, output)
    output.say(f"\nLengths of {rows:,} rows in tokens")
    output.say("  " + ", ".join(f"{name} {value:g}" for name, value in preview.length_summary().items()))
    bins = histogram(preview.lengths)
    most = max(count for *_, count in bins)
    output.table(
        [(f"{low}-{high}", f"{count:,}", "#" * -(-count * _BAR // most)) for low, high, count in bins], indent="    "
    )
    facts = [
        (
            f"longer than {preview.max_length} tokens",
            _percent(preview.truncated.rows, rows) + _first(preview.truncated),
        ),
        ("teach nothing", _percent(preview.empty.rows, rows) + _first(preview.empty)),
        ("  since they are cut off", f"{preview.cut_off:,}"),
        ("trained tokens", _percent(preview.supervised, preview.tokens)),
        (
            "packed" if packing else "with --packing",
            f"{preview.sequences:,} sequences, {preview.efficiency:.1%} full",
        ),
    ]
    findings = (
        ("control tokens typed", preview.control, "they stay text; --parse_control_tokens has them read as tokens"),
        ("control tokens in texts", preview.read, "they are read as tokens: a text has those of its template"),
        ("begin with two BOS", preview.double_bos, "a model is not used to it"),
    )
    told = [(name, finding, why) for name, finding, why in findings if finding.rows]
    facts += [(name, _percent(finding.rows, rows) + _first(finding)) for name, finding, _ in told]
    output.say()
    output.table(facts)
    for name, _, why in told:
        output.say(f"  ({name}: {why})")


def _coloured(output: Output) -> bool:
    return (sys.stderr if output.json else sys.stdout).isatty()


def _first(finding: Finding) -> str:
    detail = f" {finding.detail!r}" if finding.detail else ""
    return f", first: {finding.first}{detail}" if finding.rows else ""


def _note(preview: Preview, output: Output, *, packing: bool) -> None:
    rows = len(preview.lengths)
    bins = [{"from": low, "to": high, "rows": count} for low, high, count in histogram(preview.lengths)]
    output.note(
        rows=rows,
        max_length=preview.max_length,
        lengths={**preview.length_summary(), "histogram": bins},
        truncated={**dataclasses.asdict(preview.truncated), "share": preview.truncated.rows / rows},
        teach_nothing={
            **dataclasses.asdict(preview.empty),
            "share": preview.empty.rows / rows,
            "cut_off": preview.cut_off,
        },
        tokens={
            "total": preview.tokens,
            "supervised": preview.supervised,
            "share": preview.supervised / preview.tokens if preview.tokens else 0.0,
        },
        packing={"enabled": packing, "sequences": preview.sequences, "efficiency": preview.efficiency},
        control_tokens=dataclasses.asdict(preview.control),
        control_tokens_read=dataclasses.asdict(preview.read),
        double_bos=dataclasses.asdict(preview.double_bos),
        examples=[
            {
                "place": example.place,
                "tokens": example.tokens,
                "cut": example.cut,
                "segments": [{"text": text, "trained": trained} for text, trained in example.segments],
            }
            for example in preview.examples
        ],
    )


def run(args: argparse.Namespace) -> int:
    """Print what training will see; data that would teach nothing at all end with an error after it."""
    quiet_unless_terminal()
    output = Output(json=args.json)
    preview = _look(args, output)
    _show(preview, output, packing=args.packing)
    _note(preview, output, packing=args.packing)
    output.finish()
    if not preview.supervised:
        raise DataError(
            "no row has a token to train on",
            where=args.file,
            why="what would be trained is cut off" if preview.cut_off else "nothing in the rows is marked as a reply",
            hint="raise --max_length"
            if preview.cut_off
            else "leave --responses_only out, or give the rows as messages",
        )
    return 0

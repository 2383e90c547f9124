"""The one-shot fine-tune: data, model, training, saving, in the order in which mistakes show soonest."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from .. import __version__, env, log
from ..data import formats, raw_text, sources
from ..data.encoding import Encoder
from ..data.formats import Kind
from ..data.masking import response_masker
from ..data.mixture import mix
from ..data.prepare import Cut, prepare_stream
from ..data.responses import Labeller, has_label, train_on_responses_only
from ..data.rows import Rejections
from ..data.sources import Loaded
from ..data.streams import Stream, open_stream
from ..device import require
from ..errors import ConfigError, ConflictError, DataError, MissingDependencyError, UnsupportedError, nearest
from ..export.gguf.types import resolve_types
from .output import Output, program
from .tokenizer import tokenizer_of

_COLUMN_PARTS = ("text", "prompt", "completion", "messages", "instruction", "input", "output")
_LORA_ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "bias", "random_state", "use_rslora", "use_dora")
_CONFIG_ARGUMENTS = (
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("warmup_steps", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "seed", "packing"),
    *("logging_steps", "save_steps"),
)
_CHECKPOINTING = {"true": True, "false": False}
_SECRETS = ("hub_token",)
_RUN_FILE = "pantheraml-run.json"
_REJECTED_FILE = "rejected.jsonl"


@dataclass
class Rows:
    """Checked rows that still need the tokenizer."""

    dataset: Dataset | IterableDataset
    kind: Kind
    documents: bool
    description: str


def quiet_unless_terminal() -> None:
    """Turn the libraries' progress bars off where nobody watches them, so that pipes and logs hold plain lines."""
    if sys.stderr.isatty():
        return
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def fine_tune(args: argparse.Namespace, output: Output) -> None:
    """Load, adapt, train and save as ``args`` say; see ``pantheraml --help``."""
    quiet_unless_terminal()
    _check_names(args)
    _check_folders(args)
    _check_saving(args)
    reporters = _reporters(args)
    checkpoint = _checkpoint(args)
    max_seq_length = _max_seq_length(args)
    weights = _weights(args)
    parts, streams = _training_rows(args, output)
    held_out = _eval_rows(args, output)
    # What is wrong with the data shows before weights are loaded.
    tokenizer, _ = tokenizer_of(args.model_name, args, max_seq_length)
    train_set = _mixed([_finished(rows, tokenizer, args, max_seq_length, output) for rows in parts], weights, args)
    eval_set = _finished(held_out, tokenizer, args, max_seq_length, output) if held_out else None
    _check_trained(train_set, tokenizer, args, max_seq_length)
    model, tokenizer = _load(args, max_seq_length)
    trainer = _trainer(args, model, tokenizer, train_set, eval_set, reporters, max_seq_length)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if streams:
        _tell_rejected(args, streams, output)
    metrics = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
    if eval_set is not None:
        metrics |= {k: v for k, v in trainer.evaluate().items() if isinstance(v, int | float)}
    if trainer.is_world_process_zero():
        output.say(f"Trained {result.global_step} steps: " + _shown(metrics))
        saved = _save(args, model, tokenizer, output)
        _write_run(args, "; ".join(rows.description for rows in parts), metrics, saved)
        output.note(steps=result.global_step, metrics=metrics, saved=saved)
    _push(args, model, tokenizer, output)


def _shown(metrics: dict[str, Any]) -> str:
    names = ("train_loss", "eval_loss", "train_runtime")
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)


def _check_names(args: argparse.Namespace) -> None:
    """Refuse optimizers and schedules that transformers does not know, before anything is loaded."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for flag, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        value, known = getattr(args, flag), [str(name.value) for name in names]
        if value not in known:
            close = nearest(value, known)
            raise ConfigError(
                f"unknown --{flag} {value!r}" + (f" (did you mean {close!r}?)" if close else ""),
                hint=f"transformers knows: {', '.join(known)}",
            )


def _check_folders(args: argparse.Namespace) -> None:
    for flag in ("output_dir", *(("save_path",) if args.save_model else ())):
        path = Path(getattr(args, flag))
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--{flag} {path} is a file", hint="name a folder")


def _check_saving(args: argparse.Namespace) -> None:
    """Refuse what cannot be saved before any time is spent on training."""
    if args.save_method == "merged_4bit" and (args.save_model or args.push_model):
        raise UnsupportedError(
            "--save_method merged_4bit is refused",
            why="merging into 4-bit weights loses accuracy that cannot be had back",
            hint="use merged_16bit; 4-bit loading quantises it again",
        )
    if args.save_gguf or args.push_gguf:
        require("gguf", what="--save_gguf" if args.save_gguf else "--push_gguf")
        resolve_types(args.quantization)


def _reporters(args: argparse.Namespace) -> list[str]:
    """The reporters to use: the default one is dropped where it is not installed, one that was asked for raises."""
    from transformers.integrations import get_available_reporting_integrations

    if args.report_to == "none":
        return []
    available = get_available_reporting_integrations()
    if args.report_to == "all":
        return available
    if args.report_to in available:
        return [args.report_to]
    if "report_to" in args.explicit:
        raise MissingDependencyError(
            f"--report_to {args.report_to} needs a package that is not installed", hint=f"pip install {args.report_to}"
        )
    log.info(f"{args.report_to} is not installed: metrics go to {args.output_dir} only")
    return []


def _checkpoint(args: argparse.Namespace) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    if args.resume is None:
        return None
    if args.resume != "auto":
        if not (Path(args.resume) / "trainer_state.json").is_file():
            raise ConfigError(
                f"{args.resume} is no checkpoint",
                where="--resume",
                why="it has no trainer_state.json",
                hint="name a folder checkpoint-N, or give --resume auto",
            )
        return args.resume
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    log.info(f"going on from {found}" if found else f"no checkpoint in {args.output_dir}: starting anew")
    return found


def _max_seq_length(args: argparse.Namespace) -> int:
    """The longest sequence; the default does not stretch a model that was made for shorter ones.

    Reads the model's configuration, so that a wrong model name shows before the data are loaded.
    """
    from ..models.source import Hub, load_config, resolve_source

    source = resolve_source(args.model_name, Hub(token=args.hub_token))
    text = load_config(source, trust_remote_code=args.trust_remote_code).get_text_config()
    maximum = getattr(text, "max_position_embeddings", None)
    if "max_seq_length" in args.explicit or not isinstance(maximum, int):
        return args.max_seq_length
    return min(args.max_seq_length, maximum)


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


def _weights(args: argparse.Namespace) -> list[float]:
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


def _training_rows(args: argparse.Namespace, output: Output) -> tuple[list[Rows], list[Stream]]:
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


def _tell_rejected(args: argparse.Namespace, streams: list[Stream], output: Output) -> None:
    count = sum(stream.rejected for stream in streams)
    output.note(rejected=count)
    if count:
        output.say(f"Dropped {count} rows, see {Path(args.output_dir) / _REJECTED_FILE}")


def _mixed(parts: list[Any], weights: list[float], args: argparse.Namespace) -> Dataset | IterableDataset:
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


def _eval_rows(args: argparse.Namespace, output: Output) -> Rows | None:
    if not args.eval_dataset and not args.eval_split:
        return None
    return _read(args, args.eval_dataset or args.dataset, args.eval_split or "test", output)[1]


def _load(args: argparse.Namespace, max_seq_length: int) -> tuple[Any, Any]:
    from peft import PeftModel

    from ..models.loader import FastLanguageModel

    checkpointing = _CHECKPOINTING.get(args.use_gradient_checkpointing, args.use_gradient_checkpointing)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model_name,
        max_seq_length=max_seq_length,
        dtype=None if str(args.dtype).lower() == "none" else args.dtype,
        load_in_4bit=args.load_in_4bit,
        full_finetuning=args.full_finetuning,
        token=args.hub_token,
        trust_remote_code=args.trust_remote_code,
        use_gradient_checkpointing=checkpointing,
        random_state=args.random_state,
    )
    if args.full_finetuning:
        return model, tokenizer
    if isinstance(model, PeftModel):
        _check_adapter(args, model)
        return model, tokenizer
    model = FastLanguageModel.get_peft_model(
        model,
        use_gradient_checkpointing=checkpointing,
        loftq_config=_loftq(args.loftq_config),
        **{name: getattr(args, name) for name in _LORA_ARGUMENTS},
    )
    return model, tokenizer


def _check_adapter(args: argparse.Namespace, model: Any) -> None:
    """An adapter that was loaded keeps its own settings: a flag that says otherwise raises."""
    config = model.peft_config[model.active_adapter]
    for name in (*_LORA_ARGUMENTS, "loftq_config"):
        own = getattr(config, name, "its trained weights")
        if name in args.explicit and own != getattr(args, name):
            raise ConflictError(
                f"--{name} {getattr(args, name)} does not fit the adapter {args.model_name}, which has {own}",
                hint=f"leave --{name} out to train the adapter further, or name its base model to make a new one",
            )
    log.info("the adapter is trained further, with its own LoRA settings")


def _loftq(text: str | None) -> dict[str, Any] | None:
    if text is None or text.lower() == "none":
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError("--loftq_config is not json", why=str(error), hint="""write '{"loftq_bits": 4}'""") from error
    if not isinstance(value, dict):
        raise ConfigError("--loftq_config is not a json object", hint="""write '{"loftq_bits": 4}'""")
    return value


def _finished(
    rows: Rows, tokenizer: Any, args: argparse.Namespace, max_seq_length: int, output: Output
) -> Dataset | IterableDataset:
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


def _wants_replies(args: argparse.Namespace, dataset: Dataset | IterableDataset) -> bool:
    """Whether replies are still to be found; of a prompt with completion only the completion is trained anyway."""
    first: Any = next(iter(dataset), {})
    return args.responses_only and not isinstance(first.get("prompt"), str)


def _check_trained(
    dataset: Dataset | IterableDataset, tokenizer: Any, args: argparse.Namespace, max_seq_length: int
) -> None:
    """Raise where no row has a token to train."""
    if "input_ids" in next(iter(dataset), {}):
        return
    rows = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    encoder = Encoder(tokenizer, parse_control=args.parse_control_tokens or None)
    label = Labeller(response_masker(tokenizer), tokenizer) if _wants_replies(args, dataset) else None
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


def _trainer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    train_set: Dataset | IterableDataset,
    eval_set: Dataset | IterableDataset | None,
    reporters: list[str],
    max_seq_length: int,
) -> Any:
    from trl import SFTConfig, SFTTrainer

    from ..training.preparation import PARSE_CONTROL

    options = {name: getattr(args, name) for name in _CONFIG_ARGUMENTS}
    options |= {"max_length": max_seq_length, "report_to": reporters}
    if args.num_train_epochs is not None:
        options |= {"num_train_epochs": args.num_train_epochs, "max_steps": -1}
    if args.parse_control_tokens:
        options["dataset_kwargs"] = {PARSE_CONTROL: True}
    if "optim" in args.explicit:
        # Otherwise the trainer takes the default optimizer where it runs, and says which one where it does not.
        options["optim"] = args.optim
    try:
        config = SFTConfig(**options)
    except ValueError as error:
        raise ConfigError(
            "a training flag has a value that cannot be used", why=str(error), hint="see `pantheraml --help`"
        ) from error
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    return train_on_responses_only(trainer) if _wants_replies(args, train_set) else trainer


def _save(args: argparse.Namespace, model: Any, tokenizer: Any, output: Output) -> dict[str, str]:
    saved = {}
    directory = Path(args.output_dir)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    kind = "model" if args.full_finetuning else "adapter"
    saved[kind] = str(directory)
    output.say(f"The {kind} is in {directory}")
    report = directory / "report.html"
    if report.is_file():
        saved["report"] = str(report)
        output.say(f"The report is {report}")
    if args.save_model:
        model.save_pretrained_merged(args.save_path, tokenizer, save_method=args.save_method)
        saved[args.save_method] = args.save_path
        output.say(f"{args.save_method} is in {args.save_path}")
    if args.save_gguf:
        written = model.save_pretrained_gguf(args.save_path, tokenizer, quantization_method=args.quantization)
        if written is not None:
            saved["gguf"] = written["gguf_directory"]
            output.say(f"GGUF files: {', '.join(written['gguf_files'])}")
    output.say(f"Talk to it: {program()} chat {directory}")
    return saved


def _push(args: argparse.Namespace, model: Any, tokenizer: Any, output: Output) -> None:
    if args.push_model and env.rank() == 0:
        model.push_to_hub_merged(args.hub_path, tokenizer, save_method=args.save_method, token=args.hub_token)
        output.say(f"Pushed {args.save_method} to {args.hub_path}")
    if args.push_gguf and env.rank() == 0:
        options = {"quantization_method": args.quantization, "token": args.hub_token}
        model.push_to_hub_gguf(args.hub_path, tokenizer, **options)
        output.say(f"Pushed GGUF files to {args.hub_path}")


def _write_run(args: argparse.Namespace, data: str, metrics: dict[str, Any], saved: dict[str, str]) -> None:
    """Write every flag, whether the user gave it, and the outcome beside the adapter."""
    flags = {
        name: {"value": value, "given": name in args.explicit}
        for name, value in sorted(vars(args).items())
        if name not in ("explicit", "argv") and name not in _SECRETS
    }
    record = {"pantheraml": __version__, "data": data, "flags": flags, "metrics": metrics, "saved": saved}
    (Path(args.output_dir) / _RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

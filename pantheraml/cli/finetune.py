"""The one-shot fine-tune: data, model, training, saving, in the order in which mistakes show soonest."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from .. import __version__, env, log
from ..data.responses import train_on_responses_only
from ..device import require
from ..errors import ConfigError, ConflictError, MissingDependencyError, UnsupportedError, nearest
from ..export.gguf.types import resolve_types
from ..parallel.config import MultiGPUConfig
from .output import Output, program
from .tokenizer import tokenizer_of
from .training_data import (
    check_trained,
    eval_rows,
    finished,
    mixed_rows,
    tell_rejected,
    training_rows,
    wants_replies,
    weights,
)

_LORA_ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "bias", "random_state", "use_rslora", "use_dora")
_CONFIG_ARGUMENTS = (
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("warmup_steps", "max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "seed", "packing"),
    *("logging_steps", "save_steps"),
)
_CHECKPOINTING = {"true": True, "false": False}
_SECRETS = ("hub_token",)
_RUN_FILE = "pantheraml-run.json"


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
    shares = weights(args)
    parts, streams = training_rows(args, output)
    held_out = eval_rows(args, output)
    # What is wrong with the data shows before weights are loaded.
    tokenizer, _ = tokenizer_of(args.model_name, args, max_seq_length)
    train_set = mixed_rows([finished(rows, tokenizer, args, max_seq_length, output) for rows in parts], shares, args)
    eval_set = finished(held_out, tokenizer, args, max_seq_length, output) if held_out else None
    check_trained(train_set, tokenizer, args, max_seq_length)
    model, tokenizer = _load(args, max_seq_length)
    trainer = _trainer(args, model, tokenizer, train_set, eval_set, reporters, max_seq_length)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if streams:
        tell_rejected(args, streams, output)
    metrics = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
    if eval_set is not None:
        metrics |= {k: v for k, v in trainer.evaluate().items() if isinstance(v, int | float)}
    main = trainer.is_world_process_zero()
    if main:
        output.say(f"Trained {result.global_step} steps: " + _shown(metrics))
    # On a TPU, or where the model is divided, every process takes part in reading the weights.
    together = args.use_tpu or args.strategy == "fsdp"
    saved = _save(args, model, tokenizer, output) if main or together else {}
    if main:
        _write_run(args, "; ".join(rows.description for rows in parts), metrics, saved)
        output.note(steps=result.global_step, metrics=metrics, saved=saved)
    if main or args.strategy == "fsdp":
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
    from ..training.resuming import newest_checkpoint

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
    found = newest_checkpoint(args.output_dir)
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


def _load(args: argparse.Namespace, max_seq_length: int) -> tuple[Any, Any]:
    from peft import PeftModel

    from ..models.loader import FastLanguageModel

    checkpointing = _CHECKPOINTING.get(args.use_gradient_checkpointing, args.use_gradient_checkpointing)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model_name,
        max_seq_length=max_seq_length,
        dtype=None if str(args.dtype).lower() == "none" else args.dtype,
        load_in_4bit=args.load_in_4bit and not args.use_tpu,
        use_tpu=True if args.use_tpu else None,
        full_finetuning=args.full_finetuning,
        token=args.hub_token,
        trust_remote_code=args.trust_remote_code,
        use_gradient_checkpointing=checkpointing,
        random_state=args.random_state,
        multi_gpu_config=_sharing(args),
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


def _sharing(args: argparse.Namespace) -> MultiGPUConfig | None:
    """How several processes share the work, where the flags say more than that each has a copy of the model."""
    if args.strategy == "auto" and args.context_parallel == 1:
        return None
    return MultiGPUConfig(strategy=args.strategy, context_parallel=args.context_parallel)


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
    from ..training.tpu_trainer import PantheraMLTPUTrainer

    options = {name: getattr(args, name) for name in _CONFIG_ARGUMENTS}
    options |= {"max_length": max_seq_length, "report_to": reporters}
    if args.num_train_epochs is not None:
        options |= {"num_train_epochs": args.num_train_epochs, "max_steps": -1}
    if args.parse_control_tokens:
        options["dataset_kwargs"] = {PARSE_CONTROL: True}
    if "optim" in args.explicit:
        # Otherwise the trainer takes the default optimizer where it runs, and says which one where it does not.
        options["optim"] = args.optim
    if args.use_tpu and "logging_steps" not in args.explicit:
        # The trainer's own default: each log waits for the device.
        del options["logging_steps"]
    try:
        config = SFTConfig(**options)
    except ValueError as error:
        raise ConfigError(
            "a training flag has a value that cannot be used", why=str(error), hint="see `pantheraml --help`"
        ) from error
    trainer = (PantheraMLTPUTrainer if args.use_tpu else SFTTrainer)(
        model=model, args=config, train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    return train_on_responses_only(trainer) if wants_replies(args, train_set) else trainer


def _save(args: argparse.Namespace, model: Any, tokenizer: Any, output: Output) -> dict[str, str]:
    saved = {}
    directory = Path(args.output_dir)
    model.save_pretrained(directory)
    if env.rank() == 0:
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
    if args.push_model:
        model.push_to_hub_merged(args.hub_path, tokenizer, save_method=args.save_method, token=args.hub_token)
        output.say(f"Pushed {args.save_method} to {args.hub_path}")
    if args.push_gguf:
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

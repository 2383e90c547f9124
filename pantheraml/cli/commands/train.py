"""``pantheraml`` with flags: one fine-tune from data to saved weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ... import env, log
from ...errors import ConfigError, ConflictError, UnsupportedError
from ..output import Output

_LORA_FLAGS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "loftq_config", "use_dora")


@dataclass(frozen=True)
class _Later:
    """Why flags cannot be honoured yet, and what to do instead."""

    why: str
    instead: str


_LATER: dict[tuple[str, ...], _Later] = {
    ("benchmark", "benchmark_type", "max_samples", "export"): _Later(
        "benchmarks come in a later release", "--eval_split or --eval_dataset measures the loss on held-out data"
    ),
}
_DATASET_FLAGS = ("dataset", "mix", "dataset_config", "train_split", "format")


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise for flags that contradict each other or cannot be honoured, before anything is loaded.

    Raises:
        ConflictError: two flags contradict each other.
        UnsupportedError: a flag asks for something that this release does not do.
        ConfigError: a flag has no usable value.
    """
    given = args.explicit

    def conflict(flag: str, others: tuple[str, ...] | list[str], why: str) -> None:
        clash = [other for other in others if other in given]
        if flag in given and clash:
            raise ConflictError(f"--{flag} and --{clash[0]} contradict each other", why=why, hint="leave one out")

    conflict("full_finetuning", _LORA_FLAGS, "full fine-tuning trains every weight and uses no LoRA")
    conflict("full_finetuning", ["load_in_4bit"], "4-bit weights cannot be trained, only adapters on top of them")
    conflict("use_tpu", ["gpus", "strategy", "context_parallel"], "one process drives all cores of a TPU host")
    conflict("use_tpu", ["load_in_4bit"], "TPUs have no code for 4-bit weights")
    conflict("num_train_epochs", ["max_steps"], "each of them decides how long training lasts")
    conflict("num_train_epochs", ["streaming"], "how many rows a stream has is not known; --max_steps ends it")
    conflict("raw_text_file", _DATASET_FLAGS, "each of them names the data")
    conflict("raw_text_file", ["responses_only"], "running text has no replies")
    conflict("raw_text_file", ["streaming"], "a text file is cut into chunks as a whole")
    if not args.eval_dataset:
        conflict("raw_text_file", ["eval_split"], "running text has no splits; --eval_dataset names other data")
    for flags, release in _LATER.items():
        asked = [flag for flag in flags if flag in given]
        if asked:
            raise UnsupportedError(f"--{asked[0]} cannot be honoured", why=release.why, hint=release.instead)
    sharing = [name for name, alone in (("strategy", "auto"), ("context_parallel", 1)) if getattr(args, name) != alone]
    if sharing and "gpus" not in given and env.world_size() == 1:
        raise ConfigError(
            f"--{sharing[0]} {getattr(args, sharing[0])} is for several processes, and this is a single one",
            hint="add --gpus auto, or --gpus with their number",
        )
    if (args.push_model or args.push_gguf) and "hub_path" not in given:
        raise ConfigError("--hub_path is needed to push", hint="give the repository as --hub_path owner/name")
    if args.num_train_epochs == 0 or args.learning_rate == 0:
        name = "num_train_epochs" if args.num_train_epochs == 0 else "learning_rate"
        raise ConfigError(f"--{name} is 0, which would train nothing", hint="give a number above 0")


def _may_be_text(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    return path.suffix.lower() == ".txt" or path.is_dir()


def tell_idle_flags(args: argparse.Namespace) -> None:
    """Say which flags were given and have no effect, since the one that they belong to was not."""
    saves, pushes = args.save_model, args.push_model
    idle = (
        ("quantization", "save_gguf", args.save_gguf or args.push_gguf),
        ("mix_stop", "mix", bool(args.mix)),
        ("shuffle_buffer", "streaming", args.streaming),
        ("save_path", "save_model", saves or args.save_gguf),
        ("save_method", "save_model", saves or pushes),
        ("hub_path", "push_model", pushes or args.push_gguf),
        ("chunk_size", "raw_text_file", bool(args.raw_text_file) or _may_be_text(args.dataset)),
        ("stride", "raw_text_file", bool(args.raw_text_file) or _may_be_text(args.dataset)),
        ("max_restarts", "gpus", "gpus" in args.explicit),
        ("mesh_shape", "use_tpu", args.use_tpu),
        ("per_device_eval_batch_size", "eval_dataset", bool(args.eval_dataset or args.eval_split)),
    )
    for flag, needed, used in idle:
        if flag in args.explicit and not used:
            log.warning(f"--{flag} has no effect without --{needed}")


def _launched(args: argparse.Namespace) -> int | None:
    """Run this command again in a process for each GPU; None where this process is to do the work."""
    from ...parallel.launch import launch_module, processes_for

    if env.world_size() > 1:
        if args.gpus not in ("auto", env.world_size()):
            raise ConflictError(
                f"--gpus {args.gpus} was given to a launch of {env.world_size()} processes", hint="leave --gpus out"
            )
        return None
    processes = processes_for(args.gpus)
    if processes == 1:
        return None
    return launch_module("pantheraml.cli", args.argv, processes, max_restarts=args.max_restarts)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the flags say."""
    refuse_contradictions(args)
    tell_idle_flags(args)
    if args.use_tpu:
        from ...parallel.xla import MultiTPUConfig, setup_tpu_training

        # Without a TPU it raises, before data and model are read.
        setup_tpu_training(MultiTPUConfig(mesh_shape=args.mesh_shape))
    if "gpus" in args.explicit:
        code = _launched(args)
        if code is not None:
            return code
    from ..finetune import fine_tune

    output = Output(json=args.json)
    fine_tune(args, output)
    output.finish()
    return 0

"""What PantheraML does to a TRL trainer that is given one of its models: before, around and after its construction.

Everything is done to this trainer, its arguments and its model; no class is changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import env, log
from .._compat.peft import answering
from .._compat.peft_four_bit import prepare as prepare_four_bit
from .._compat.peft_four_bit import shown
from .._compat.trl import explicit_names, remember
from ..device import get_device
from ..errors import UnsupportedError
from ..models.adapt import adapt
from ..models.checkpointing import inner_model
from ..models.fused_head import install_fused_head
from ..models.methods import attach_methods
from ..models.record import ModelRecord, record_of
from ..parallel.process_group import fail, go_on
from . import (
    context_parallel,
    evaluation,
    optimizers,
    padding_free,
    preparation,
    ranks,
    report,
    resuming,
    rows,
    sharded,
    states,
    tpu,
)
from .defaults import apply_defaults, checkpointing_mode, has_checkpointing_kwargs, set_checkpointing
from .deferred import defer_figures
from .device_guard import DeviceGuard
from .guards import NonFiniteGuard
from .isolation import check_isolation
from .loggers import isolate_loggers
from .metrics import MetricsWriter
from .preemption import Preemption
from .progress import REPLACED, TrainingProgress, duration, parameter_counts
from .steps import StepWatch

_VERSIONS = ("pantheraml", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "triton")


@contextlib.contextmanager
def constructing(trainer: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Around the construction of a trainer: yields the arguments to construct it with, and completes it afterwards.

    Args:
        trainer: The instance whose ``__init__`` is about to run.
        arguments: Its keyword arguments; ``model`` is one that PantheraML loaded, ``args`` its config.

    Raises:
        PantheraMLError: the options contradict the model, or the data set holds nothing to train on.
    """
    model, args = arguments["model"], arguments["args"]
    record = record_of(model)
    assert record is not None
    explicit = explicit_names(args)
    with _told_to_other_ranks(), env.as_it_was(*sharded.VARIABLES):
        if record.multi_gpu_config is not None and not hasattr(trainer, "multi_gpu_config"):
            ranks.apply_config(args, record.multi_gpu_config)
        ranks.settle(args, model, explicit)
        context_parallel.settle(trainer, arguments)
        with _quiet_when_piped(), ranks.preparing(arguments) as turn:
            with turn():
                arguments = before_init(trainer, arguments, record, explicit)
            weights = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
            # TRL may wrap the model by peft_config.
            wraps = arguments.get("peft_config") is not None
            with _plain_head(model), answering(model), shown(model) if wraps else contextlib.nullcontext():
                yield arguments
        if _is_quantized(model):
            _restore_weights(trainer.model, weights)
        after_init(trainer, record, explicit)


@contextlib.contextmanager
def _told_to_other_ranks() -> Iterator[None]:
    """Let ranks that wait for this one, to prepare the data or in a collective, hear of an error inside."""
    go_on()
    try:
        yield
    except BaseException:
        fail()
        raise


def before_init(
    trainer: Any, arguments: dict[str, Any], record: ModelRecord, explicit: frozenset[str]
) -> dict[str, Any]:
    """Settle the arguments of a trainer that is about to be constructed."""
    arguments = dict(arguments)
    model, args = arguments["model"], arguments["args"]
    apply_defaults(args, model, record, explicit)
    tpu.settle(trainer, args, record, explicit)
    sharded.settle(args, model, record, explicit)
    # TRL reports each construction over the network.
    vars(trainer)["_send_telemetry"] = lambda: None
    tokenizer = getattr(arguments.get("processing_class"), "tokenizer", arguments.get("processing_class"))
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.padding_side = "right"
    if hasattr(args, "dataset_text_field"):
        if args.dataset_num_proc is None and "dataset_num_proc" not in explicit:
            args.dataset_num_proc = rows.workers_for(arguments.get("train_dataset"))
        formatting = arguments.pop("formatting_func", None)
        vars(trainer)["_pantheraml_formatting"] = formatting
        for name in ("train", "eval"):
            key = f"{name}_dataset"
            prepared = rows.prepare(arguments.get(key), args, formatting, name=name)
            if key in arguments:
                arguments[key] = prepared
        preparation.install(trainer)
    padding_free.settle(trainer, arguments, explicit)
    if not has_checkpointing_kwargs(explicit):
        # The model's own plan recomputes activations; TRL would prepare the model for another kind.
        vars(trainer)["_pantheraml_checkpointing"] = checkpointing_mode(args, record, explicit)
        set_checkpointing(args, False)
    remember(args, explicit)
    return arguments


def after_init(trainer: Any, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Complete a trainer that TRL has constructed."""
    model, args = trainer.model, trainer.args
    # PEFT's wrapper answers with the methods of what it wraps.
    if record_of(model) is record and isinstance(model, PeftModel) and "save_pretrained_merged" not in vars(model):
        # TRL wrapped the model by peft_config.
        attach_methods(model)
        prepare_four_bit(model)
        adapt(model)
    if not install_fused_head(model) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UnsupportedError(
            "an adapter on this model's output layer cannot be trained",
            where=type(trainer).__name__,
            why="the output layer runs as TRL has it, which reads its weight without the adapter",
            hint="leave lm_head out of target_modules, or put it into modules_to_save",
        )
    if not hasattr(trainer, "tokenizer"):
        trainer.tokenizer = trainer.processing_class
    sharded.install(trainer, record)
    on_xla = get_device().type == "xla"
    if not on_xla and getattr(trainer, "padding_free", False) and hasattr(trainer, "data_collator"):
        check_isolation(trainer)
    rows.keep_labels(trainer)
    padding_free.complete(trainer)
    rows.check_labels(trainer.train_dataset)
    _prepare_evaluations(trainer)
    isolate_loggers(trainer)
    resuming.install(trainer)
    ranks.complete(trainer)
    context_parallel.install(trainer)
    optimizers.install(trainer)
    figures = defer_figures(trainer)
    evaluation.install(trainer)
    watch = StepWatch(trainer)
    guard = (DeviceGuard if on_xla else NonFiniteGuard)(
        trainer,
        watch,
        action=getattr(args, "on_nonfinite", "raise"),
        patience=getattr(args, "max_nonfinite_steps", 10),
    )
    if isinstance(guard, DeviceGuard):
        tpu.complete(trainer, figures, guard)
    metrics = MetricsWriter(watch)
    for callback in (guard, metrics):
        trainer.add_callback(callback)
    preemption = None
    if not on_xla:
        preemption = Preemption(guard)
        trainer.add_callback(preemption)
    progress = _show_progress(trainer, metrics, explicit)
    mode = vars(trainer).pop("_pantheraml_checkpointing", None)

    def before() -> None:
        with _told_to_other_ranks():
            rows.check_labels(trainer.train_dataset)
            ranks.before_training(trainer)
            sharded.apply(trainer)

    def after(error: BaseException | None) -> None:
        if preemption is not None:
            preemption.close()
        if progress is not None:
            progress.close()
        if error is not None:
            fail()
            ranks.tell_failure(trainer, error)
        _write_report(trainer, metrics, record, error)
        if error is None and preemption is not None:
            preemption.end(args)

    states.install(trainer, mode, before=before, after=after)


def _show_progress(trainer: Any, metrics: MetricsWriter, explicit: frozenset[str]) -> TrainingProgress | None:
    """Replace the default display of transformers, unless the user chose one."""
    shown = [callback for callback in trainer.callback_handler.callbacks if type(callback) in REPLACED]
    if "disable_tqdm" in explicit or len(shown) != 1:
        return None
    trainer.remove_callback(shown[0])
    progress = TrainingProgress(metrics)
    trainer.add_callback(progress)
    return progress


def _prepare_evaluations(trainer: Any) -> None:
    """A data set given to ``evaluate()`` is prepared as those given to the constructor were."""
    formatting = vars(trainer).pop("_pantheraml_formatting", None)
    if not hasattr(trainer.args, "dataset_text_field"):
        return
    original = trainer.evaluate

    @functools.wraps(original)
    def evaluate(eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        eval_dataset = rows.prepare(eval_dataset, trainer.args, formatting, name="eval", only_if_needed=True)
        return original(eval_dataset, *args, **kwargs)

    trainer.evaluate = evaluate


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _restore_weights(model: nn.Module, weights: dict[nn.Parameter, torch.Tensor]) -> None:
    """Undo TRL's rounding of trained weights to bf16: LoRA weights of a quantised model stay in fp32.

    Goes when TRL asks before it casts (it follows the QLoRA paper, https://arxiv.org/abs/2305.14314, section 3).
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter in weights:
            parameter.data = weights[parameter].to(parameter.device)
        elif parameter.requires_grad and parameter.dtype is torch.bfloat16:
            # Made inside the constructor, by peft_config.
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def _plain_head(model: nn.Module) -> Iterator[None]:
    """Show TRL the output layer without its adapter while the trainer is constructed.

    TRL refuses an adapter on the output layer, because its own loss reads the layer's weight and would never train the
    adapter. Ours runs the layer as it is. Goes when TRL's ``add_fused_lm_head`` calls the layer.
    """
    inner: Any = inner_model(model)
    original = inner.get_output_embeddings

    def get_output_embeddings() -> Any:
        head = original()
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head

    object.__setattr__(inner, "get_output_embeddings", get_output_embeddings)
    try:
        yield
    finally:
        vars(inner).pop("get_output_embeddings", None)


@contextlib.contextmanager
def _quiet_when_piped() -> Iterator[None]:
    """Hold back the progress bars of ``datasets`` where no terminal would draw them."""
    if Console(stderr=True).is_terminal or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _write_report(trainer: Any, metrics: MetricsWriter, record: ModelRecord, error: BaseException | None) -> None:
    """Write ``report.html`` on the main rank."""
    if not trainer.is_world_process_zero():
        return
    args, state, model = trainer.args, trainer.state, trainer.model
    losses = [entry["loss"] for entry in metrics.entries if "loss" in entry]
    trained, total = parameter_counts(model)
    ended = "finished" if error is None else f"stopped by {type(error).__name__}"
    facts = {
        "steps": f"{state.global_step:,} of {state.max_steps:,}",
        "loss": f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "none logged",
        "time": duration(metrics.seconds),
        "tokens": f"{metrics.trained_tokens:,}",
        "trained parameters": f"{trained:,} ({trained / max(total, 1):.2%})",
        "device": get_device().name or get_device().type,
    }
    plan = getattr(model, "activation_plan", None)
    if plan is not None:
        facts["memory"] = plan.describe()
    adapted = getattr(model, "adapt_report", None)
    modules = []
    if adapted is not None:
        modules += [(entry.module, entry.role, entry.implementation) for entry in adapted.swapped]
        modules += [(entry.module, entry.role, f"left: {entry.reason}") for entry in adapted.left]
    settings = {
        "trainer": type(trainer).__name__,
        "model": record.name,
        "dtype": str(record.dtype).removeprefix("torch."),
    }
    settings |= {"quantization": record.quantization, "max_seq_length": record.max_seq_length}
    page = report.Report(
        title=record.name,
        status=f"{type(trainer).__name__} {ended} after {state.global_step:,} steps",
        entries=metrics.entries,
        facts=facts,
        settings=settings | args.to_dict(),
        versions=_versions(),
        adapted=adapted.summary() if adapted is not None else None,
        modules=modules,
    )
    try:
        path = report.write(page, Path(args.output_dir))
    except OSError as problem:
        log.warning(f"the report could not be written: {problem}")
    else:
        log.info(f"report: {path}")


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

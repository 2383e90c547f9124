"""Progress of a run: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .. import log
from ..device import get_device
from ..parallel import xla
from .metrics import MetricsWriter
from .ranks import context_size
from .utilisation import numbers_in

# What transformers shows by default; a notebook's own table stays.
REPLACED = (ProgressCallback, PrinterCallback)


class TrainingProgress(TrainerCallback):
    """Shows step, loss, learning rate, tokens per second, memory and time left, on the main rank.

    Args:
        metrics: The writer whose last line is shown.
        console: Where to show it, standard error by default. One that is no terminal gets plain lines through the log.
    """

    def __init__(self, metrics: MetricsWriter, console: Console | None = None) -> None:
        self._metrics = metrics
        self._console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._first_step = 0
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what is about to be trained, and start the bar."""
        self._first_step, self._start = state.global_step, time.perf_counter()
        if not state.is_world_process_zero:
            return
        log.info(banner(args, state, kwargs.get("model"), kwargs.get("train_dataloader")))
        console = self._console or Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("training", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the figures of a logged step; evaluations get a line of their own."""
        if not state.is_world_process_zero or not logs or not self._metrics.entries:
            return
        if "loss" in logs:
            figures = figures_of(self._metrics.entries[-1], self._time_left(state))
            if self._bar is not None:
                self._bar.update(self._task, figures=figures)
            else:
                log.info(f"step {state.global_step}/{state.max_steps} | {figures}")
        elif "eval_loss" in logs:
            log.info(f"step {state.global_step}/{state.max_steps} | evaluation loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down, also when training ended with an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, state: Any) -> float:
        done = state.global_step - self._first_step
        return (time.perf_counter() - self._start) / max(done, 1) * (state.max_steps - state.global_step)


def figures_of(entry: Mapping[str, Any], seconds_left: float) -> str:
    """The figures of one line of ``metrics.jsonl`` in words; of several ranks the lowest and the highest memory."""
    parts = [f"loss {float(entry['loss']):.4f}"]
    if "lr" in entry:
        parts.append(f"lr {entry['lr']:.2e}")
    rate, ranks = entry["tokens_per_second"], entry.get("ranks", 1)
    parts.append(f"{rate:,.0f} tokens/s" + (f" ({rate / ranks:,.0f} a rank)" if ranks > 1 else ""))
    if "mfu" in entry:
        parts.append(f"{entry['mfu']:.1%} MFU")
    held = entry.get("memory_gib_of_ranks") or [entry["memory_gib"]]
    lowest, highest = f"{min(held):.1f}", f"{max(held):.1f}"
    parts.append(f"{highest} GiB" if lowest == highest else f"{lowest} to {highest} GiB a rank")
    parts.append(f"{duration(seconds_left)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in ``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def banner(args: Any, state: Any, model: nn.Module | None, dataloader: Any) -> str:
    """What is trained: examples, epochs, steps, batch, and the share of the parameters that is trained."""
    # The loader of an XLA device holds the ordinary one.
    dataset: Any = getattr(getattr(dataloader, "dataloader", dataloader), "dataset", None)
    # A stream is begun again until the steps are made: its epochs are not known beforehand.
    examples = "a stream of examples"
    # Accelerate's share of a stream has a length that raises.
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        examples = f"{len(dataset):,} examples, {state.num_train_epochs:,} epochs"
    batch, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    if get_device().type == "xla":
        ranks = xla.current_mesh().shape[xla.FSDP]
    shared = context_size(args)
    devices = f"{ranks} devices" if shared == 1 else f"{ranks // shared} groups of {shared} devices"
    lines = [
        f"training on {examples}, {state.max_steps:,} steps",
        f"  batch {batch} x accumulation {accumulation} x {devices} = {batch * accumulation * ranks // shared} a step",
    ]
    if model is not None:
        trained, total = parameter_counts(model)
        lines.append(f"  {trained:,} of {total:,} parameters are trained ({trained / max(total, 1):.2%})")
    return "\n".join(lines)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """``(trained, all)`` parameters, shared ones once; a quantised weight counts the numbers that it stands for."""
    counts: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in counts:
                counts[parameter] = numbers_in(module, parameter)
    return sum(count for p, count in counts.items() if p.requires_grad), sum(counts.values())

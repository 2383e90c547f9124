"""``metrics.jsonl``: one JSON object for each logged step of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .. import device, log
from ..parallel.process_group import tell_number
from .steps import StepWatch
from .utilisation import ceiling

FILE = "metrics.jsonl"
# Name in the log of transformers and TRL -> name in the file.
_NAMES = {"learning_rate": "lr"}
# Sums over the whole run that transformers logs at the end, not the figures of a step.
_SUMMARY = "train_runtime"


class MetricsWriter(TrainerCallback):
    """Writes ``metrics.jsonl`` in the output folder on the main rank, and keeps its lines for the report.

    Each line has ``step``, ``epoch``, ``time`` (seconds since training began), ``loss``, ``grad_norm``, ``lr``,
    ``tokens`` (of all ranks since training began), ``tokens_per_second`` (of all ranks since the last line), ``mfu``
    (the share of the devices' peak that products with the weights take, where the device is known and computes in 16
    bits), ``memory_gib`` (peak of this rank's device; of the process on a CPU), and whatever else the trainer logs. Of
    several ranks there are ``ranks`` and ``memory_gib_of_ranks`` (what each told last) too. Numbers that are not finite
    are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which JSON has no numbers for.

    A new run starts a new file; a resumed one goes on behind the step that it resumes from.

    Attributes:
        entries: The lines, as dicts.
        seconds: How long the run took so far.
    """

    def __init__(self, watch: StepWatch) -> None:
        self.entries: list[dict[str, Any]] = []
        self._watch = watch
        self._path: Path | None = None
        self._start = self._last = time.perf_counter()
        self._last_tokens = 0
        self._failed = False
        self._ceiling: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._start

    @property
    def trained_tokens(self) -> int:
        """Tokens of all ranks since training began."""
        return self._watch.trained_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the file: anew, or behind the step that the run resumes from."""
        self._start = self._last = time.perf_counter()
        self._last_tokens = self._watch.trained_tokens = 0
        self._failed = False
        self.entries = []
        model = kwargs.get("model")
        self._ceiling = None if model is None else ceiling(model, args, device.get_device())
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / FILE
        if state.global_step and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            self.entries = [entry for entry in map(_parsed, lines) if entry and entry["step"] <= state.global_step]
        self._write(self.entries, "w")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line. The other ranks tell the main one their memory."""
        ranks = getattr(args, "world_size", 1) if device.get_device().type != "xla" else 1
        memory, of_ranks = 0.0, []
        if logs is not None and "loss" in logs:
            memory = device.get_gpu_memory_stats()[1]
            of_ranks = tell_number("memory", memory) if ranks > 1 else []
        if self._path is None or logs is None or _SUMMARY in logs:
            return
        now, tokens = time.perf_counter(), self._watch.trained_tokens
        entry: dict[str, Any] = {"step": state.global_step, "time": round(now - self._start, 3)}
        entry |= {_NAMES.get(name, name): value for name, value in logs.items()}
        if "loss" in logs:
            entry["tokens"] = tokens
            rate = (tokens - self._last_tokens) / max(now - self._last, 1e-9)
            entry["tokens_per_second"] = round(rate, 1)
            if self._ceiling is not None:
                entry["mfu"] = round(rate / ranks / self._ceiling, 4)
            entry["memory_gib"] = round(memory, 3)
            if ranks > 1:
                entry["ranks"] = ranks
            if of_ranks:
                entry["memory_gib_of_ranks"] = [round(value, 3) for value in of_ranks]
            self._last, self._last_tokens = now, tokens
        self.entries.append(entry)
        self._write([entry], "a")

    def _write(self, entries: Sequence[Mapping[str, Any]], mode: str) -> None:
        """Write lines; a full disk costs the file, not the training."""
        if self._path is None or self._failed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(map(_line, entries))
        except OSError as problem:
            self._failed = True
            log.warning(f"{self._path.name} could not be written, training goes on without it: {problem}")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in entry.items()}, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parsed(line: str) -> dict[str, Any] | None:
    """One line of an earlier run; None for one that a crash left incomplete."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None

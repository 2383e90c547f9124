"""Where a fine-tuning step's time goes on the GPU: its kernels by name, and what it waits for between them.

    python benchmarks/training/profile_step.py --contender pantheraml --model DIR --mode lora --steps 14

Takes the arguments of ``contender.py`` and runs it, the last ``--profiled`` steps but one under torch's profiler. Only
the GPU's side is recorded: recording the host as well slows it down, and the gaps would be the profiler's. A chip at
its power limit runs slower while it never waits, so a step can take longer than its kernels and gaps here say.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import contender

# Gaps and kernels that are listed, and what a gap between two launches of a full queue may take.
LISTED = 30
LAUNCH_US = 5.0


class Interval(NamedTuple):
    """Work of the GPU, in microseconds."""

    name: str
    start: float
    end: float


class Gap(NamedTuple):
    """Time in which the GPU did nothing, in microseconds."""

    length: float
    after: str
    before: str


def gaps_of(intervals: Sequence[Interval]) -> tuple[float, list[Gap]]:
    """Time in which anything ran, and the gaps, of work that may overlap."""
    busy, gaps, last = 0.0, [], None
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if last is not None and interval.start > last.end:
            gaps.append(Gap(interval.start - last.end, last.name, interval.name))
        begun = interval.start if last is None else max(interval.start, last.end)
        busy += max(interval.end - begun, 0.0)
        if last is None or interval.end > last.end:
            last = interval
    return busy, gaps


def report(intervals: Sequence[Interval], steps: int) -> list[str]:
    """Lines that say it, a step."""
    busy, gaps = gaps_of(intervals)
    waits = [gap for gap in gaps if gap.length > LAUNCH_US]
    lines = [
        f"{len(intervals) / steps:.0f} launches, busy {busy / steps / 1e3:.2f} ms a step",
        f"gaps {sum(gap.length for gap in gaps) / steps / 1e3:.2f} ms a step, of which those over {LAUNCH_US:.0f} us "
        f"{sum(gap.length for gap in waits) / steps / 1e3:.2f} ms ({len(waits) / steps:.0f})",
    ]
    longest = sorted(waits, reverse=True)[:LISTED]
    lines += [f"{gap.length:8.0f} us after {gap.after[:60]} before {gap.before[:60]}" for gap in longest]
    total, count = collections.Counter(), collections.Counter()
    for interval in intervals:
        total[interval.name] += interval.end - interval.start
        count[interval.name] += 1
    for name, time in total.most_common(LISTED):
        lines.append(f"{time / steps / 1e3:8.2f} ms a step in {count[name] / steps:.0f} x {name[:90]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiled", type=int, default=3, help="steps under the profiler; default 3")
    options, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    last = contender.parse().steps - 1
    first = last - options.profiled + 1
    if first <= contender.WARM_UP:
        parser.error(f"--steps must be over {contender.WARM_UP + options.profiled}")
    if contender.parse().contender in ("unsloth", "pantheraml"):
        # These want to be imported before what they fuse.
        __import__(contender.parse().contender).FastLanguageModel  # noqa: B018
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback
    from trl import SFTTrainer

    if not torch.cuda.is_available():
        parser.error("no GPU here")
    profiler = profile(activities=[ProfilerActivity.CUDA])

    class Profiler(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step + 1 == first:
                torch.cuda.synchronize()
                profiler.start()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == last:
                torch.cuda.synchronize()
                profiler.stop()

    train = SFTTrainer.train

    def profiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Profiler())
        return train(self, *args, **kwargs)

    with mock.patch.object(SFTTrainer, "train", profiled):
        contender.main()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ranges = ("Optimizer.", "ProfilerStep")  # of the profiler's own, around kernels
    intervals = [
        Interval(e.name, e.time_range.start, e.time_range.end) for e in events if not e.name.startswith(ranges)
    ]
    print("\n".join(report(intervals, options.profiled)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

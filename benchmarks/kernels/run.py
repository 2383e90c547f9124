"""Times every fused op beside eager torch, torch.compile, Liger-Kernel and Unsloth's kernels, in one run on one GPU.

    python benchmarks/kernels/run.py --out benchmarks/reports [--ops rms_norm,swiglu] [--seconds 360] [--groups native]

First several processes compile what will be timed, side by side; then one process a group of contenders times case
after case, one at a time, the most telling cases first. ``--seconds`` bounds the whole run: what is left out is listed
in the report. ``--dry-run`` calls everything once at tiny sizes on the CPU, without peers that are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

# Processes of each group that compile side by side; the first of each also times.
WORKERS = {"native": 5, "unsloth": 2, "torch.compile": 3}
# The slowest to get ready: timed after the cases of the two first ranks, which are those of one length.
LAST = "torch.compile"
LAST_AFTER_RANK = 1
# Share of the time that compiling may take before timing starts.
COMPILE_SHARE = 0.35
# Longest wait for one answer; a process that takes longer is given up.
START_SECONDS, CASE_SECONDS = 150.0, 45.0
# For the last copies and the report.
CLOSING_SECONDS = 4.0
# Timed calls of one pass of one contender, in milliseconds.
MILLISECONDS = 12.0
# The length at which kernels are compiled ahead; their forms do not depend on it.
COMPILE_TOKENS = 2048
VERSIONS = ("torch", "triton", "liger-kernel", "unsloth", "bitsandbytes", "transformers")


class LostError(Exception):
    """A worker has ended or did not answer in time."""


class Worker:
    """A measuring process and the queue of its answers."""

    def __init__(self, group: str, ops: list[str], *, dry_run: bool) -> None:
        command = [sys.executable, str(HERE / "worker.py"), "--group", group, "--ops", ",".join(ops)]
        self.process = subprocess.Popen(
            [*command, *(["--dry-run"] if dry_run else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.group, self.answers = group, queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer."""
        try:
            value = self.answers.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.stop()
            raise LostError(f"no answer within {seconds:.0f} s") from None
        if value is None:
            raise LostError(f"the process ended with {self.process.wait()}")
        return value

    def ask(self, seconds: float, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise LostError(f"the process ended with {self.process.wait()}") from None
        return self.answer(seconds)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def say(text: str) -> None:
    print(text, flush=True)


def start(groups: list[str], ops: list[str], *, dry_run: bool) -> dict[str, list[Worker]]:
    """The processes of each group."""
    return {g: [Worker(g, ops, dry_run=dry_run) for _ in range(1 if dry_run else WORKERS[g])] for g in groups}


def compile_ahead(workers: dict[str, list[Worker]], cases: list[Any], until: float) -> dict[str, str]:
    """Let all processes call the cases once, and keep the first of each group; what became of a group that is lost."""
    from cases import OF_WEIGHTS

    pending: dict[str, queue.Queue[int]] = {group: queue.Queue() for group in workers}
    for number, case in enumerate(cases):
        for group in workers:
            if case.compiled if group == LAST else case.tokens == COMPILE_TOKENS or case.op in OF_WEIGHTS:
                pending[group].put(number)
    lost: dict[str, str] = {}

    def serve(worker: Worker, *, first: bool) -> None:
        try:
            ready = worker.answer(START_SECONDS)
            if "error" in ready:
                raise LostError(ready["error"])
            while time.monotonic() < until:
                number = pending[worker.group].get_nowait()
                worker.ask(until + CASE_SECONDS - time.monotonic(), case=number, milliseconds=None)
        except queue.Empty:
            pass
        except LostError as error:
            if first:
                lost[worker.group] = str(error)
        if not first:
            worker.stop()

    threads = [
        threading.Thread(target=serve, args=(worker,), kwargs={"first": i == 0})
        for group in workers.values()
        for i, worker in enumerate(group)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group, text in lost.items():
        say(f"{group}: {text}")
    return lost


def environment(cases: list[Any], ops: list[str]) -> dict[str, Any]:
    """Versions and hardware, for the report's head."""
    import torch
    from workload import DTYPE

    versions = {}
    for package in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": platform.python_version(),
        "versions": versions,
        "dtype": str(DTYPE).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/kernels/run.py " + " ".join(sys.argv[1:]),
        "ops": ops,
    }


def copies(workers: dict[str, Worker], when: str) -> dict[str, float]:
    """Copy bandwidth as each process sees it."""
    found = {}
    for group, worker in workers.items():
        with contextlib.suppress(LostError):
            answer = worker.ask(CASE_SECONDS, case=None, milliseconds=None)
            found[f"{group} {when}"] = answer["copy_bytes_per_second"]
    return found


def empty_record(case: Any) -> dict[str, Any]:
    """What a record says besides its results."""
    w = case.workload
    record = {name: getattr(w, name) for name in ("shape", "forward_bytes", "backward_bytes")}
    record |= {name: getattr(w, name) for name in ("forward_flops", "backward_flops")}
    return record | {"op": case.op, "model": case.model, "tokens": case.tokens, "results": {}}


def steps(cases: list[Any], groups: list[str]) -> list[tuple[int, list[str]]]:
    """Numbers of cases and the groups that time them, in order."""
    usual = [group for group in groups if group != LAST]
    early = [(n, usual) for n, case in enumerate(cases) if case.rank <= LAST_AFTER_RANK]
    late = [(n, usual) for n, case in enumerate(cases) if case.rank > LAST_AFTER_RANK]
    compiled = [(n, [LAST]) for n, case in enumerate(cases) if case.compiled] if LAST in groups else []
    return [*early, *compiled, *late]


def time_all(
    cases: list[Any], workers: dict[str, Worker], lost: dict[str, str], options: argparse.Namespace, until: float
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Time case after case until the time is over; after each, the records so far and what is left."""
    from worker import names_of

    records: dict[int, dict[str, Any]] = {}
    pending = steps(cases, list(workers))
    while pending and time.monotonic() < until and "native" in workers:
        number, groups = pending.pop(0)
        case = cases[number]
        record = records.setdefault(number, empty_record(case))
        for group in groups:
            if group not in workers or not names_of(group, case):
                continue
            try:
                answer = workers[group].ask(CASE_SECONDS, case=number, milliseconds=options.milliseconds)
                record["results"] |= answer
            except LostError as error:
                lost[group] = f"{error} in {case.label}"
                say(f"{group}: {lost[group]}")
                del workers[group]
        left = [f"{cases[n].label}{' (torch.compile)' if g == [LAST] else ''}" for n, g in pending]
        yield list(records.values()), left


def parse(known: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(known), help="comma-separated; all by default")
    parser.add_argument("--groups", default=",".join(WORKERS), help="comma-separated processes of contenders")
    parser.add_argument("--seconds", type=float, default=360.0, help="for the whole run; default 360")
    parser.add_argument("--milliseconds", type=float, default=MILLISECONDS, help="of timed calls a pass; default 12")
    parser.add_argument("--out", type=Path, help="folder for the markdown and JSON files")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, nothing timed")
    options = parser.parse_args()
    options.ops, options.groups = options.ops.split(","), options.groups.split(",")
    for what, given, allowed in (("op", options.ops, known), ("group", options.groups, list(WORKERS))):
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            parser.error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(allowed)}")
    return options


def main() -> int:
    """Run the benchmark; 1 when one of our kernels failed or was wrong."""
    started = time.monotonic()
    import cases as table
    import report

    options = parse(list(table.OPS))
    everyone = start(options.groups, options.ops, dry_run=options.dry_run)
    cases = table.all_cases(options.ops, tiny=options.dry_run)
    about = environment(cases, options.ops)
    if about["gpu"] == "no GPU" and not options.dry_run:
        print("this benchmark needs a GPU, or --dry-run", file=sys.stderr)
        return 2
    until = started + options.seconds * COMPILE_SHARE
    lost = compile_ahead(everyone, [] if options.dry_run else cases, until)
    workers = {group: team[0] for group, team in everyone.items() if group not in lost}
    if "native" not in workers:
        print(f"our own process was lost: {lost.get('native')}", file=sys.stderr)
        return 1
    say(f"compiled after {time.monotonic() - started:.0f} s; timing {', '.join(workers)}")
    about |= {"copy_bytes_per_second": copies(workers, "before"), "groups": lost, "budget": options.seconds}
    about["bandwidth"] = about["copy_bytes_per_second"]["native before"]
    records: list[dict[str, Any]] = []
    saved = time.monotonic()
    for records, left_out in time_all(cases, workers, lost, options, started + options.seconds - CLOSING_SECONDS):
        about |= {"left_out": left_out, "seconds": time.monotonic() - started}
        if options.out is not None and time.monotonic() - saved > 15:
            saved = time.monotonic()
            report.write(options.out, records, about)
    about["copy_bytes_per_second"] |= copies(workers, "after")
    about["seconds"] = time.monotonic() - started
    for worker in workers.values():
        worker.stop()
    if options.out is not None:
        report.write(options.out, records, about)
    say(report.markdown(records, about))
    return int(any("error" in record["results"].get("ours", {"error": ""}) for record in records))


if __name__ == "__main__":
    sys.exit(main())

"""Times fine-tuning steps beside the peers, each contender in a process of its own, one after another on one machine.

    python benchmarks/training/run.py --out benchmarks/reports
    python benchmarks/training/run.py --out DIR --cases 8b-lora,1b-lora --contenders pantheraml,unsloth/default,hf
    python benchmarks/training/run.py --out DIR --dry-run

Appends one JSON line a row to ``DIR/training_DEVICE.jsonl`` as soon as it is measured and writes the report,
``DIR/training_DEVICE.md``, from all lines of that file, so that several calls make one report. Only rows of one call
are compared with each other. A row that fails is recorded with the end of its log; one for which no time is left is
not.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cases
import report
import shapes
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "xformers"),
    *("liger-kernel", "unsloth", "unsloth_zoo"),
)
# With less time than this no further row is begun: importing and loading alone take as long.
LEAST_S = 45
ENDING_S = 35


def environment() -> dict[str, str]:
    """This checkout first on the path of the contenders."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def command_of(case: cases.Workload, row: cases.Row, model: Path) -> list[str]:
    """The command line of one row."""
    command = [sys.executable, str(HERE / "contender.py"), "--contender", row.contender, "--model", str(model)]
    command += ["--mode", case.mode, "--length", str(case.length), "--batch", str(case.batch)]
    command += ["--steps", str(case.steps), "--rank", str(case.rank)]
    command += ["--checkpointing", json.dumps(row.checkpointing)]
    for name, keywords in (("--load", row.load), ("--adapt", row.adapt)):
        command += [name, json.dumps(dict(keywords))] if keywords else []
    return command


def end(process: subprocess.Popen[Any]) -> None:
    """End a contender that still runs; what one left behind holds would be missing to the next."""
    if process.poll() is not None:
        return
    # A launcher ends its ranks when it is asked to end, and leaves them behind when it is killed.
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(
    command: list[str], limit_s: float, log: Path, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one contender and return its record, or what went wrong under ``error``."""
    variables = environment() | (variables or {})
    with log.open("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT)
        try:
            ended = f"exit code {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit_s:.0f} s"
        finally:
            end(process)
    text = log.read_text(errors="replace")
    found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
    if found is not None:
        return json.loads(found.group(1))
    # After a failed rank torchrun adds pages of its own.
    text = re.split(r"^.*torch/distributed/elastic/.*\] failed ", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Warning" not in line]
    return {"error": f"{ended}: " + " / ".join(lines[-4:])[-500:]}


def slug(device: str) -> str:
    """The name of a device as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def versions() -> dict[str, str]:
    """Installed versions of what matters, and the commit that is measured."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return found | ({"pantheraml": f"commit {commit}"} if commit else {})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the lines and the report")
    parser.add_argument("--cases", default="all", help=f"of {', '.join(cases.CASES)}; default all")
    parser.add_argument("--contenders", default="all", help="contenders, or contender/variant; default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that cannot end in this time")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of each case's own")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-models")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-logs")
    parser.add_argument("--append-to", type=Path, help="lines of earlier calls, copied to --out first")
    parser.add_argument("--dry-run", action="store_true", help="every row at a tiny size, on a CPU too")
    options = parser.parse_args()
    try:
        options.selected = cases.select(options.cases, options.contenders)
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run measures a tiny shape on a CPU")
    return options


def main() -> int:
    options = parse()
    # As an interrupt does, so that the contender of the moment is ended too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    deadline = time.monotonic() + options.seconds
    device = "no device (dry run)" if options.dry_run else torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    call = {"call": now, "device": device, "versions": versions(), "command": shlex.join(["python", *sys.argv])}
    call["dry_run"] = options.dry_run
    for folder in (options.out, options.logs):
        folder.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"training_{slug(device)}.jsonl"
    if options.append_to is not None and not lines.exists():
        shutil.copyfile(options.append_to, lines)
    os.environ.setdefault("BENCHMARK_OUTPUT", str(options.logs / "output"))
    for name, full in options.selected.items():
        case = full.tiny() if options.dry_run else full
        case = case if options.steps is None else dataclasses.replace(case, steps=options.steps)
        model = shapes.write(case.shape, options.models)
        for repeat in range(case.repeats):
            for row in case.rows:
                left = deadline - time.monotonic()
                if left < LEAST_S:
                    print(f"{name} {row.name}: no time left", flush=True)
                    continue
                log = options.logs / f"{name}-{row.name.replace('/', '-')}-{repeat}.log"
                command = command_of(case, row, model)
                record = measure(command, min(case.limit_s, left), log, row.environment)
                about = {"case": name, "row": row.name, "repeat": repeat, "contender_command": shlex.join(command[1:])}
                about |= {"environment": dict(row.environment)} if row.environment else {}
                with lines.open("a") as file:
                    file.write(json.dumps(call | about | record) + "\n")
                shown = {key: value for key, value in record.items() if key not in ("steps", "adapted")}
                print(f"{name} {row.name}: {json.dumps(shown)}", flush=True)
    page = lines.with_suffix(".md")
    page.write_text(report.render(report.read([lines])))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

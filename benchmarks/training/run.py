"""Times fine-tuning steps beside the peers, each contender in a process of its own, one after another on one machine.

    python benchmarks/training/run.py --out benchmarks/reports
    python benchmarks/training/run.py --out DIR --cases 8b-lora,1b-lora --contenders pantheraml,unsloth

Writes a markdown report and a JSON file of all figures. A contender that fails is recorded with the end of its log.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import shapes
import torch

HERE = Path(__file__).resolve().parent
CONTENDERS = ("transformers", "liger", "unsloth", "pantheraml")
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth", "pantheraml")
TIMEOUT_S = 240
# The first steps in which a contender's losses are compared with those of plain transformers.
COMPARED_STEPS = 20


@dataclass(frozen=True)
class Case:
    """One row group of the report."""

    shape: str
    mode: str
    length: int = 2048
    batch: int = 4
    checkpointing: str = "default"

    def title(self) -> str:
        forced = {"default": "", "all": ", every layer recomputed", "none": ", nothing recomputed"}[self.checkpointing]
        return f"{self.shape} {self.mode}, {self.length} x {self.batch}{forced}"


CASES = {
    "8b-lora": Case("llama-3.1-8b", "lora"),
    "8b-lora-recompute": Case("llama-3.1-8b", "lora", checkpointing="all"),
    "8b-qlora": Case("llama-3.1-8b", "qlora"),
    "8b-qlora-32k": Case("llama-3.1-8b", "qlora", length=32768, batch=1),
    "1b-lora": Case("llama-3.2-1b", "lora"),
    "4b-lora": Case("qwen3-4b", "lora"),
    "2b-lora": Case("gemma-2-2b", "lora"),
    "1b-full": Case("llama-3.2-1b", "full"),
    "tiny": Case("tiny", "lora", length=64, batch=2),
}


def measure(case: Case, contender: str, model: Path, steps: int) -> dict:
    """Run one contender and return its record, or the end of its log under ``error``."""
    command = [sys.executable, str(HERE / "contender.py"), "--contender", contender, "--model", str(model)]
    command += ["--mode", case.mode, "--length", str(case.length), "--batch", str(case.batch)]
    command += ["--steps", str(steps), "--checkpointing", case.checkpointing]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"contender": contender, "error": f"took longer than {TIMEOUT_S} s"}
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"contender": contender, "error": " / ".join(lines[-3:])[:400]}
    return json.loads(found.group(1))


def loss_difference(record: dict, reference: dict | None) -> float | None:
    """Largest relative difference of the first steps' losses from plain transformers."""
    if reference is None or "steps" not in record or "steps" not in reference:
        return None
    pairs = list(zip(record["steps"], reference["steps"]))[:COMPARED_STEPS]
    return max((abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs), default=None)


def table(records: list[dict]) -> str:
    """One case as a markdown table; the factor is against the fastest peer."""
    by_name = {record["contender"]: record for record in records}
    reference = by_name.get("transformers")
    peers = [r["tokens_per_second"] for n, r in by_name.items() if n != "pantheraml" and "error" not in r]
    lines = [
        "| contender | tokens/s | x best peer | peak GiB | step ms | first step s | import, load s | loss differs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if "error" in record:
            lines.append(f"| {record['contender']} | failed: {record['error'].replace('|', '/')} | | | | | | |")
            continue
        factor = record["tokens_per_second"] / max(peers) if peers and record["contender"] == "pantheraml" else None
        difference = loss_difference(record, reference) if record is not reference else None
        low, high = record["step_ms_range"]
        cells = [
            record["contender"],
            f"{record['tokens_per_second']:,.0f}",
            "" if factor is None else f"{factor:.2f}",
            "" if record["peak_gib"] is None else f"{record['peak_gib']:.1f}",
            f"{record['step_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{record['first_step_s']:.1f}",
            f"{record['import_s'] + record['load_s']:.1f}",
            "" if difference is None else f"{difference:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    plans = [f"- {r['contender']}: {r['plan']}" for r in records if r.get("plan")]
    return "\n".join(lines + (["", *plans] if plans else []))


def versions() -> str:
    """Installed versions of what matters."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(name for name in CASES if name != "tiny"))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--models", type=Path, default=Path("outputs/benchmark-models"))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    results: dict[str, list[dict]] = {}
    day = datetime.date.today().isoformat()
    sections = [
        f"# Fine-tuning steps on {device}",
        "",
        f"{day}; Python {platform.python_version()}, {versions()}.",
        f"Command: `python benchmarks/training/run.py {' '.join(sys.argv[1:])}`.",
        "",
        "Random weights, no padding, LoRA rank 16 on all seven projections; medians after three steps. Losses are",
        "compared with those of plain transformers, step by step.",
    ]
    for name in options.cases.split(","):
        case = CASES[name]
        model = shapes.write(case.shape, options.models)
        records = []
        for contender in options.contenders.split(","):
            records.append(measure(case, contender, model, options.steps))
            print(name, json.dumps({k: v for k, v in records[-1].items() if k != "steps"}), flush=True)
        results[name] = records
        sections += ["", f"## {case.title()}", "", table(records)]
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"training_{re.sub(r'[^A-Za-z0-9]+', '-', device)}_{day}"
    (options.out / f"{stem}.md").write_text("\n".join(sections) + "\n")
    (options.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(options.out / f"{stem}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times fine-tuning steps on one GPU and on several of one host, beside the peers, one contender after another.

    python benchmarks/training/scaling.py --out benchmarks/reports
    python benchmarks/training/scaling.py --out DIR --seconds 560 --cases 8b-lora,8b-full-fsdp --ranks 1,2
    python benchmarks/training/scaling.py --out DIR --cases 70b-qlora-fsdp --ranks 2 --layers 8 --models /dev/shm/models
    python benchmarks/training/scaling.py --out DIR --dry-run

Every row is launched by torchrun, with one process too. Writes ``DIR/scaling_DEVICE_DATE.json`` after each row, the
most important rows first, and the report beside it as ``.md``. Calls that find the file add to it; only rows of one
call are compared. A row that fails is recorded with the end of its log; one for which no time is left is not begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import run
import shapes
import torch

HERE = Path(__file__).resolve().parent
Line = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A library with one choice of training arguments.

    Attributes:
        name: ``hf``, ``liger``, ``unsloth`` or ``pantheraml``.
        variant: Name of the choice.
        arguments: Further training arguments.
        bar: Tokens a second as a multiple of the peer's, at least, or None.
    """

    name: str
    variant: str = "default"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bar: float | None = None

    @property
    def row(self) -> str:
        """``name/variant``."""
        return f"{self.name}/{self.variant}"


@dataclass(frozen=True)
class Case:
    """A model, a mode and how it is spread over GPUs.

    Attributes:
        title: Heading in the report.
        shape: A name in ``shapes.SHAPES``.
        mode: ``"lora"``, ``"qlora"`` or ``"full"``.
        contenders: The most important first; a later one than the first may stand in as the peer.
        peers: Rows that the factor is relative to, the first that ran.
        ranks: Numbers of processes, one a GPU.
        fsdp: Whether the model is sharded, not copied.
        in_shards: Whether it is loaded in shards as well, from a checkpoint whose one layer is read as every layer.
        layers: Number of decoder layers, default the shape's.
        efficiency: For a number of ranks, the least share of one rank's tokens a second that each should keep.
        batch: Sequences of a step on each rank.
        length: Tokens of a sequence.
        steps: Optimizer steps.
        limit_s: Seconds after which a row is given up.
    """

    title: str
    shape: str
    mode: str
    contenders: tuple[Contender, ...]
    peers: tuple[str, ...]
    ranks: tuple[int, ...]
    fsdp: bool = False
    in_shards: bool = False
    layers: int | None = None
    efficiency: Mapping[int, float] = field(default_factory=dict)
    batch: int = 4
    length: int = 2048
    steps: int = 16
    limit_s: int = 200

    def tiny(self) -> Case:
        """The same rows at a size for a CPU, to see that everything works."""
        ranks = (1, 2) if 1 in self.ranks else (2,)
        return dataclasses.replace(self, shape="tiny", layers=None, length=64, batch=2, steps=5, ranks=ranks)


# Accelerate's mixed precision keeps the trained weights in float32. Without it they stay in bfloat16, as loaded.
_BF16_WEIGHTS = {"bf16": False}

CASES: dict[str, Case] = {
    "8b-lora": Case(
        "Llama-3.1-8B, LoRA, a copy on each GPU",
        "llama-3.1-8b",
        "lora",
        (Contender("pantheraml", bar=1.4), Contender("unsloth"), Contender("liger")),
        ("unsloth/default", "liger/default"),
        (1, 2, 4, 8),
        efficiency={2: 0.97, 4: 0.95},
    ),
    "8b-full-fsdp": Case(
        "Llama-3.1-8B, full fine-tuning, sharded",
        "llama-3.1-8b",
        "full",
        (
            Contender("pantheraml", bar=1.2),
            Contender("liger"),
            Contender("hf"),
            Contender("liger", "bf16", _BF16_WEIGHTS),
        ),
        ("liger/default", "liger/bf16", "hf/default"),
        (2, 4, 8),
        fsdp=True,
        batch=2,
    ),
    "8b-lora-fsdp": Case(
        "Llama-3.1-8B, LoRA, sharded",
        "llama-3.1-8b",
        "lora",
        (Contender("pantheraml", bar=1.2), Contender("liger")),
        ("liger/default",),
        (2, 4, 8),
        fsdp=True,
    ),
    "8b-qlora-fsdp": Case(
        "Llama-3.1-8B, QLoRA, sharded",
        "llama-3.1-8b",
        "qlora",
        (Contender("pantheraml", bar=1.2), Contender("liger")),
        ("liger/default",),
        (2, 4, 8),
        fsdp=True,
    ),
    # Of the peers none reads such a model in shards: each rank would hold it whole on its GPU or in host memory.
    "70b-qlora-fsdp": Case(
        "Llama-3.1-70B, QLoRA, loaded in shards",
        "llama-3.1-70b",
        "qlora",
        (Contender("pantheraml"),),
        (),
        (2, 4, 8),
        fsdp=True,
        in_shards=True,
        batch=2,
        steps=8,
        limit_s=540,
    ),
}


def command_of(case: Case, contender: Contender, ranks: int, model: Path) -> list[str]:
    """The command line of one row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(HERE / "contender.py"), "--contender", contender.name, "--model", str(model)]
    command += ["--mode", case.mode, "--length", str(case.length), "--batch", str(case.batch)]
    command += ["--steps", str(case.steps)]
    command += ["--checkpointing", "true" if contender.name in ("hf", "liger") else '"unsloth"']
    if contender.arguments:
        command += ["--arguments", json.dumps(dict(contender.arguments))]
    command += ["--in-shards", "--repeated"] if case.in_shards else []
    return command + (["--fsdp"] if case.fsdp else [])


def rows_of(case: Case, most: int, contenders: set[str]) -> list[tuple[int, Contender]]:
    """Ranks and contender of each row: ours and the first peer at every number of ranks before the other peers."""
    chosen = [c for c in case.contenders if {c.name, c.row, "all"} & contenders]
    ranks = [r for r in case.ranks if r <= most]
    return [(r, c) for part in (chosen[:2], chosen[2:]) for c in part for r in ranks]


def efficiency(line: Line, call: Sequence[Line]) -> float | None:
    """Tokens a second of each rank as a share of those of one rank, of the same contender in the same call."""
    alone = [a for a in call if a["row"] == line["row"] and a["ranks"] == 1 and "error" not in a]
    if line["ranks"] == 1 or not alone:
        return None
    return line["tokens_per_second"] / alone[-1]["tokens_per_second"]


def _peer(line: Line, call: Sequence[Line], peers: Sequence[str]) -> Line | None:
    same = {a["row"]: a for a in call if a["ranks"] == line["ranks"] and "error" not in a}
    return next((same[name] for name in peers if name in same), None)


def _judged(value: float, least: float) -> str:
    return f"{least:g} {'met' if value >= least else 'missed'}"


def table(case: Case, call: Sequence[Line]) -> list[str]:
    """Speed, scaling, memory and loss of one call's rows."""
    head = ["row", "GPUs", "tokens/s a GPU", "of one GPU", "x peer", "bars", "peak GiB a GPU (reserved)"]
    head += ["step ms, median (min to max)", "trained weights", "loss, first and last step"]
    body = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    bars = {c.row: c.bar for c in case.contenders}
    for line in call:
        if "error" in line:
            cells = [line["row"], str(line["ranks"]), f"failed: {line['error'].replace('|', '/')}", *[""] * 7]
            body.append(f"| {' | '.join(cells)} |")
            continue
        share, peer = efficiency(line, call), _peer(line, call, case.peers)
        ours = line["row"].startswith("pantheraml/")
        told = []
        if ours and not line["dry_run"]:
            least = case.efficiency.get(line["ranks"])
            told += [f"scaling {_judged(share, least)}"] if share is not None and least is not None else []
            if peer is not None and bars.get(line["row"]) is not None:
                told.append(f"x {_judged(line['tokens_per_second'] / peer['tokens_per_second'], bars[line['row']])}")
                if case.fsdp and line["peak_gib"] is not None:
                    told.append(f"peak {'lower' if line['peak_gib'] < peer['peak_gib'] else 'not lower'}")
        median, low, high = line["step_ms"]
        cells = [
            line["row"],
            str(line["ranks"]),
            f"{line['tokens_per_second']:,.0f}",
            "" if share is None else f"{share:.1%}",
            "" if peer is None else f"{line['tokens_per_second'] / peer['tokens_per_second']:.2f} {peer['row']}",
            "; ".join(told),
            "" if line["peak_gib"] is None else f"{line['peak_gib']:.2f} ({line['reserved_gib']:.2f})",
            f"{median:,.1f} ({low:,.1f} to {high:,.1f})",
            ", ".join(f"{count:,} {dtype}" for dtype, count in line["weights"].items()),
            f"{line['steps'][0]['loss']:.4f}, {line['steps'][-1]['loss']:.4f}",
        ]
        body.append(f"| {' | '.join(cells)} |")
    return body


def loading(line: Line) -> str:
    """How long a row's load took, and what a rank held at most in it."""
    held = [f"{line['load_host_gib']:.1f} GiB of host memory besides file pages"]
    if line["load_peak_gib"] is not None:
        held.insert(
            0, f"{line['load_peak_gib']:.2f} GiB of its GPU, {line['construct_peak_gib']:.2f} GiB until it trained"
        )
    layers = f"{line['layers']} layers, " if line["layers"] is not None else ""
    return f"{layers}loaded by {line['ranks']} ranks in {line['load_s']:.0f} s; a rank held at most {', '.join(held)}"


def render(lines: Sequence[Line]) -> str:
    """The whole report in markdown."""
    page = [
        f"# Fine-tuning on several GPUs: {', '.join(dict.fromkeys(line['device'] for line in lines))}",
        "",
        "Random weights in the shapes of real models, random tokens without padding, TRL's `SFTTrainer`, LoRA of rank",
        "16 on all seven projections, every row launched by torchrun in processes of its own. Times are those of the",
        "steps after the third, on rank 0; the peak is the largest of all ranks. `hf` is transformers, PEFT, TRL and",
        "Accelerate as they are, `liger` the same with Liger's kernels, both with checkpointing; sharded rows use",
        "Accelerate's FSDP2. `bf16` is without mixed precision, so that the trained weights stay in bfloat16. Sharded",
        "full fine-tuning is with AdamW in the dtype of the weights. Of a model that is loaded in shards one decoder",
        "layer is on disk, in 16 bits, and is read, quantised and divided as every layer.",
    ]
    for name, case in CASES.items():
        for call in report.calls_of(lines, name):
            page += ["", f"## {case.title}", "", f"`{name}`, {call[0]['length']:,} x {call[0]['batch']} tokens a GPU;"]
            page += [f"call of {call[0]['call']}, {call[0]['device']}.", "", *table(case, call)]
            facts = [(line["row"], line[key]) for line in call for key in ("plan", "adapted") if line.get(key)]
            facts += [(line["row"], loading(line)) for line in call if case.in_shards and "error" not in line]
            page += ["", *(f"- {row}: {text}" for row, text in dict.fromkeys(facts))] if facts else []
    page += ["", "## Calls", ""]
    for call, line in {line["call"]: line for line in lines}.items():
        told = ", ".join(f"{package} {version}" for package, version in line["versions"].items())
        page.append(f"- {call}, {line['device']}: `{line['command']}` with {told}")
    return "\n".join(page) + "\n"


def write(lines: Iterable[Line], path: Path) -> None:
    """Write the lines and the report made of them."""
    kept = list(lines)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    path.with_suffix(".md").write_text(render(kept))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the lines and the report")
    parser.add_argument("--cases", default="all", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--contenders", default="all", help="contenders, or contender/variant; default all")
    parser.add_argument("--ranks", help="numbers of GPUs, instead of each case's own that this host has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that cannot end in this time")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of each case's own")
    parser.add_argument("--layers", type=int, help="decoder layers of every model, instead of its shape's")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-models")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-logs")
    parser.add_argument("--append-to", type=Path, help="lines of earlier calls, taken over")
    parser.add_argument("--dry-run", action="store_true", help="every row at a tiny size, on a CPU too")
    options = parser.parse_args()
    options.selected = list(CASES) if options.cases == "all" else options.cases.split(",")
    if unknown := sorted(set(options.selected) - set(CASES)):
        parser.error(f"unknown: {', '.join(unknown)}; cases: {', '.join(CASES)}")
    options.contenders = set(options.contenders.split(","))
    known = {"all", *(n for case in CASES.values() for c in case.contenders for n in (c.name, c.row))}
    if options.contenders - known:
        parser.error(f"unknown contenders; there are {', '.join(sorted(known))}")
    if not options.dry_run and torch.cuda.device_count() < 2:
        parser.error("this host has fewer than two GPUs; --dry-run measures a tiny shape on a CPU")
    return options


def main() -> int:
    options = parse()
    deadline = time.monotonic() + options.seconds
    now = datetime.datetime.now(datetime.UTC)
    device = "no device (dry run)" if options.dry_run else torch.cuda.get_device_name()
    most = 2 if options.dry_run else torch.cuda.device_count()
    about = {"call": now.isoformat(timespec="seconds"), "device": device, "versions": run.versions()}
    about |= {"command": shlex.join(["python", *sys.argv]), "dry_run": options.dry_run}
    for folder in (options.out, options.logs):
        folder.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scaling_{run.slug(device)}_{now:%Y-%m-%d}.json"
    earlier = path if path.exists() else options.append_to
    lines: list[Line] = json.loads(earlier.read_text()) if earlier is not None else []
    for name in options.selected:
        case = CASES[name].tiny() if options.dry_run else CASES[name]
        if options.ranks is not None:
            case = dataclasses.replace(case, ranks=tuple(map(int, options.ranks.split(","))))
        case = case if options.steps is None else dataclasses.replace(case, steps=options.steps)
        if options.layers is not None and not options.dry_run:
            case = dataclasses.replace(case, layers=options.layers)
        model = shapes.write(case.shape, options.models, repeated=case.in_shards, layers=case.layers)
        for ranks, contender in rows_of(case, most, options.contenders):
            left = deadline - time.monotonic()
            if left < run.LEAST_S:
                print(f"{name} {contender.row} x{ranks}: no time left", flush=True)
                continue
            log = options.logs / f"{name}-{contender.row.replace('/', '-')}-x{ranks}.log"
            command = command_of(case, contender, ranks, model)
            record = run.measure(command, min(case.limit_s, left), log)
            row = {"case": name, "row": contender.row, "length": case.length, "batch": case.batch}
            row["layers"] = case.layers
            row["contender_command"] = shlex.join(command[1:])
            lines.append(about | row | record | {"ranks": ranks})
            write(lines, path)
            shown = {key: value for key, value in record.items() if key not in ("steps", "adapted")}
            print(f"{name} {contender.row} x{ranks}: {json.dumps(shown)}", flush=True)
    print(path.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes the report of fine-tuning steps from the lines that ``run.py`` wrote, of one call or of several.

python benchmarks/training/report.py benchmarks/reports/training_*.jsonl --out benchmarks/reports/training.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cases

# Relative difference from plain transformers that losses and gradient norms may have at each step.
LOSS_BAR = 2e-3
COMPARED_STEPS = 20
# The row that factors are relative to, and those that stand in for it where it failed.
PEERS = ("unsloth/default", "unsloth/uncompiled", "unsloth/eager", "liger/default", "hf/default")
# The row that losses are compared with, and what stands in where it does not fit the memory.
REFERENCES = ("hf/default", "liger/default")
# Seconds that import, load and first step may take beyond plain transformers.
START_BAR_S = 3.0

Line = dict[str, Any]


def read(files: Iterable[Path]) -> list[Line]:
    """The lines of all files."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def calls_of(lines: Sequence[Line], case: str) -> list[list[Line]]:
    """The lines of a case by call, oldest first, without calls all of whose rows a later call has too."""
    by_call: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["case"] == case:
            by_call.setdefault((line["call"], line["device"]), []).append(line)
    calls = [by_call[key] for key in sorted(by_call)]
    rows = [{(line["device"], line["row"], line.get("ranks", 1)) for line in call} for call in calls]
    return [call for i, call in enumerate(calls) if not any(rows[i] <= later for later in rows[i + 1 :])]


def _first(by_name: dict[str, Line], names: Sequence[str]) -> Line | None:
    return next((by_name[name] for name in names if name in by_name and "error" not in by_name[name]), None)


def reference_of(call: Sequence[Line], of_case: Sequence[Line]) -> Line | None:
    """What the losses of a call are compared with: a row of it, or else the last of the same case and device.

    Losses depend on neither the machine nor the moment: weights and data are the same in every call with as many steps,
    which data are drawn and shuffled for.
    """
    steps = {len(line["steps"]) for line in call if "steps" in line}
    for lines in (call, [line for line in of_case if line["device"] == call[0]["device"]]):
        for name in REFERENCES:
            found = [line for line in lines if line["row"] == name and len(line.get("steps", ())) in steps - {0, 1}]
            if found:
                return found[-1]
    return None


def differences(line: Line, reference: Line | None, key: str) -> list[float]:
    """Relative difference from the reference at each of the first steps; ``key`` is ``"loss"`` or ``"grad_norm"``."""
    if reference is None or line is reference or "error" in line or line["row"] == reference["row"]:
        return []
    pairs = list(zip(line["steps"], reference["steps"]))[:COMPARED_STEPS]
    return [abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in pairs]


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def _failed(line: Line, width: int) -> list[str]:
    return [line["row"], f"failed: {line['error'].replace('|', '/')}", *[""] * (width - 2)]


def _verdict(good: bool) -> str:
    return "met" if good else "missed"


def _bars(row: cases.Row, line: Line, peer: Line | None) -> str:
    """What the row should reach and whether it does."""
    if row.bar is None or peer is None or line["dry_run"]:
        return ""
    factor = line["tokens_per_second"] / peer["tokens_per_second"]
    told = [
        f"{row.bar.least:g} {_verdict(factor >= row.bar.least)}, aim {row.bar.aim:g} {_verdict(factor >= row.bar.aim)}"
    ]
    if row.bar.peak is not None and line["peak_gib"] is not None:
        told.append(f"peak {row.bar.peak:g} x {_verdict(line['peak_gib'] <= row.bar.peak * peer['peak_gib'])}")
    return "; ".join(told)


def _told(reference: Line | None, call: Sequence[Line]) -> str:
    """Which row losses are compared with, and of which call if of another."""
    if reference is None:
        return "-"
    return reference["row"] + ("" if reference["call"] == call[0]["call"] else f" of {reference['call']}")


def step_table(case: cases.Workload, call: Sequence[Line], reference: Line | None) -> list[str]:
    """Speed, memory and loss of each row of one call."""
    by_name = {line["row"]: line for line in call}
    peer = _first(by_name, PEERS)
    known = {row.name: row for row in case.rows}
    head = ["row", "tokens/s", f"x {peer['row'] if peer else 'peer'}", "bar", "peak GiB (reserved)"]
    head += ["step ms, median (min to max)", f"loss, largest difference from {_told(reference, call)}"]
    head += ["gradient norm, likewise", f"steps within {LOSS_BAR:g}"]
    body = []
    for name, line in by_name.items():
        if "error" in line:
            body.append(_failed(line, len(head)))
            continue
        row = known.get(name)
        loss, norm = (differences(line, reference, key) for key in ("loss", "grad_norm"))
        median, low, high = line["step_ms"]
        within = sum(a <= LOSS_BAR and b <= LOSS_BAR for a, b in zip(loss, norm))
        cells = [
            name,
            f"{line['tokens_per_second']:,.0f}",
            f"{line['tokens_per_second'] / peer['tokens_per_second']:.2f}" if peer else "",
            _bars(row, line, peer) if row else "",
            "" if line["peak_gib"] is None else f"{line['peak_gib']:.2f} ({line['reserved_gib']:.2f})",
            f"{median:,.1f} ({low:,.1f} to {high:,.1f})",
            f"{max(loss):.1e}" if loss else "",
            f"{max(norm):.1e}" if norm else "",
            f"{within} of {len(loss)}" + ("" if row is None or row.exact else ", not asked of fp8") if loss else "",
        ]
        body.append(cells)
    return _markdown(head, body)


def loss_tables(call: Sequence[Line], reference: Line | None) -> list[str]:
    """Loss and gradient norm of the reference at each step, and every other row's relative difference."""
    others = [line for line in call if reference is not None and differences(line, reference, "loss")]
    if reference is None or not others:
        return []
    told: list[str] = []
    for key, title in (("loss", "Loss"), ("grad_norm", "Gradient norm")):
        columns = [differences(line, reference, key) for line in others]
        body = [
            [str(step + 1), f"{values[key]:.4f}", *(f"{c[step]:.1e}" if step < len(c) else "" for c in columns)]
            for step, values in enumerate(reference["steps"][:COMPARED_STEPS])
        ]
        head = ["step", reference["row"], *(line["row"] for line in others)]
        told += [
            "",
            f"{title} of {_told(reference, call)}, and relative differences from it:",
            "",
            *_markdown(head, body),
        ]
    return ["", "<details><summary>Loss and gradient norm at each step</summary>", *told, "", "</details>"]


def start_table(call: Sequence[Line]) -> list[str]:
    """Import, load and first step of each process, in the order in which they ran."""

    def total(line: Line) -> float:
        return line["import_s"] + line["load_s"] + line["first_step_s"]

    plain = [total(line) for line in call if line["row"] == "hf/default" and "error" not in line]
    head = [
        "row",
        "process",
        "import s",
        "load s",
        "first step s",
        "sum s",
        "beyond plain",
        "trainer s",
        "steady step ms",
    ]
    body = []
    for line in call:
        if "error" in line:
            body.append(_failed(line, len(head)))
            continue
        beyond = total(line) - min(plain) if plain else None
        judged = beyond is not None and line["row"].startswith("pantheraml/") and not line["dry_run"]
        body.append(
            [
                line["row"],
                str(line["repeat"] + 1),
                *(f"{line[key]:.1f}" for key in ("import_s", "load_s", "first_step_s")),
                f"{total(line):.1f}",
                "" if beyond is None else f"{beyond:+.1f}" + (f", {_verdict(beyond <= START_BAR_S)}" if judged else ""),
                f"{line['construct_s']:.1f}",
                f"{line['step_ms'][0]:,.0f}",
            ]
        )
    return [
        *_markdown(head, body),
        "",
        f"Bar: at most {START_BAR_S:g} s beyond the faster process of plain transformers.",
    ]


def render(lines: Sequence[Line]) -> str:
    """The whole report in markdown."""
    devices = list(dict.fromkeys(line["device"] for line in lines))
    page = [
        f"# Fine-tuning steps on {', '.join(devices)}",
        "",
        "Random weights in the shapes of real models, random tokens without padding, TRL's `SFTTrainer`, LoRA on all",
        "seven projections, every contender from the same weights with the same data and in a process of its own.",
        "Times are those of the steps after the third. A factor is relative to the peer's default in the same call,",
        "or to the row that the column names where that did not run; losses, which depend on neither machine nor",
        "moment, are compared with plain transformers' in that call or else in another.",
        "`hf` is transformers, PEFT and TRL as they are, `liger` the same with Liger's kernels, both with",
        "checkpointing. `default` is what each contender does when nothing is chosen, `keep` a peer told to keep all",
        "activations, `recompute` and `capped` PantheraML told to recompute every layer from what waits in host",
        "memory: inputs, and for long rows all but the MLP's inner part, which alone is then computed again.",
        "`uncompiled` is Unsloth with `UNSLOTH_COMPILE_DISABLE=1`, where its default fails, `eager` with",
        "`TORCHDYNAMO_DISABLE=1`. In full fine-tuning the gradient's norm is a bfloat16 number, whose neighbours are",
        "0.4 to 0.8 % apart.",
    ]
    for name, case in cases.CASES.items():
        for call in calls_of(lines, name):
            size = f"{case.length:,} x {case.batch} tokens" + ("" if case.mode == "full" else f", rank {case.rank}")
            page += [
                "",
                f"## {case.title}",
                "",
                f"`{name}`, {size}; call of {call[0]['call']}, {call[0]['device']}.",
                "",
            ]
            reference = reference_of(call, [line for line in lines if line["case"] == name])
            page += start_table(call) if case.repeats > 1 else step_table(case, call, reference)
            told = [(line["row"], line[key]) for line in call for key in ("plan", "adapted") if line.get(key)]
            page += ["", *(f"- {row}: {text}" for row, text in dict.fromkeys(told))] if told else []
            page += [] if case.repeats > 1 else loss_tables(call, reference)
    page += ["", "## Calls", ""]
    for call, line in {line["call"]: line for line in lines}.items():
        told = ", ".join(f"{package} {version}" for package, version in line["versions"].items())
        page.append(f"- {call}, {line['device']}: `{line['command']}` with {told}")
    return "\n".join(page) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(render(read(options.lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

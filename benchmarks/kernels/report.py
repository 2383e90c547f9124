"""The benchmark's report: a markdown table and a JSON file of all figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workload import BARE, BARE_ADAPTERS, YARDSTICKS

COLUMNS = ("ours", "eager", "torch.compile", "liger", "unsloth", "bitsandbytes", BARE, BARE_ADAPTERS)
Record = dict[str, Any]


def _row(record: Record, direction: str, bandwidth: float, names: list[str]) -> str | None:
    """One line of the table for the forward or the backward, or None when nothing was timed."""
    key = f"{direction}_ms"
    results = record["results"]
    if not any(key in result for result in results.values()):
        return None
    ours = results.get("ours", {}).get(key)
    cells = []
    for name in names:
        result = results.get(name, {})
        cells.append("failed" if "error" in result else f"{result[key] * 1e3:.1f}" if key in result else "")
    rate = speed = over = ""
    if ours is not None:
        moved, flops = record[f"{direction}_bytes"], record[f"{direction}_flops"]
        if moved:
            rate = f"{moved / (ours * 1e-3) / bandwidth:.0%}"
        elif flops:
            rate = f"{flops / (ours * 1e-3) / 1e12:.0f} TFLOP/s"
        peers = {n: r[key] for n, r in results.items() if n not in ("ours", *YARDSTICKS) and key in r}
        if peers:
            best = min(peers, key=lambda name: peers[name])
            speed = f"{peers[best] / ours:.2f} {best}"
        bare = results.get(BARE, {}).get(key)
        if bare:
            extra = results.get(BARE_ADAPTERS, {}).get(key, 0.0) if direction == "backward" else 0.0
            over = f"{(ours - extra) / bare - 1:+.1%}"
    peak = results.get("ours", {}).get("peak_extra_mb")
    memory = f"{peak:.0f}" if peak is not None and direction == "forward" else ""
    host = results.get("ours", {}).get(f"{direction}_host_us")
    launch = f"{host:.0f}" if host is not None else ""
    head = [record["op"], record["model"], record["shape"], str(record["tokens"]), direction]
    return "| " + " | ".join([*head, rate, speed, over, *cells, launch, memory]) + " |"


def table(records: Iterable[Record], bandwidth: float) -> str:
    """The markdown table; times in microseconds."""
    records = list(records)
    present = {name for record in records for name in record["results"]}
    names = [name for name in COLUMNS if name in present]
    head = ["op", "model", "shape", "T", "pass", "of copy", "× best peer", "over bare"]
    columns = [*head, *(f"{name} µs" for name in names), "host µs", "peak MB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows = (_row(record, direction, bandwidth, names) for record in records for direction in ("forward", "backward"))
    return "\n".join([*lines, *(row for row in rows if row is not None)])


def _where(ops: dict[str, list[str]]) -> str:
    return "; ".join(f"{op} of {', '.join(where)}" for op, where in ops.items())


def _failures(records: Iterable[Record]) -> list[str]:
    """What failed, alike failures in one line."""
    grouped: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in records:
        for name, result in record["results"].items():
            if "error" in result:
                ops = grouped.setdefault((name, result["error"]), {})
                ops.setdefault(record["op"], []).append(f"{record['model']} T={record['tokens']}")
    return [f"- {name}: {error} ({_where(ops)})" for (name, error), ops in grouped.items()]


def markdown(records: list[Record], about: dict[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    copies = "; ".join(f"{name} {value / 1e12:.3f} TB/s" for name, value in about["copy_bytes_per_second"].items())
    failures = _failures(records)
    order = {op: i for i, op in enumerate(dict.fromkeys(about["ops"]))}
    shown = sorted(records, key=lambda record: (order[record["op"]], record["model"], record["tokens"]))
    parts = [
        f"# Kernels on {about['gpu']}",
        "",
        f"{about['date']}; Python {about['python']}, {versions}; {about['dtype']}. {about['seconds']:.0f} s in all.",
        f"Copy bandwidth, read and write of 1 GiB, in this run: {copies}. Command: `{about['command']}`.",
        "",
        "Medians of the device's time in microseconds, the L2 cache flushed before each call and the launches enqueued",
        "ahead. “of copy”: bytes that must move, per time, as a fraction of the first copy bandwidth (or TFLOP/s for",
        "products). “× best peer”: time of the fastest peer divided by ours, with its name. “over bare”: what ours",
        f"takes more than the frozen products alone ({BARE}), in the backward less the two products {BARE_ADAPTERS}.",
        "“host µs”: what the host needs to enqueue ours, autograd included. “peak MB”: memory that ours takes beyond",
        "its inputs over forward and backward. Unsloth and torch.compile run in processes of their own, one at a time.",
        *(f"{group}: {text}." for group, text in about["groups"].items()),
        "",
        table(shown, about["bandwidth"]),
    ]
    if failures:
        parts += ["", "Failures:", "", *failures]
    if about["left_out"]:
        parts += ["", f"Left out when {about['budget']:.0f} s were over: {'; '.join(about['left_out'])}."]
    return "\n".join([*parts, ""])


def write(folder: Path, records: list[Record], about: dict[str, Any]) -> Path:
    """Write ``kernels_<gpu>_<date>.md`` and ``.json``; during the run too, in case it is cut."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    stem = folder / f"kernels_{gpu}_{about['date']}"
    stem.with_suffix(".md").write_text(markdown(records, about))
    stem.with_suffix(".json").write_text(json.dumps({"environment": about, "records": records}, indent=1))
    return stem

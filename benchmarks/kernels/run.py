"""Times every fused op beside eager torch, torch.compile, Liger-Kernel and Unsloth's kernels, in one run on one GPU.

    python benchmarks/kernels/run.py --ops rms_norm,glu --out benchmarks/reports [--quick] [--contenders ours,eager]

Prints a markdown table and writes it with a JSON file of all figures to ``--out``. Times are medians of
``triton.testing.do_bench`` (which clears the L2 cache before each call). "of copy" is bytes that must move divided by
the time, as a fraction of the copy bandwidth measured in the same run. A contender that fails is recorded with its
error.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import registry  # noqa: E402

CONTENDERS = ("ours", "eager", "torch.compile", "liger", "unsloth")
COPY_BYTES = 1 << 30
VERSIONS = ("torch", "triton", "liger-kernel", "unsloth", "bitsandbytes")
Result = dict[str, Any]


def registries() -> list[Any]:
    """The registry modules that exist."""
    found = [registry]
    if importlib.util.find_spec("registry_matmul") is not None:
        found.append(importlib.import_module("registry_matmul"))
    return found


def median_ms(function: Callable[[], Any], *, quick: bool) -> float:
    """Median time of one call in milliseconds."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10 if quick else 25, rep=40 if quick else 100, return_mode="median")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a device-to-device copy of one GiB."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), quick=False)
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an op's result."""
    items = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return tuple(item for item in items if isinstance(item, torch.Tensor))


def leaves_of(workload: registry.Workload, inputs: registry.Inputs) -> registry.Inputs:
    """Copies of the inputs, with gradients where the workload asks for them."""
    return {name: t.clone().requires_grad_(name in workload.leaves) for name, t in inputs.items()}


def with_gradients(
    workload: registry.Workload, function: Callable[..., Any], inputs: registry.Inputs
) -> tuple[list[torch.Tensor], int]:
    """Outputs and gradients of one call, and the bytes it took at its peak beyond its inputs."""
    leaves = leaves_of(workload, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = as_tuple(function(**leaves))
    gradients: tuple[torch.Tensor, ...] = ()
    if workload.leaves:
        ends = [o for o in outputs if o.requires_grad]
        gradients = torch.autograd.grad(ends, [leaves[n] for n in workload.leaves], [torch.ones_like(o) for o in ends])
    torch.cuda.synchronize()
    return [t.detach() for t in (*outputs, *gradients)], torch.cuda.max_memory_allocated() - before


def difference(ours: list[torch.Tensor], eager: list[torch.Tensor]) -> float:
    """Largest difference of two lists of tensors, each relative to the largest value of the second.

    Differences are taken in slices, because widening a tensor of gigabytes at once could exhaust the memory.
    """

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.shape != b.shape:
            raise ValueError(f"ours has shape {tuple(a.shape)} and eager {tuple(b.shape)}")
        largest = error = 0.0
        for part_a, part_b in zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26)):
            wide = part_b.float()
            largest = max(largest, float(wide.abs().max()))
            error = max(error, float((part_a.float() - wide).abs().nan_to_num(nan=float("inf")).max()))
        return error / max(largest, 1e-6)

    return max(relative(a, b) for a, b in zip(ours, eager, strict=True))


def time_contender(
    workload: registry.Workload, function: Callable[..., Any], inputs: registry.Inputs, *, quick: bool
) -> Result:
    """Median forward and backward times in milliseconds."""
    leaves = leaves_of(workload, inputs)

    def forward() -> Any:
        return function(**leaves)

    result: Result = {"forward_ms": median_ms(forward, quick=quick)}
    if workload.leaves:
        outputs = [o for o in as_tuple(forward()) if o.requires_grad]
        upstream = [torch.randn_like(o) for o in outputs]
        wanted = [leaves[name] for name in workload.leaves]

        def backward() -> Any:
            return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

        result["backward_ms"] = median_ms(backward, quick=quick)
    return result


def contender_of(workload: registry.Workload, name: str) -> Callable[..., Any] | None:
    """The function of a contender, or None when the workload has none of that name."""
    if name == "torch.compile":
        return torch.compile(workload.contenders["eager"]()) if "eager" in workload.contenders else None
    return workload.contenders[name]() if name in workload.contenders else None


def measure(workload: registry.Workload, names: list[str], device: torch.device, *, quick: bool) -> dict[str, Result]:
    """Time all contenders of a workload. A failure of one is a result."""
    torch.manual_seed(0)
    inputs = workload.make(device)
    results: dict[str, Result] = {}
    expected = None
    for name in names:
        started = time.monotonic()
        try:
            function = contender_of(workload, name)
            if function is None:
                continue
            result: Result = {}
            values, peak = with_gradients(workload, function, inputs)
            result["peak_extra_mb"] = peak / 1e6
            if name == "ours":
                expected = values
            elif name == "eager" and expected is not None:
                results["ours"]["difference_from_eager"] = error = difference(expected, values)
                expected = None
                if not error <= workload.tolerance:
                    results["ours"] = {"error": f"wrong result: differs from eager by {error:.3g}"}
            del values
            result |= time_contender(workload, function, inputs, quick=quick)
            results[name] = result
        except Exception as error:  # noqa: BLE001 - a peer's failure is recorded, whatever it is
            results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        finally:
            results.setdefault(name, {})["seconds"] = time.monotonic() - started
            function = None
            gc.collect()
            torch.cuda.empty_cache()
    return {name: result for name, result in results.items() if result.keys() != {"seconds"}}


def row_of(record: Result, direction: str, bandwidth: float, names: list[str]) -> str | None:
    """One line of the markdown table for the forward or the backward, or None when nothing was timed."""
    key = f"{direction}_ms"
    results = record["results"]
    if not any(key in result or "error" in result for result in results.values()):
        return None
    ours = results.get("ours", {}).get(key)
    cells = []
    for name in names:
        result = results.get(name)
        if result is None:
            cells.append("")
        elif "error" in result:
            cells.append("failed")
        else:
            cells.append(f"{result[key] * 1e3:.1f}" if key in result else "")
    rate = speed = ""
    if ours is not None:
        moved, flops = record[f"{direction}_bytes"], record[f"{direction}_flops"]
        if moved:
            rate = f"{moved / (ours * 1e-3) / bandwidth:.0%}"
        elif flops:
            rate = f"{flops / (ours * 1e-3) / 1e12:.0f} TFLOP/s"
        peers = [r[key] for n, r in results.items() if n != "ours" and key in r]
        speed = f"{min(peers) / ours:.2f}" if peers else ""
    peak = results.get("ours", {}).get("peak_extra_mb")
    memory = f"{peak:.0f}" if peak is not None and direction == "forward" else ""
    head = [record["op"], record["model"], record["shape"], str(record["tokens"]), direction]
    return "| " + " | ".join([*head, rate, speed, *cells, memory]) + " |"


def table(records: list[Result], bandwidth: float, names: list[str]) -> str:
    """The markdown table; times in microseconds."""
    columns = ["op", "model", "shape", "T", "pass", "of copy", "× best peer", *(f"{n} µs" for n in names), "peak MB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows = (row_of(record, direction, bandwidth, names) for record in records for direction in ("forward", "backward"))
    lines += [row for row in rows if row is not None]
    failures = [
        f"- {r['op']}, {r['model']}, T={r['tokens']}, {name}: {result['error']}"
        for r in records
        for name, result in r["results"].items()
        if "error" in result
    ]
    return "\n".join([*lines, *(["", "Failures:", "", *failures] if failures else [])])


def environment(device: torch.device) -> Result:
    """Versions and hardware, for the report's head."""
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"gpu": torch.cuda.get_device_name(device), "python": platform.python_version(), "versions": versions}


def report(records: list[Result], about: Result, bandwidth: float, names: list[str]) -> str:
    """The whole markdown report."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(
        [
            f"# Kernels on {about['gpu']}",
            "",
            f"{about['date']}; Python {about['python']}, {versions}; {str(registry.DTYPE).removeprefix('torch.')}.",
            f"Copy bandwidth in this run: {bandwidth / 1e12:.2f} TB/s (read and write). Command: `{about['command']}`.",
            "",
            "Medians in microseconds. “of copy”: bytes that must move, per time, as a fraction of the copy bandwidth",
            "(or TFLOP/s for products). “× best peer”: time of the fastest other contender divided by ours.",
            "“peak MB”: memory that ours takes beyond its inputs over forward and backward.",
            "",
            table(records, bandwidth, names),
            "",
        ]
    )


def write(folder: Path, records: list[Result], about: Result, bandwidth: float, names: list[str]) -> Path:
    """Write ``kernels_<gpu>_<date>.md`` and ``.json``; called after each op, so that a cut run keeps what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    stem = folder / f"kernels_{gpu}_{about['date']}"
    stem.with_suffix(".md").write_text(report(records, about, bandwidth, names))
    data = {"environment": about, "copy_bytes_per_second": bandwidth, "records": records}
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1))
    return stem


def parse(argv: list[str] | None, known: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(known), help="comma-separated; all by default")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated, in the table's order")
    parser.add_argument("--out", type=Path, help="folder for the markdown and JSON files")
    parser.add_argument("--quick", action="store_true", help="two models, one length, shorter timing, no torch.compile")
    options = parser.parse_args(argv)
    options.ops = options.ops.split(",")
    unknown = sorted(set(options.ops) - set(known))
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(known)}")
    options.names = [n for n in options.contenders.split(",") if not (options.quick and n == "torch.compile")]
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 when one of our kernels failed or was wrong."""
    tables = registries()
    options = parse(argv, [op for module in tables for op in module.OPS])
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth(device)
    about = environment(device) | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/kernels/run.py " + " ".join(argv if argv is not None else sys.argv[1:]),
    }
    print(f"{about['gpu']}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    records: list[Result] = []
    # Contenders of later ops join the columns of the table, in the order in which they come.
    names = list(options.names)
    for op in options.ops:
        module = next(module for module in tables if op in module.OPS)
        first = len(records)
        for model, workload in module.workloads(op, quick=options.quick):
            extra = [n for n in workload.contenders if n not in CONTENDERS and "," not in n]
            names += [n for n in extra if n not in names]
            chosen = [n for n in names if n in options.names or n in extra]
            record = {name: getattr(workload, name) for name in ("op", "shape", "tokens", "forward_bytes")}
            record |= {name: getattr(workload, name) for name in ("backward_bytes", "forward_flops", "backward_flops")}
            record |= {"model": model, "results": measure(workload, chosen, device, quick=options.quick)}
            records.append(record)
        if "torch.compile" in options.names:
            torch.compiler.reset()
        print("\n" + table(records[first:], bandwidth, names), flush=True)
        if options.out is not None:
            write(options.out, records, about, bandwidth, names)
    return int(any("error" in record["results"].get("ours", {"error": ""}) for record in records))


if __name__ == "__main__":
    sys.exit(main())

"""Times every attention kernel that `pantheraml/models/attention/table.py` chooses from, in one run on one GPU.

    python benchmarks/kernels/attention.py --out benchmarks/reports [--seconds 85] [--only packed] [--kernels flex]

Writes a markdown table and a JSON file to ``--out`` and prints the order that each case measured. Times are medians of
``triton.testing.do_bench`` (which clears the L2 cache before each call), bf16 (fp16 where the card has no bf16). Each
output is compared with that of the first kernel of its row; gradients are tested by ``pytest -m gpu``. A kernel that
fails is recorded with its error. When the seconds are spent, what is left is recorded as not measured.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pantheraml.models.attention import interface  # noqa: E402
from pantheraml.models.attention.documents import Documents, from_lengths  # noqa: E402

Run = Callable[..., torch.Tensor]
HEADS = {64: (32, 8), 128: (32, 8), 256: (8, 4)}


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: What is printed.
        rows: Lengths of the documents of each row.
        head_dim: Size of a head.
        kernels: Names of those that are timed, the reference of the outputs first.
        window: Keys that a token sees at most, or None.
        features: Soft cap and sinks.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    head_dim: int
    kernels: tuple[str, ...]
    window: int | None = None
    features: dict[str, Any] = field(default_factory=dict)

    def documents(self, device: torch.device) -> Documents:
        lengths = [length for row in self.rows for length in row]
        return from_lengths(lengths, len(self.rows), sum(self.rows[0]), self.window, device)


CAUSAL = ("sdpa cudnn", "sdpa flash", "sdpa efficient", "varlen", "flex")
PACKED = ("varlen", "efficient", "xformers", "cudnn varlen", "exact", "sdpa mask", "flex")
UNEVEN = (3000, 120, 1800, 700, 64, 900, 1500, 108)


def cases() -> list[Case]:
    """What is timed, the most wanted first."""
    found = []
    for head_dim in (128, 64, 256):
        found += [
            Case("causal 4 x 2,048", ((2048,),) * 4, head_dim, CAUSAL),
            Case("packed 8 x 1,024", ((1024,) * 8,), head_dim, PACKED),
            Case("causal 1 x 8,192", ((8192,),), head_dim, CAUSAL),
        ]
    found += [
        Case("packed 64 to 3,000 in 8,192", (UNEVEN,), 128, PACKED),
        Case("packed 4 x 8,192", ((8192,) * 4,), 128, tuple(k for k in PACKED if k not in ("sdpa mask", "exact"))),
        Case("window 1,024 in 4 x 2,048", ((2048,),) * 4, 128, PACKED, window=1024),
        Case("window 4,096 in 1 x 32,768", ((32768,),), 128, ("varlen", "efficient", "flex"), window=4096),
        Case("soft cap 4 x 2,048", ((2048,),) * 4, 256, ("exact", "flex"), features={"softcap": 50.0}),
        Case("sinks, window 128 in 4 x 2,048", ((2048,),) * 4, 64, ("varlen", "exact", "flex"), 128, {"sinks": True}),
        Case("sinks 4 x 2,048", ((2048,),) * 4, 64, ("varlen", "exact", "flex"), features={"sinks": True}),
        *(Case("causal 1 x 32,768", ((32768,),), head_dim, CAUSAL) for head_dim in (128, 64, 256)),
    ]
    return found


def sdpa(name: str, query: Any, key: Any, value: Any, documents: Documents, *, scale: float) -> torch.Tensor:
    """torch's own function, restricted to one of its kernels, as `interface` calls it."""
    return interface.whole_rows_attention(query, key, value, [name], scale=scale)


def sdpa_mask(query: Any, key: Any, value: Any, documents: Documents, *, scale: float) -> torch.Tensor:
    """What transformers' stock pair does with packed rows: a mask of T x T, and keys repeated for their heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = documents.dense()
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)


def cudnn_varlen(query: Any, key: Any, value: Any, documents: Documents, *, scale: float) -> torch.Tensor:
    """cuDNN's form for documents of different lengths, which torch has and does not offer. A candidate only."""
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    bounds, longest = documents.cumulative, documents.longest
    out = torch.ops.aten._cudnn_attention_forward(
        *flat, None, bounds, bounds, longest, longest, True, 0.0, True, False, scale=scale
    )[0]
    return out.unflatten(0, (documents.batch, documents.length))


KERNELS: dict[str, Run] = {
    **{f"sdpa {name}": functools.partial(sdpa, name) for name in ("cudnn", "flash", "efficient")},
    **interface.DOCUMENTS,
    "sdpa mask": sdpa_mask,
    "cudnn varlen": cudnn_varlen,
}


def measure(case: Case, names: list[str], device: torch.device, deadline: float) -> dict[str, dict[str, Any]]:
    """Times of each kernel in milliseconds, and its largest difference from the first one's output."""
    from triton.testing import do_bench

    documents = case.documents(device)
    heads, kv_heads = HEADS[case.head_dim]
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    generator = torch.Generator(device=device).manual_seed(0)

    def random(count: int) -> torch.Tensor:
        shape = (documents.batch, documents.length, count, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    leaves = [random(heads), random(kv_heads), random(kv_heads)]
    options = dict(case.features)
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads, generator=generator, device=device).requires_grad_()
    scale = case.head_dim**-0.5
    results: dict[str, dict[str, Any]] = {}
    expected = None
    for name in names:
        if time.monotonic() > deadline:
            results[name] = {"error": "not measured: the seconds were spent"}
            continue
        started = time.monotonic()
        try:

            def run(kernel: Run = KERNELS[name]) -> torch.Tensor:
                return kernel(*leaves, documents, scale=scale, **options)

            out = run()
            upstream = torch.randn_like(out)
            torch.autograd.grad(out, leaves, upstream, retain_graph=True)
            torch.cuda.synchronize()
            ready = time.monotonic() - started
            expected = out.detach() if expected is None else expected
            difference = float((out.detach() - expected).abs().max() / expected.abs().max())

            def back(out: torch.Tensor = out, upstream: torch.Tensor = upstream) -> Any:
                return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

            # A call of tens of milliseconds is timed a few times, a short one often.
            times = {
                "forward_ms": do_bench(run, warmup=10, rep=50, return_mode="median"),
                "backward_ms": do_bench(back, warmup=10, rep=50, return_mode="median"),
            }
            results[name] = {**times, "difference": difference, "first_call_s": ready}
            del out, upstream, back
        except Exception as error:  # noqa: BLE001 - a kernel's failure is recorded, whatever it is
            results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        gc.collect()
        torch.cuda.empty_cache()
    return results


def report(records: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The markdown table: forward/backward milliseconds, the fastest sum in bold."""
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    lines = [
        f"# Attention kernels on {facts['device']}",
        "",
        f"{facts['versions']}. Command: `{facts['command']}`.",
        "",
    ]
    lines += [
        "Forward/backward medians in milliseconds, causal, the fastest in bold. “varlen” is FlashAttention's form for "
        "documents, “efficient” that of torch's memory-efficient kernel, “exact” plain torch document by document, "
        "“sdpa mask” what transformers' stock pair does with packed rows.",
        "",
        f"| case | head_dim | heads | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for record in records:
        results = record["results"]
        sums = {n: r["forward_ms"] + r["backward_ms"] for n, r in results.items() if "forward_ms" in r}
        cells = []
        for name in names:
            result = results.get(name)
            if result is None:
                cells.append("")
            elif "error" in result:
                cells.append("not measured" if result["error"].startswith("not measured") else "failed")
            else:
                text = f"{result['forward_ms']:.3g}/{result['backward_ms']:.3g}"
                cells.append(f"**{text}**" if sums[name] == min(sums.values()) else text)
        heads = "/".join(map(str, HEADS[record["head_dim"]]))
        lines.append(f"| {record['case']} | {record['head_dim']} | {heads} | {' | '.join(cells)} |")
    failed = {f"{n}: {r['error']}" for record in records for n, r in record["results"].items() if "error" in r}
    failed = {text for text in failed if "not measured" not in text}
    if failed:
        lines += ["", "Failed:", "", *(f"- {text}" for text in sorted(failed))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the report; without it the table is printed only")
    parser.add_argument("--seconds", type=float, default=85, help="when to stop starting measurements, default 85")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--kernels", default="", help="comma-separated names; default all of each case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("attention kernels are timed on a GPU, and there is none here")
    deadline = time.monotonic() + args.seconds
    device = torch.device("cuda")
    wanted = [name.strip() for name in args.kernels.split(",") if name.strip()]
    records = []
    for case in cases():
        if args.only not in case.name:
            continue
        names = [name for name in case.kernels if not wanted or name in wanted]
        results = measure(case, names, device, deadline)
        records.append({"case": case.name, "head_dim": case.head_dim, "results": results})
        ranked = sorted((r["forward_ms"] + r["backward_ms"], n) for n, r in results.items() if "forward_ms" in r)
        shown = ", ".join(f"{name} {total:.3g} ms" for total, name in ranked)
        print(f"{case.name}, head_dim {case.head_dim}: {shown}", flush=True)
    name = torch.cuda.get_device_name(device)
    facts = {
        "device": name,
        "versions": f"{datetime.date.today()}; Python {platform.python_version()}, torch {torch.__version__}",
        "command": f"python benchmarks/kernels/attention.py {' '.join(sys.argv[1:])}".strip(),
    }
    text = report(records, facts)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        short = next((word.lower() for word in name.split() if word[0] in "ABHLTV" and word[1:].isdigit()), "gpu")
        path = args.out / f"attention_{short}_{datetime.date.today()}.md"
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps({**facts, "records": records}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Generation while a LoRA model trains: new tokens a second of `generate`, adapters not merged, beside the peers.

    python benchmarks/training/generation.py --out benchmarks/reports [--shapes llama-3.2-1b llama-3.1-8b-nf4]
    python benchmarks/training/generation.py --out DIR --dry-run

Each contender, in a process of its own, takes a training step, generates greedily from the same prompts, and does so
again: the memory after each round shows whether anything stays. Times are medians of the rounds after the first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import run
import shapes
import torch

# Name of the shape in `shapes.SHAPES`, and how the frozen weights are held.
WORKLOADS = {"llama-3.2-1b": ("llama-3.2-1b", "lora"), "llama-3.1-8b-nf4": ("llama-3.1-8b", "qlora")}
CONTENDERS = ("hf", "pantheraml", "unsloth")
BATCHES = (1, 8)
NOT_RUN = "not run"
PROMPT, NEW, ROUNDS = 512, 128, 3


def measure(options: argparse.Namespace) -> None:
    """One contender: print its record."""
    import contender

    fast = options.contender != "hf"
    if fast:
        __import__(options.contender).FastLanguageModel  # noqa: B018
    cuda = torch.cuda.is_available()
    options.rank, options.checkpointing, options.load, options.adapt = 16, "unsloth", {}, {}
    options.length, options.in_shards, options.repeated, options.fsdp = 2048, False, False, False
    model, _, _ = (contender.load_fast if fast else contender.load_plain)(options)
    contender.same_start(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, min(model.config.vocab_size, 1000), (4, options.prompt), generator=generator).to(device)

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    def train() -> None:
        if fast:
            __import__(options.contender).FastLanguageModel.for_training(model)
        else:
            model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=rows, labels=rows, attention_mask=torch.ones_like(rows)).loss
        loss.backward()
        model.zero_grad()

    def generate(batch: int) -> tuple[float, list[int]]:
        if fast:
            __import__(options.contender).FastLanguageModel.for_inference(model)
        else:
            model.eval()
        prompts = rows[:1].expand(batch, -1).contiguous()
        synchronize()
        begun = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            out = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                do_sample=False,
                pad_token_id=0,
                use_cache=True,
            )
        synchronize()
        return batch * options.new / (time.perf_counter() - begun), out[0, options.prompt :].tolist()

    found: dict[str, Any] = {}
    for batch in BATCHES:
        rates, memory, tokens, error = [], [], [], None
        try:
            for _ in range(ROUNDS):
                train()
                rate, tokens = generate(batch)
                rates.append(rate)
                memory.append(torch.cuda.memory_allocated() / 2**20 if cuda else 0.0)
        except Exception as problem:  # noqa: BLE001 a peer's failure is its result
            error = f"{type(problem).__name__}: {problem}"[:200]
        key = f"batch {batch}"
        found[key] = {"error": error} if error else {"rates": rates, "memory": memory, "tokens": tokens}
        print(key, found[key].get("rates", error), flush=True)
    print("RESULT " + json.dumps(found), flush=True)


def render(record: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Generation with LoRA while training",
        "",
        f"{record['device']}, {record['date']}; " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
        f"`{record['command']}`",
        "",
        f"Prompts of {record['prompt']} tokens, {record['new']} new ones, greedy, adapters of rank 16 not merged, "
        "each contender's own defaults. New tokens a second of all rows, medians; in brackets MiB that were allocated "
        "more after the last round of training and generating than after the second.",
        *(["", record["note"]] if "note" in record else []),
        "",
        "| model | rows | " + " | ".join(record["contenders"]) + " | pantheraml / hf |",
        "|---|---|" + "---|" * (len(record["contenders"]) + 1),
    ]
    for shape, by_contender in record["results"].items():
        keys = next((list(found) for found in by_contender.values() if "error" not in found), [])
        for key in keys:
            cells, rates = [], {}
            for contender in record["contenders"]:
                found = by_contender.get(contender, {"error": NOT_RUN})
                found = found.get(key, found)
                if found.get("error") == NOT_RUN:
                    cells.append(NOT_RUN)
                    continue
                if found.get("error") or "rates" not in found:
                    cells.append("failed: " + str(found.get("error"))[:80].replace("|", "/").replace("\n", " "))
                    continue
                rates[contender] = statistics.median(found["rates"][1:])
                memory = found.get("memory")
                cells.append(f"{rates[contender]:,.1f}" + (f" ({memory[-1] - memory[1]:+.1f})" if memory else ""))
            factor = f"{rates['pantheraml'] / rates['hf']:.2f}" if {"pantheraml", "hf"} <= rates.keys() else ""
            lines.append(f"| {shape} | {key} | " + " | ".join(cells) + f" | {factor} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--shapes", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default all")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-models")
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"tokens of a prompt, default {PROMPT}")
    parser.add_argument("--new", type=int, default=NEW, help=f"new tokens of a row, default {NEW}")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on a CPU too")
    for name in ("--contender", "--model", "--mode"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        options.prompt, options.new, options.shapes = 16, 4, options.shapes[:1]
        options.contenders = [name for name in options.contenders if name != "unsloth" or torch.cuda.is_available()]
    return options


def main() -> int:
    options = parse()
    if options.contender is not None:
        measure(options)
        return 0
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    kept = ("python", "torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "pantheraml")
    results: dict[str, dict[str, Any]] = {}
    record = {
        "date": now,
        "device": device,
        "versions": {name: version for name, version in run.versions().items() if name in kept},
        "command": "python benchmarks/training/generation.py --shapes " + " ".join(options.shapes),
        "prompt": options.prompt,
        "new": options.new,
        "contenders": options.contenders,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"generation_{run.slug(device)}_{now}"
    for shape in options.shapes:
        name, mode = ("tiny", "lora") if options.dry_run else WORKLOADS[shape]
        model = shapes.write(name, options.models)
        results[shape] = {}
        for contender in options.contenders:
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", contender, "--model", str(model)]
            log = Path(tempfile.gettempdir()) / f"generation-{shape}-{contender}.log"
            results[shape][contender] = run.measure([*command, "--mode", mode], 300, log)
            print(shape, contender, results[shape][contender].get("error", "measured"), flush=True)
            # After each, so that a run that is ended loses nothing.
            path.with_suffix(".json").write_text(json.dumps(record) + "\n")
            path.with_suffix(".md").write_text(render(record))
    print(render(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

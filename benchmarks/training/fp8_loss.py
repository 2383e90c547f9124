"""Losses of LoRA on real text with the frozen weights in fp8, against those with the weights in 16 bits.

    python benchmarks/training/fp8_loss.py --out benchmarks/reports --first shakespeare.txt --then gsm8k.jsonl
    python benchmarks/training/fp8_loss.py --out DIR --first FILE --then FILE --dry-run

A model of random weights has nothing that fp8 could spoil. So a model in the shape of Llama-3.2-1B is trained whole on
the first text, in 16 bits, and then, for each way to hold its weights, by LoRA on the second, always from the same
adapters and on the same batches. Each way runs in a process of its own. The report compares moving means of the losses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import run
import shapes
import torch

WAYS: dict[str, dict[str, Any]] = {
    "16-bit": {},
    "fp8, row-wise": {"load_in_fp8": True},
    "fp8, blocks": {"load_in_fp8": "block"},
    "nf4": {"load_in_4bit": True},
    "nf4, multiplied in fp8": {"load_in_4bit": True, "load_in_fp8": True},
}
# The way each is held against: 4-bit weights are rounded before fp8 comes into it.
BASIS = {"fp8, row-wise": "16-bit", "fp8, blocks": "16-bit", "nf4, multiplied in fp8": "nf4"}
BAR = 0.01
WINDOW = 20
VOCABULARY = 16_384
SEED = 3407


def texts_of(path: Path) -> list[str]:
    """Texts of a file: rows of json lines with their fields one below the other, or paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return ["\n".join(map(str, json.loads(line).values())) for line in text.splitlines() if line.strip()]
    return [part for part in text.split("\n\n") if part.strip()]


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level tokenizer trained on the texts themselves."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.pad_token = "<pad>"
    return fast


def rows_of(texts: list[str], tokenizer: Any, length: int, count: int) -> Any:
    """``count`` rows of ``length`` tokens: the texts one after the other, in a fixed random order, again if needed."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(SEED)
    stream: list[int] = []
    while len(stream) < count * length:
        for index in torch.randperm(len(texts), generator=generator).tolist():
            stream += [*tokenizer(texts[index])["input_ids"], tokenizer.eos_token_id]
            if len(stream) >= count * length:
                break
    ids = [stream[i * length : (i + 1) * length] for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count})


def train(model: Any, tokenizer: Any, rows: Any, options: argparse.Namespace, steps: int, rate: float) -> list[float]:
    """Losses of every step."""
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=options.batch,
                max_steps=steps,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 20,
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                max_length=options.length,
                dataset_kwargs={"skip_prepare_dataset": True},
                seed=SEED,
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
            ),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first(options: argparse.Namespace) -> None:
    """Train the whole model on the first text and write it to ``options.model``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pantheraml import FastLanguageModel

    tokenizer = make_tokenizer(texts_of(options.first) + texts_of(options.then))
    shape = dict(shapes.SHAPES["tiny" if options.dry_run else "llama-3.2-1b"]) | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16"
    )
    torch.manual_seed(SEED)
    random = options.model / "random"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(random)
    tokenizer.save_pretrained(random)
    model, _ = FastLanguageModel.from_pretrained(
        str(random), max_seq_length=options.length, dtype=options.dtype, load_in_4bit=False, full_finetuning=True
    )
    rows = rows_of(texts_of(options.first), tokenizer, options.length, options.batch * options.steps)
    losses = train(model, tokenizer, rows, options, options.steps, 3e-4)
    model.save_pretrained(options.model / "trained")
    tokenizer.save_pretrained(options.model / "trained")
    print("RESULT " + json.dumps(losses), flush=True)


def then(options: argparse.Namespace) -> None:
    """Train an adapter on the second text."""
    from contender import TARGETS, same_start

    from pantheraml import FastLanguageModel

    keywords = {"load_in_4bit": False} | WAYS[options.way]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.model / "trained"), max_seq_length=options.length, dtype=options.dtype, **keywords
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, target_modules=TARGETS, random_state=SEED
    )
    same_start(model)
    rows = rows_of(texts_of(options.then), tokenizer, options.length, options.batch * options.steps)
    print("RESULT " + json.dumps(train(model, tokenizer, rows, options, options.steps, 2e-4)), flush=True)


def smoothed(losses: list[float]) -> list[float]:
    """Means over the last ``WINDOW`` steps."""
    return [sum(losses[max(i - WINDOW + 1, 0) : i + 1]) / min(i + 1, WINDOW) for i in range(len(losses))]


def deviation(losses: list[float], basis: list[float]) -> float:
    """The largest relative difference between the smoothed curves, once a window is full."""
    pairs = list(zip(smoothed(losses), smoothed(basis)))[WINDOW - 1 :]
    return max((abs(a / b - 1) for a, b in pairs), default=float("nan"))


def render(record: dict[str, Any]) -> str:
    """The report."""
    curves = record["losses"]
    steps = len(next(iter(curves.values())))
    points = [1, *range(50, steps + 1, 50)] if steps >= 50 else [1, steps]
    lines = [
        "# Losses with weights in fp8",
        "",
        f"{record['device']}, {record['date']}; " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
        f"`{record['command']}`",
        "",
        f"A model in the shape of {record['shape']} was trained whole on {record['first']}, from a loss of "
        f"{record['first_losses'][0]:.2f} to {record['first_losses'][-1]:.2f}; then by LoRA (rank 16) on "
        f"{record['then']}, {steps} steps of {record['batch']} x {record['length']} tokens, for each way to hold the "
        f"frozen weights. Losses are means over {WINDOW} steps; the deviation is the largest of any such mean from "
        f"that of the way in brackets, at most {BAR:.0%} wanted.",
        "",
        "| weights | " + " | ".join(f"step {p}" for p in points) + " | deviation |",
        "|---|" + "---|" * (len(points) + 1),
    ]
    for way, losses in curves.items():
        means = smoothed(losses)
        basis = BASIS.get(way)
        held = ""
        if basis is not None:
            off = deviation(losses, curves[basis])
            held = f"{off:.2%} ({basis}), {'met' if off <= BAR else 'MISSED'}"
        lines.append(f"| {way} | " + " | ".join(f"{means[p - 1]:.4f}" for p in points) + f" | {held} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--first", type=Path, required=True, help="text that the whole model is trained on")
    parser.add_argument("--then", type=Path, required=True, help="text of the adapters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    parser.add_argument("--at-once", type=int, default=1, help="ways that train on the GPU at the same time, default 1")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and few steps, on a CPU too")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        options.steps, options.length, options.batch = min(options.steps, 5), 32, 2
        options.ways = [way for way in options.ways if torch.cuda.is_available() or not WAYS[way]]
    options.dtype = torch.bfloat16 if torch.cuda.is_available() else None
    return options


def main() -> int:
    options = parse()
    if options.way is not None:
        then(options) if options.way else first(options)
        return 0
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def losses_of(way: str) -> list[float]:
            command = [sys.executable, __file__, *sys.argv[1:], "--model", folder, "--way", way]
            log = Path(folder) / f"log-{way}.txt"
            found = run.measure(command, 900, log)
            if isinstance(found, dict):
                print(log.read_text()[-3000:])
                raise SystemExit(f"{way or 'the first text'}: {found['error']}")
            print(f"{way or 'first'}: {found[0]:.4f} to {found[-1]:.4f}", flush=True)
            return found

        losses[""] = losses_of("")
        with ThreadPoolExecutor(options.at_once) as pool:
            losses |= zip(options.ways, pool.map(losses_of, options.ways))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "date": now,
        "device": device,
        "versions": {k: v for k, v in run.versions().items() if k in ("torch", "transformers", "trl", "pantheraml")},
        "command": f"python benchmarks/training/fp8_loss.py --steps {options.steps} --length {options.length} "
        f"--batch {options.batch} --first {options.first.name} --then {options.then.name}",
        "shape": "a tiny llama" if options.dry_run else "Llama-3.2-1B",
        "first": options.first.name,
        "then": options.then.name,
        "batch": options.batch,
        "length": options.length,
        "first_losses": losses.pop(""),
        "losses": losses,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"fp8-loss_{run.slug(device)}_{now}"
    (options.out / f"{name}.json").write_text(json.dumps(record) + "\n")
    (options.out / f"{name}.md").write_text(render(record))
    print(render(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``pantheraml demo``: a real fine-tune of the embedded tiny model, measured before and after."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...assets import DEMO, demo_data, demo_model_dir
from ...errors import CheckpointError, ConfigError
from ..output import Output, program

MARKER = ".pantheraml-demo"
BASE_BELOW, TUNED_ABOVE = 0.10, 0.90
_SHOWN = 3
_BATCH = 32
_FAILED = 1


def prepare(directory: Path) -> None:
    """Make an empty output folder, replacing one only if an earlier demo made it.

    Raises:
        ConfigError: the folder holds something else, or is a file.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ConfigError(f"{directory} is no folder", where="--output_dir", hint="name another folder")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise ConfigError(
                f"{directory} holds files that the demo did not make",
                where="--output_dir",
                why="the demo replaces its output folder",
                hint="name another folder, or a new one",
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).write_text("Made by `pantheraml demo`, which replaces this folder.\n", encoding="utf-8")


def generate(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers to ``prompts``, in batches."""
    import torch

    answers = []
    for start in range(0, len(prompts), _BATCH):
        batch = tokenizer(prompts[start : start + _BATCH], return_tensors="pt", padding=True)
        ids = batch["input_ids"].to(model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=DEMO.max_new_tokens,
                do_sample=False,
            )
        answers.extend(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
    return answers


def exact_match(answers: list[str], rows: list[dict[str, str]]) -> float:
    """Share of answers equal to the completion, but for space around it."""
    right = sum(answer.strip() == row["completion"].strip() for answer, row in zip(answers, rows, strict=True))
    return right / len(rows)


def _train(model: Any, tokenizer: Any, directory: Path) -> Any:
    from datasets import disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from ...data import formats, sources

    disable_progress_bars()
    loaded = sources.load(demo_data("train"))
    rows = formats.to_training_rows(loaded.dataset, formats.detect(loaded.dataset), tokenizer)
    config = SFTConfig(
        output_dir=str(directory),
        max_length=DEMO.max_seq_length,
        per_device_train_batch_size=DEMO.per_device_train_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=DEMO.learning_rate,
        lr_scheduler_type=DEMO.lr_scheduler_type,
        warmup_steps=DEMO.warmup_steps,
        max_steps=DEMO.max_steps,
        logging_steps=max(DEMO.max_steps // 10, 1),
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
        seed=DEMO.seed,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    return trainer.train()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: this model is so small that threads wait for each other more than they work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 1 when the model did not get better as promised."""
    from ..finetune import quiet_unless_terminal

    directory = Path(args.output_dir)
    prepare(directory)
    quiet_unless_terminal()
    with _one_thread():
        return _demonstrate(directory, Output(json=args.json))


def _demonstrate(directory: Path, output: Output) -> int:
    from ...models.loader import FastLanguageModel

    begin = time.perf_counter()
    lines = demo_data("test").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, str]] = [json.loads(line) for line in lines]
    prompts = [row["prompt"] for row in rows]

    output.say("1. Load the embedded base model")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(demo_model_dir()), max_seq_length=DEMO.max_seq_length, load_in_4bit=False
    )
    output.say(f"2. Ask it the {len(rows)} questions of the held-out split")
    FastLanguageModel.for_inference(model)
    before = generate(model, tokenizer, prompts)
    base_score = exact_match(before, rows)
    output.say(f"   exact match before: {_percent(base_score)}")

    output.say(f"3. Fine-tune it with LoRA, {DEMO.max_steps} steps of {DEMO.per_device_train_batch_size} rows")
    model = FastLanguageModel.get_peft_model(model, r=DEMO.r, lora_alpha=DEMO.lora_alpha, random_state=DEMO.seed)
    result = _train(model, tokenizer, directory)

    output.say("4. Ask the same questions again")
    FastLanguageModel.for_inference(model)
    after = generate(model, tokenizer, prompts)
    tuned_score = exact_match(after, rows)
    output.say(f"   exact match before: {_percent(base_score)}, after: {_percent(tuned_score)}")
    for index in range(min(_SHOWN, len(rows))):
        output.say(f"\n   prompt: {prompts[index].strip()}")
        output.say(f"   before: {_one_line(before[index])}")
        output.say(f"   after:  {_one_line(after[index])}")
        output.say(f"   wanted: {rows[index]['completion'].strip()}")

    output.say("\n5. Save the adapter, and the merged model, which is read back and compared")
    adapter, merged = directory / "adapter", directory / "merged"
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    model.save_pretrained_merged(str(merged), tokenizer, save_method="merged_16bit")
    seconds = time.perf_counter() - begin
    record = {
        "exact_match_before": base_score,
        "exact_match_after": tuned_score,
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "seconds": round(seconds, 1),
    }
    (directory / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    files = {
        "adapter": adapter,
        "merged model": merged,
        "metrics": directory / "metrics.jsonl",
        "report": directory / "report.html",
        "result": directory / "demo.json",
    }
    missing = [name for name, path in files.items() if not path.exists()]
    if missing:
        raise CheckpointError(f"the demo did not write its {' and '.join(missing)}", where=str(directory))
    output.say(f"\nDone in {seconds:.0f} s:")
    output.table([(name, str(path)) for name, path in files.items()], indent="   ")
    output.say("\nTalk to it:")
    output.say(f"   {program()} chat {merged} --prompt {shlex.quote(prompts[0].strip())} --temperature 0")
    output.say("Train on your own file (json, jsonl, csv, parquet or txt):")
    output.say(f"   {program()} --model_name MODEL --dataset FILE --max_steps 100")
    output.note(**record, files={name: str(path) for name, path in files.items()})
    output.finish()
    if base_score < BASE_BELOW and tuned_score > TUNED_ABOVE:
        return 0
    output.say(
        f"\nThe demo promises less than {_percent(BASE_BELOW)} before and more than {_percent(TUNED_ABOVE)} after; "
        "this run did not keep that."
    )
    return _FAILED


def _one_line(text: str) -> str:
    return " ".join(text.split())

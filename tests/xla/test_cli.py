"""``pantheraml --use_tpu``: the one-shot fine-tune on XLA devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pantheraml import cleanup_tpu_training, xla_runtime
from pantheraml.cli import main

ROOT = Path(__file__).resolve().parents[2]
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(32)))
    return file


def flags(model, rows, out, *more):
    argv = ["--use_tpu", "--model_name", str(model), "--dataset", str(rows), "--output_dir", str(out)]
    argv += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--warmup_steps", "0"]
    argv += ["--learning_rate", "1e-2", "--r", "4", "--lora_alpha", "8", "--report_to", "none", "--max_steps", "4"]
    return [*argv, "--dtype", "float32", *more]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def test_one_command_trains_evaluates_and_saves(tiny_llama_dir, rows, tmp_path, capsys):
    cleanup_tpu_training()
    out, merged = tmp_path / "out", tmp_path / "merged"
    more = ("--eval_dataset", str(rows), "--save_model", "--save_path", str(merged), "--save_steps", "2", "--json")
    assert main(flags(tiny_llama_dir, rows, out, *more)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 4
    assert 0 < record["metrics"]["eval_loss"] < 6
    run = json.loads((out / "pantheraml-run.json").read_text())
    assert run["flags"]["use_tpu"] == {"value": True, "given": True}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    before = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, out))
    assert (tuned - before).abs().max() > 1e-3
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(whole), tuned, rtol=0, atol=2e-5)
    # A step took a row for each core.
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(4 * xla_runtime.device_count() / 32)
    # The checkpoint of the second step leads to the same adapter.
    again = tmp_path / "again"
    assert main(flags(tiny_llama_dir, rows, again, "--resume", str(out / "checkpoint-2"))) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, again)), tuned, rtol=0, atol=1e-5)


@pytest.mark.skipif("xla_runtime.device_count() > 1", reason="the other test trains on several devices")
def test_the_script_trains_everything(tiny_llama_dir, rows, tmp_path):
    argv = ["--use_tpu", "--full_finetuning", "--max_steps", "2"]
    argv += ["--model_name", str(tiny_llama_dir), "--dataset", str(rows), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "pantheraml-cli.py", *argv, "--report_to", "none"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"The model is in {tmp_path / 'out'}" in done.stdout
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The defaults of the command: weights are held in 16 bit.
    assert trained.dtype is torch.bfloat16


def test_flags_for_gpus_are_refused(tiny_llama_dir, rows, tmp_path, capsys):
    for more in (["--gpus", "2"], ["--load_in_4bit"], ["--optim", "adamw_8bit"]):
        assert main(flags(tiny_llama_dir, rows, tmp_path / "out", *more)) == 2
        assert more[0].strip("-").split("=")[0] in capsys.readouterr().err

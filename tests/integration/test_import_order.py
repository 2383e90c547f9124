"""Whoever is imported first, TRL's classes behave the same; importing PantheraML alone costs next to nothing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ORDERS = {
    "pantheraml first": "import pantheraml\nfrom trl import SFTConfig, SFTTrainer",
    "trl first": "from trl import SFTConfig, SFTTrainer\nimport pantheraml",
}
BEHAVIOUR = """
import json, sys, tempfile
sys.path.insert(0, {tests!r})
from conftest import build_tokenizer
from training_support import panthera_model, texts
import trl, trl.trainer.sft_trainer
args = SFTConfig(output_dir=tempfile.mkdtemp(), max_seq_length=48, optim="adamw_torch", max_steps=1)
model, tokenizer = panthera_model(), build_tokenizer()
trainer = SFTTrainer(model=model, args=args, train_dataset=texts(8), tokenizer=tokenizer, packing=False)
trainer.train()
print(json.dumps({{
    "same class": trl.SFTTrainer is SFTTrainer is trl.trainer.sft_trainer.SFTTrainer,
    "class": f"{{SFTTrainer.__module__}}.{{SFTTrainer.__qualname__}}",
    "length": trainer.args.max_length, "batch": trainer.args.per_device_train_batch_size, "seed": trainer.args.seed,
    "loss": trainer.state.log_history[0]["loss"],
    "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
}}))
"""


def run(script: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_both_orders_give_the_same_class_and_run():
    behaviour = BEHAVIOUR.format(tests=str(Path(__file__).parents[1]))
    results = [json.loads(run(f"{order}\n{behaviour}")) for order in ORDERS.values()]
    assert results[0] == results[1]
    assert results[0]["same class"]
    assert results[0]["class"] == "trl.trainer.sft_trainer.SFTTrainer"
    assert (results[0]["length"], results[0]["batch"], results[0]["seed"]) == (48, 4, 3407)


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "triton", "numpy", "rich")


def test_importing_pantheraml_imports_nothing_heavy():
    script = f"import sys, pantheraml\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run(script) == "[]"


def test_importing_pantheraml_is_quick():
    # Processor time, so that other work on the machine does not count.
    script = "import time; start = time.process_time(); import pantheraml; print(time.process_time() - start)"
    assert statistics.median(float(run(script)) for _ in range(3)) < 0.3

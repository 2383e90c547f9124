"""A script in Unsloth's manner runs with its import changed and nothing else, and opens no network connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The first two lines are the only ones that depend on the order of the imports.
FIRST, SECOND = "from unsloth import FastLanguageModel, is_bfloat16_supported", "from trl import SFTTrainer"
SCRIPT = """\
import json, math, torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
max_seq_length = 128

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="base", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model, r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=3407,
    use_rslora=False, loftq_config=None)

def format_chats(rows):
    return {"text": [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
                     for chat in rows["conversations"]]}

dataset = load_dataset("json", data_files="chats.jsonl", split="train").map(format_chats, batched=True)
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text",
    max_seq_length=max_seq_length, dataset_num_proc=1, packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=2, max_steps=6, learning_rate=1e-2,
        fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), logging_steps=1, optim="adamw_8bit",
        weight_decay=0.01, lr_scheduler_type="linear", seed=3407, output_dir="outputs", report_to="none"))
stats = trainer.train()

FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "Say hello."}]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
written = model.generate(**inputs, max_new_tokens=8, use_cache=True)

model.save_pretrained("lora"); tokenizer.save_pretrained("lora")
model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
again, tokenizer = FastLanguageModel.from_pretrained("lora", max_seq_length=max_seq_length, load_in_4bit=True)
merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
"""

# What the test wants to know of the script, and Unsloth's users do not write.
REPORT = """
again.eval(), merged.eval()
with torch.no_grad():
    trained, reloaded = (m(input_ids=written.to(m.device)).logits.float().cpu() for m in (model, again))
    exported = merged(input_ids=written.cpu()).logits
lora = [{n: p for n, p in m.named_parameters() if "lora_" in n} for m in (model, again)]
json.dump({
    "losses": losses,
    "same_adapter": lora[0].keys() == lora[1].keys() and all(torch.equal(p, lora[1][n]) for n, p in lora[0].items()),
    "new": int(written.shape[1] - inputs["input_ids"].shape[1]),
    "adapter": (trained - reloaded).abs().max().item(),
    "merged": (trained - exported).abs().max().item(),
    "scale": trained.abs().max().item(),
    "trainable": sum(p.requires_grad for p in again.parameters()),
    "quantized": any("4bit" in type(m).__name__ for m in again.modules()),
    "left": tokenizer.padding_side,
    "exported_quantized": hasattr(merged.config, "quantization_config"),
}, open("result.json", "w"))
"""

# Runs before anything else. A look-up of a name counts as an attempt too; sockets between local processes do not.
NO_NETWORK = """\
import socket
attempts = []
def refuse(*args, **kwargs):
    attempts.append(repr(args))
    raise OSError("blocked by the test")
def local(connect):
    return lambda self, *args: (connect if self.family == socket.AF_UNIX else refuse)(self, *args)
socket.socket.connect, socket.socket.connect_ex = map(local, (socket.socket.connect, socket.socket.connect_ex))
socket.create_connection = socket.getaddrinfo = refuse
"""

# The script's own call of datasets.load_dataset counts itself at a server, unless this says no.
QUIET = {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}


@pytest.fixture
def folder(tmp_path, tiny_llama_dir) -> Path:
    (tmp_path / "base").symlink_to(tiny_llama_dir)
    chats = [
        {
            "conversations": [
                {"role": "user", "content": f"What is {i} plus three?"},
                {"role": "assistant", "content": f"The answer is {i + 3}."},
            ]
        }
        for i in range(48)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return tmp_path


def run(folder: Path, text: str) -> dict:
    script = folder / "script.py"
    script.write_text(text)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **QUIET},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


def check(result: dict) -> None:
    losses = result["losses"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
    assert 1 <= result["new"] <= 8
    assert result["same_adapter"]
    # On some CPUs bitsandbytes rounds the scales of 4-bit weights to bf16 (2**-9) once they were used for inference.
    assert result["adapter"] <= 2**-7 * result["scale"]
    # Merging onto the 16-bit base differs from the 4-bit model by the error of the quantisation, and not by more.
    assert result["merged"] <= 0.25 * result["scale"]
    assert result["trainable"] == 2 * 7 * 2  # layers, projections, A and B
    assert result["quantized"]
    assert not result["exported_quantized"]


@pytest.mark.parametrize("order", ["pantheraml-first", "trl-first"])
def test_script_runs_with_only_the_import_changed(order, folder):
    """From training to export on local files; the hub is not switched off, yet nothing may try to reach it."""
    changed = FIRST.replace("from unsloth import", "from pantheraml import")
    imports = [changed, SECOND] if order == "pantheraml-first" else [SECOND, changed]
    script = "\n".join([*imports, SCRIPT])
    assert 36 <= len(script.strip().splitlines()) <= 46
    check(run(folder, "\n".join([NO_NETWORK, script, REPORT, "assert not attempts, attempts"])))

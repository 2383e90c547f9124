"""One contender's fine-tuning step through TRL's SFTTrainer: tokens a second, peak memory, losses, as one JSON line.

python benchmarks/training/contender.py --contender pantheraml --model DIR --mode lora --length 2048 --batch 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
# Steps at the start that are not counted: compilation, optimizer state, the activation plan's measurement.
WARM_UP = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", required=True, choices=("transformers", "liger", "unsloth", "pantheraml"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", default="default", choices=("default", "all", "none"))
    return parser.parse_args()


def load_fast(options: argparse.Namespace):
    """Unsloth and PantheraML through the same calls."""
    import torch

    if options.contender == "unsloth":
        from unsloth import FastLanguageModel
    else:
        from pantheraml import FastLanguageModel

    checkpointing = {"default": "unsloth", "all": True, "none": False}[options.checkpointing]
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model,
        max_seq_length=options.length,
        dtype=torch.bfloat16 if torch.cuda.is_available() else None,
        load_in_4bit=options.mode == "qlora",
        full_finetuning=options.mode == "full",
    )
    if options.mode != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            random_state=3407,
        )
    return model, tokenizer, {}


def load_plain(options: argparse.Namespace):
    """Transformers and PEFT as they are, with Liger's kernels or without."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = None
    if options.mode == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16 if cuda else torch.float32,
        quantization_config=quantization,
        device_map={"": 0} if cuda else None,
        attn_implementation="sdpa",
    )
    if options.mode != "full":
        model = get_peft_model(
            model,
            LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"),
        )
    arguments = {
        "gradient_checkpointing": options.checkpointing != "none",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": options.contender == "liger",
    }
    return model, AutoTokenizer.from_pretrained(options.model), arguments


def main() -> int:
    options = parse()
    started = time.perf_counter()
    if options.contender in ("unsloth", "pantheraml"):
        __import__(options.contender)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    imported = time.perf_counter()
    torch.manual_seed(3407)
    load = load_fast if options.contender in ("unsloth", "pantheraml") else load_plain
    model, tokenizer, arguments = load(options)
    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    loaded = now()
    vocabulary = min(model.config.get_text_config().vocab_size, 100_000)
    generator = torch.Generator().manual_seed(1)
    rows = options.batch * (options.steps + 1)
    ids = torch.randint(10, vocabulary, (rows, options.length), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * options.length] * rows})

    class Clock(TrainerCallback):
        """Wall time of every step, and what is logged."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.logged: list[dict] = []

        def on_step_begin(self, *_, **__):
            self.begun = now()

        def on_step_end(self, *_, **__):
            self.times.append(now() - self.begun)

        def on_log(self, *_, logs=None, **__):
            if logs and "loss" in logs:
                self.logged.append({"loss": logs["loss"], "grad_norm": float(logs.get("grad_norm", 0.0))})

    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        callbacks=[clock],
        args=SFTConfig(
            output_dir=os.environ.get("BENCHMARK_OUTPUT", "outputs/benchmark"),
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=1,
            max_steps=options.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim=("adamw_8bit" if options.mode == "full" else "adamw_torch_fused") if cuda else "adamw_torch",
            bf16=cuda,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            max_length=options.length,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=3407,
            **arguments,
        ),
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steady = clock.times[WARM_UP:]
    plan = getattr(model, "activation_plan", None)
    record = {
        "contender": options.contender,
        "tokens_per_second": options.batch * options.length / statistics.median(steady),
        "step_ms": statistics.median(steady) * 1e3,
        "step_ms_range": [min(steady) * 1e3, max(steady) * 1e3],
        "first_step_s": clock.times[0],
        "import_s": imported - started,
        "load_s": loaded - imported,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "plan": plan.describe() if plan is not None else None,
        "steps": clock.logged,
    }
    print("RESULT " + json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

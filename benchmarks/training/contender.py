"""One contender's fine-tuning step through TRL's SFTTrainer: tokens a second, peak memory, losses, as one JSON line.

python benchmarks/training/contender.py --contender pantheraml --model DIR --mode lora --length 2048 --batch 4

Under torchrun each rank has a GPU, and rank 0 prints the line: tokens a second of one rank, the largest peak of all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 3407
# Steps at the start that are not counted: compilation, optimizer state, the activation plan's measurement.
WARM_UP = 3
# Token ids are drawn from [10, MAX_TOKEN).
MAX_TOKEN = 100_000
GIB = 2**30
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
# transformers' names for FSDP2, a decoder layer a unit.
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", required=True, choices=("hf", "liger", "unsloth", "pantheraml"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step on each rank")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--checkpointing", type=json.loads, default='"unsloth"', help="JSON: true, false or a mode")
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the ranks")
    parser.add_argument("--in-shards", action="store_true", help="load a shard on each rank (pantheraml alone)")
    parser.add_argument("--repeated", action="store_true", help="MODEL has one layer, which is read as every layer")
    parser.add_argument("--arguments", type=json.loads, default={}, help="JSON: further training arguments")
    parser.add_argument("--load", type=json.loads, default={}, help="JSON: further keywords of from_pretrained")
    parser.add_argument("--adapt", type=json.loads, default={}, help="JSON: further keywords of get_peft_model")
    return parser.parse_args()


def load_fast(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Unsloth and PantheraML through the same calls."""
    import torch

    if options.contender == "unsloth":
        from unsloth import FastLanguageModel
    else:
        from pantheraml import FastLanguageModel

    keywords = {
        "max_seq_length": options.length,
        "dtype": torch.bfloat16 if torch.cuda.is_available() else None,
        "load_in_4bit": options.mode == "qlora",
        "full_finetuning": options.mode == "full",
    } | options.load
    if options.in_shards:
        from pantheraml import MultiGPUConfig

        keywords["multi_gpu_config"] = MultiGPUConfig(strategy="fsdp")
    if options.repeated:
        from shapes import RepeatedLayer

        from pantheraml.models import stream

        stream.safe_open = RepeatedLayer
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, **keywords)
    if options.mode != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=options.rank,
            lora_alpha=options.rank,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=options.checkpointing,
            random_state=SEED,
            **options.adapt,
        )
    return model, tokenizer, {}


def load_plain(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
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
        # Sharded, the weights go to the GPUs in pieces.
        device_map={"": LOCAL_RANK} if cuda and not options.fsdp else None,
        attn_implementation="sdpa",
    )
    if options.mode != "full":
        config = LoraConfig(
            r=options.rank, lora_alpha=options.rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    arguments: dict[str, Any] = {
        "gradient_checkpointing": bool(options.checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": options.contender == "liger",
    }
    return model, AutoTokenizer.from_pretrained(options.model), arguments


def same_start(model: Any) -> None:
    """Give the LoRA weights of every contender the same values: PEFT's distribution, drawn in the order of names."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if ".lora_A." in name:
                bound = 1 / math.sqrt(weight.shape[1])
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
            elif ".lora_B." in name:
                weight.zero_()


def dataset(options: argparse.Namespace, vocabulary: int) -> Any:
    """Random tokens without padding, the same for every contender."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = options.batch * RANKS * (options.steps + 1)
    size = (rows, options.length)
    ids = torch.randint(10, min(vocabulary, MAX_TOKEN), size, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * options.length] * rows})


def largest(value: float | None) -> float | None:
    """The largest value of all ranks."""
    import torch.distributed as dist

    if RANKS == 1 or value is None:
        return value
    values: list[Any] = [None] * RANKS
    dist.all_gather_object(values, value)
    return max(values)


class HostMemory(threading.Thread):
    """The most memory that this process has had for itself, without the pages of files that it reads, in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 2**20)  # type: ignore[index]

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.most


def main() -> int:
    options = parse()
    started = time.perf_counter()
    fast = options.contender in ("unsloth", "pantheraml")
    if fast:
        __import__(options.contender).FastLanguageModel  # noqa: B018
    import torch
    import transformers  # noqa: F401
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    imported = time.perf_counter()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    torch.manual_seed(SEED)
    host = HostMemory()
    host.start()
    model, tokenizer, arguments = (load_fast if fast else load_plain)(options)
    loaded = now()
    most = {"load_host_gib": host.end(), "load_peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None}
    same_start(model)
    data = dataset(options, model.config.get_text_config().vocab_size)

    class Clock(TrainerCallback):
        """Wall time of every step, and what is logged."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.logged: list[dict[str, float]] = []
            self.plan: str | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(now() - self.begun)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            # Afterwards the model is in its state for inference, which has another plan.
            plan = getattr(model, "activation_plan", None)
            self.plan = plan.describe() if plan is not None else None

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.logged.append({"loss": logs["loss"], "grad_norm": float(logs.get("grad_norm", 0.0))})

    clock = Clock()
    optimizer = "adamw_torch_fused" if cuda else "adamw_torch"
    if cuda and options.mode == "full" and not options.fsdp:
        # The 8-bit states know no shards.
        optimizer = "adamw_8bit"
    prepared = now()
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
            optim=optimizer,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            max_length=options.length,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=SEED,
            **{"bf16": cuda, "use_cpu": not cuda} | arguments | (FSDP if options.fsdp else {}) | options.arguments,
        ),
    )
    constructed = now()
    if cuda:
        most["construct_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trained: dict[Any, int] = {}
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            trained[weight.dtype] = trained.get(weight.dtype, 0) + weight.numel()
    steady = clock.times[min(WARM_UP, len(clock.times) - 1) :]
    adapted = getattr(model, "adapt_report", None)
    record = {
        "ranks": RANKS,
        "tokens_per_second": options.batch * options.length / statistics.median(steady),
        "step_ms": [f(steady) * 1e3 for f in (statistics.median, min, max)],
        "import_s": imported - started,
        "load_s": loaded - imported,
        "construct_s": constructed - prepared,
        **{name: largest(value) for name, value in most.items()},
        "first_step_s": clock.times[0],
        "peak_gib": largest(torch.cuda.max_memory_allocated() / GIB if cuda else None),
        "reserved_gib": largest(torch.cuda.max_memory_reserved() / GIB if cuda else None),
        "weights": {str(d).removeprefix("torch."): n for d, n in trained.items()},
        "plan": clock.plan,
        "adapted": adapted.summary() if adapted is not None else None,
        "steps": clock.logged,
    }
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT " + json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

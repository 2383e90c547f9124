"""Models on XLA devices, and what plain torch makes of the same batches on a CPU."""

from __future__ import annotations

import copy
import random

import torch
from conftest import make_tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainingArguments, xla_runtime
from pantheraml.training.tpu import FixedShape

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def load(path, *, lora=True, checkpointing=True, dtype=torch.float32, **options):
    """A model on the XLA devices, with adapters that are not zero, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(path),
        max_seq_length=64,
        dtype=dtype,
        load_in_4bit=False,
        full_finetuning=not lora,
        use_tpu=True,
        tpu_cores=xla_runtime.device_count(),
        use_gradient_checkpointing=checkpointing,
    )
    if lora:
        model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=checkpointing, **{**LORA, **options})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.device))
    xla_runtime.sync()
    return model, tokenizer


def ragged(rows=200, seed=0) -> Dataset:
    """Texts of 3 to 14 numbers."""
    numbers = random.Random(seed)
    return Dataset.from_dict(
        {"text": [" ".join(str(numbers.randint(0, 99)) for _ in range(numbers.randint(3, 14))) for _ in range(rows)]}
    )


def arguments(folder, **options):
    """Twenty steps of a batch of eight."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8 // xla_runtime.device_count(),
        "gradient_accumulation_steps": 1,
        "max_steps": 20,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "max_length": 64,
        "dataset_text_field": "text",
    }
    return PantheraMLTrainingArguments(**{**defaults, **options})


def trained(model) -> dict[str, torch.Tensor]:
    """The trained weights, on the host."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = dict(model.named_parameters())
    return dict(zip(names, [w.clone() for w in xla_runtime.read([weights[name] for name in names])], strict=True))


class Recorder(TrainerCallback):
    """Losses of all steps, on the device until asked for, and the runtime's counters after each step."""

    def __init__(self, trainer):
        self.counters, self._losses = [], []
        compute = trainer.training_step

        def step(*args, **kwargs):
            loss = compute(*args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        trainer.training_step = step
        trainer.add_callback(self)

    def on_step_end(self, *args, **kwargs):
        self.counters.append(xla_runtime.counters())

    @property
    def losses(self):
        return [float(loss) for loss in xla_runtime.read(self._losses)]


def record_batches(monkeypatch):
    """The batches that collators make, on the host, in order."""
    batches = []
    original = FixedShape.__call__

    def call(self, rows):
        batch = original(self, rows)
        batches.append({name: value.clone() for name, value in batch.items()})
        return batch

    monkeypatch.setattr(FixedShape, "__call__", call)
    return batches


def reference(start, batches, args, *, lora=True, model_type="llama", **overrides):
    """Train in plain torch on the CPU, from the weights ``start``. Returns the losses and the trained weights."""
    model = make_tiny(model_type, **overrides)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    missing = model.load_state_dict(copy.deepcopy(start), strict=False)
    assert not missing.unexpected_keys
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in weights if p.dim() > 1]
    rest = [p for p in weights if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    warmup, total = int(args.warmup_steps), args.max_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / max(1, warmup) if s < warmup else max(0.0, (total - s) / max(1, total - warmup))
    )
    losses = []
    count = args.gradient_accumulation_steps
    for step in range(total):
        parts = batches[step * count : (step + 1) * count]
        labels = [torch.nn.functional.pad(part["labels"][:, 1:], (0, 1), value=-100) for part in parts]
        tokens = sum(int((label != -100).sum()) for label in labels)
        for part, label in zip(parts, labels, strict=True):
            given = {
                name: value for name, value in part.items() if name in ("input_ids", "attention_mask", "position_ids")
            }
            logits = model(**given, use_cache=False).logits
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), reduction="sum")
                / tokens
            )
            loss.backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

"""One training run that gives the same numbers however many processes share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer, make_tiny
from datasets import Dataset
from training_support import panthera_model
from transformers import TrainerCallback

GLOBAL_BATCH = 8
# 8 + 8 + 1: the last batch leaves a second rank nothing, the lengths are ragged.
ROWS = 17


def ragged_rows(count: int = ROWS, *, seed: int = 0) -> Dataset:
    """Tokenised rows of 2 to 40 tokens; the third token of each is its index."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 40, (count,), generator=generator).tolist()
    rows = [torch.randint(50, 384, (length,), generator=generator).tolist() for length in lengths]
    for index, row in enumerate(rows):
        row[2] = 10 + index
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 2 + row[2:] for row in rows]})


class Seen(TrainerCallback):
    """Which rows each epoch's batches held, dummies left out, and the plan of activations."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def watch(self, trainer: Any) -> None:
        original = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            real = (inputs["labels"] != -100).any(dim=1)
            self.epochs[-1] += (inputs["input_ids"][real][:, 2] - 10).tolist()
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append([])


def train(
    folder: Path,
    *,
    ranks: int,
    accumulation: int = 1,
    lora: bool = True,
    checkpointing: bool | str = "auto",
    kind: str = "SFTTrainer",
    model: Any = None,
    callbacks: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    rows: Dataset | None = None,
    watched: bool = True,
    evaluated: bool = False,
    resume: bool = False,
) -> tuple[Any, Seen]:
    """Train on the same rows with the same global batch, whatever the number of ranks."""
    from trl import SFTConfig, SFTTrainer

    from pantheraml import trainer as facade

    classes = {
        "SFTTrainer": (SFTTrainer, SFTConfig),
        "PantheraMLTrainer": (facade.PantheraMLTrainer, facade.PantheraMLTrainingArguments),
        "PantheraMLDistributedTrainer": (
            getattr(facade, "PantheraMLDistributedTrainer", None),
            facade.PantheraMLTrainingArguments,
        ),
    }
    trainer_class, config_class = classes[kind]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "save_strategy": "no",
    }
    model = panthera_model(lora=lora, checkpointing=checkpointing) if model is None else model
    if all(parameter.dtype is torch.float32 for parameter in model.parameters()):
        # On a GPU all of them would train in mixed precision, which rounds otherwise where batches are otherwise.
        settings["bf16"] = False
    seen = Seen()
    trainer = trainer_class(
        model=model,
        args=config_class(**settings | (options or {})),
        train_dataset=ragged_rows() if rows is None else rows,
        eval_dataset=ragged_rows(7, seed=1),
        processing_class=build_tokenizer(),
        callbacks=[seen, *callbacks],
        **(trainer_options or {}),
    )
    if watched:
        seen.watch(trainer)
    if evaluated:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, seen


def losses_of(trainer: Any) -> list[float]:
    """The logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def gathered_weights(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters of a sharded model, by the names that they had before. Every rank has to call it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = full.detach().cpu().clone()
    return found


def save_tiny(folder: Path) -> None:
    """The model of ``panthera_model`` as a folder that can be loaded."""
    make_tiny("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def tiny_qlora(folder: Path, config: Any = None) -> Any:
    """The model of a folder in nf4, with adapters."""
    from pantheraml import FastLanguageModel

    options = {"max_seq_length": 64, "load_in_4bit": True, "dtype": torch.float32, "multi_gpu_config": config}
    model, _ = FastLanguageModel.from_pretrained(str(folder), **options)
    return FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj", "down_proj"])

"""Models and data for the tests of training."""

from __future__ import annotations

import torch
from conftest import make_tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model

SENTENCES = [f"number {i} is followed by {i + 1}, and then by {i + 2}" for i in range(16)]


def panthera_model(
    model_type: str = "llama",
    *,
    lora: bool = True,
    adapted: bool = True,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    max_seq_length: int = 64,
    checkpointing: bool | str = "auto",
    tied: bool = False,
    config: dict[str, int] | None = None,
    **lora_options,
):
    """A tiny model with a record, as loading leaves it, with LoRA adapters unless told otherwise."""
    from pantheraml.models.adapt import adapt
    from pantheraml.models.record import ModelRecord, attach_record

    model = make_tiny(model_type, tie_word_embeddings=tied, **(config or {}))
    if adapted:
        record = ModelRecord(
            name="tiny",
            base="tiny",
            revision=None,
            dtype=torch.float32,
            quantization="none",
            full_finetuning=not lora,
            max_seq_length=max_seq_length,
            gradient_checkpointing=checkpointing,
        )
        adapt(model)
        attach_record(model, record)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **lora_options))
        if adapted:
            adapt(model)
    return model


def texts(rows: int = 16) -> Dataset:
    """Short sentences in the column ``text``."""
    return Dataset.from_dict({"text": [SENTENCES[i % len(SENTENCES)] for i in range(rows)]})

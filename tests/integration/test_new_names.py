"""transformers' retired names of checkpointing: no part of a fine-tune uses them, so nothing warns of them."""

from __future__ import annotations

import warnings

import pytest
from conftest import build_tokenizer
from peft import LoraConfig
from training_support import panthera_model, texts
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig, SFTTrainer

from pantheraml import FastLanguageModel, PantheraMLTrainingArguments

RETIRED = "is deprecated and will be removed in v6"
pytestmark = pytest.mark.skipif(
    not hasattr(TrainingArguments, "activation_checkpointing"), reason="this transformers has no other names"
)


@pytest.fixture(autouse=True)
def _raises():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{RETIRED}", category=FutureWarning)
        yield


def test_loading_adapting_training_and_loading_again_warn_of_nothing(tiny_llama_dir, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=False, dtype=None)
    model = FastLanguageModel.get_peft_model(model, r=2)
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    trainer = SFTTrainer(model=model, args=args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    trainer.evaluate(texts(2))
    model.save_pretrained(tmp_path / "adapter")
    FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), load_in_4bit=False)


def test_a_model_that_trl_wraps_keeps_its_class(tmp_path):
    model = panthera_model(lora=False)
    kind = type(model)
    args = PantheraMLTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=texts(), processing_class=build_tokenizer(), peft_config=config
    )
    trainer.train()
    assert type(model) is kind


@pytest.mark.parametrize("config", [SFTConfig, DPOConfig])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, False),
    ],
    ids=str,
)
def test_the_old_name_means_the_new_one(config, given, expected, tmp_path):
    args = config(output_dir=str(tmp_path), use_cpu=True, **given)
    assert args.activation_checkpointing is expected
    assert args.gradient_checkpointing is expected
    kwargs = {"use_reentrant": False}
    args = config(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs=kwargs)
    assert args.activation_checkpointing_kwargs == kwargs

"""TRL's preference and reinforcement trainers give an adapted model the losses and weights of a stock one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from pantheraml.models.adapt import adapt
from pantheraml.models.record import ModelRecord, attach_record

PAIRS = Dataset.from_dict(
    {
        "prompt": ["Question: what is two plus three? Answer:", "hello there"] * 4,
        "chosen": [" five.", " general greetings, friend"] * 4,
        "rejected": [" the quick brown fox", " 0 1 2"] * 4,
    }
)
JUDGED = Dataset.from_dict(
    {
        "prompt": ["Question: what is two plus three? Answer:"] * 8,
        "completion": [" five.", " the lazy dog"] * 4,
        "label": [True, False] * 4,
    }
)
PROMPTS = Dataset.from_dict({"prompt": ["hello there", "Question: what is"] * 4})


def length_reward(completions, **_kwargs):
    return [float(len(text)) for text in completions]


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}, {}),
    "kto": (KTOTrainer, KTOConfig, JUDGED, {}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        PROMPTS,
        {"num_generations": 2, "max_completion_length": 6},
        {"reward_funcs": length_reward},
    ),
}


def trained(name, model, tokenizer, folder):
    trainer_class, config_class, rows, config, extra = TRAINERS[name]
    args = config_class(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adamw_torch",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=1,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **config,
    )
    trainer = trainer_class(
        model=model, processing_class=copy.deepcopy(tokenizer), train_dataset=rows, args=args, **extra
    )
    torch.manual_seed(2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", TRAINERS)
def test_losses_and_weights_are_those_of_a_stock_model(name, tiny_tokenizer, tmp_path):
    stock = get_peft_model(
        make_tiny("llama"),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    ours = copy.deepcopy(stock)
    inner = ours.get_base_model()
    attach_record(
        inner,
        ModelRecord("tiny", "tiny", None, torch.float32, "none", False, 256, gradient_checkpointing=False),
    )
    assert adapt(ours).swapped
    expected_losses, expected = trained(name, stock, tiny_tokenizer, tmp_path / "stock")
    losses, weights = trained(name, ours, tiny_tokenizer, tmp_path / "ours")
    assert losses == pytest.approx(expected_losses, rel=1e-4, abs=1e-4)
    moved = 0.0
    for key, want in expected.items():
        torch.testing.assert_close(weights[key], want, rtol=0, atol=2e-4, msg=key)
        moved = max(moved, want.abs().max().item())
    assert moved > 0.0

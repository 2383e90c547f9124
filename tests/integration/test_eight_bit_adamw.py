"""Trainers create PantheraML's form of bitsandbytes' 8-bit AdamW, with the options and checkpoints of the original."""

from __future__ import annotations

import pytest
import torch
from training_support import panthera_model, texts

bitsandbytes = pytest.importorskip("bitsandbytes")

from pantheraml.training.bitsandbytes_adamw import AdamW  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture(autouse=True)
def _no_exceptions_of_other_optimizers(monkeypatch):
    """In bitsandbytes, those for weights of one optimizer hold for weights at the same places of every later one."""
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)


def sft(folder, tokenizer, model=None, *, options=None, ours=True, **keywords):
    from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

    args = PantheraMLTrainingArguments(output_dir=str(folder), **OPTIONS | {"optim": "adamw_8bit"} | (options or {}))
    model = panthera_model(lora=False) if model is None else model
    trainer = PantheraMLTrainer(model=model, tokenizer=tokenizer, args=args, train_dataset=texts(), **keywords)
    if not ours:
        del trainer.get_optimizer_cls_and_kwargs
    return trainer


def plain(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize(
    ("optim", "kind", "paged"),
    [
        ("adamw_8bit", AdamW, False),
        ("adamw_bnb_8bit", AdamW, False),
        ("paged_adamw_8bit", AdamW, True),
        ("paged_adamw_32bit", bitsandbytes.optim.AdamW, True),
        ("lion_8bit", bitsandbytes.optim.Lion, False),
        ("adamw_torch", torch.optim.AdamW, None),
    ],
)
def test_which_optimizers_are_replaced(optim, kind, paged, tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer, options={"optim": optim})
    optimizer = plain(trainer.create_optimizer())
    assert type(optimizer) is kind
    assert getattr(optimizer, "is_paged", None) == paged


def test_the_options_are_those_of_the_arguments(tmp_path, tiny_tokenizer):
    options = {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1, "embedding_learning_rate": 1e-4}
    trainer = sft(tmp_path, tiny_tokenizer, options=options)
    groups = plain(trainer.create_optimizer()).param_groups
    assert {group["lr"] for group in groups if group["params"]} == {1e-3, 1e-4}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.9, 0.95), 1e-6)}


def test_embeddings_keep_32_bits(tmp_path, tiny_tokenizer):
    """Transformers asks for that where it sees an optimizer of bitsandbytes."""
    trainer = sft(tmp_path, tiny_tokenizer)
    trainer.train()
    model, states = trainer.model, plain(trainer.optimizer).state
    assert states[model.get_input_embeddings().weight]["state1"].dtype == torch.float32
    assert states[model.model.layers[0].self_attn.q_proj.weight]["state1"].dtype == torch.uint8
    assert states[model.model.norm.weight]["state1"].dtype == torch.float32


def test_an_optimizer_that_was_given_stays(tmp_path, tiny_tokenizer):
    model = panthera_model(lora=False)
    given = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    trainer = sft(tmp_path, tiny_tokenizer, model, optimizers=(given, None))
    trainer.train()
    assert plain(trainer.optimizer) is given


@pytest.mark.parametrize("ours", [True, False], ids=["from ours", "from theirs"])
def test_training_resumes_across_the_two(ours, tmp_path, tiny_tokenizer):
    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = sft(tmp_path, tiny_tokenizer, options=options, ours=ours)
    whole.train()
    resumed = sft(tmp_path, tiny_tokenizer, options=options, ours=not ours)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert isinstance(plain(resumed.optimizer), AdamW) is not ours
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(whole)) == 4

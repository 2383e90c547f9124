"""A loss or gradient that is not finite stops training before the weights change."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from training_support import panthera_model, texts
from transformers import TrainerCallback

from pantheraml.errors import NonFiniteError

NAN, INF = float("nan"), float("inf")


class Poison(TrainerCallback):
    """Breaks the loss or one gradient of the given steps (counted from 1), and copies the weights before each step."""

    def __init__(self, where: str, value: float, steps: set[int], micro_batch: int = 0):
        self.where, self.value, self.steps, self.micro_batch = where, value, steps, micro_batch
        self.now, self.batch = 0, 0
        self.before = {}

    def install(self, trainer):
        model = trainer.model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.where == "loss":
            original = trainer.compute_loss

            def compute_loss(*args, **kwargs):
                loss = original(*args, **kwargs)
                bad = self.now in self.steps and self.batch == self.micro_batch
                self.batch += 1
                return loss * self.value if bad else loss

            trainer.compute_loss = compute_loss
        else:
            parameter = next(iter(self.trained.values()))
            parameter.register_hook(self._spoil)
        trainer.add_callback(self)

    def _spoil(self, gradient):
        if self.now in self.steps:
            gradient = gradient.clone()
            gradient.view(-1)[0] = self.value
        return gradient

    def on_step_begin(self, args, state, control, **kwargs):
        self.now, self.batch = state.global_step + 1, 0
        self.before = {name: parameter.detach().clone() for name, parameter in self.trained.items()}


def make_trainer(tmp_path, tokenizer, poison, kind="SFTTrainer", **options):
    """A trainer of three steps of two micro-batches, with the poison in."""
    from trl import SFTConfig, SFTTrainer

    from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

    trainer_class, config = {
        "SFTTrainer": (SFTTrainer, SFTConfig),
        "PantheraMLTrainer": (PantheraMLTrainer, PantheraMLTrainingArguments),
    }[kind]
    defaults = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "warmup_steps": 0}
    options = defaults | options
    args = config(output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    trainer = trainer_class(model=panthera_model(), args=args, train_dataset=texts(), processing_class=tokenizer)
    poison.install(trainer)
    return trainer


def unchanged(poison) -> bool:
    return all(torch.equal(parameter, poison.before[name]) for name, parameter in poison.trained.items())


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("norm", [1.0, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_step_is_not_made(where, value, norm, tmp_path, tiny_tokenizer):
    poison = Poison(where, value, {2})
    trainer = make_trainer(tmp_path, tiny_tokenizer, poison, max_grad_norm=norm)
    with pytest.raises(NonFiniteError, match="step 2") as caught:
        trainer.train()
    assert trainer.state.global_step == 1
    assert unchanged(poison)
    assert caught.value.exit_code == 6
    if where == "loss":
        assert str(value) in str(caught.value)


def test_the_micro_batch_and_its_rows_are_named(tmp_path, tiny_tokenizer):
    poison = Poison("loss", NAN, {1}, micro_batch=1)
    trainer = make_trainer(tmp_path, tiny_tokenizer, poison)
    seen = []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(NonFiniteError, match=r"micro-batch 2 of 2, rows (\d+), (\d+) of the training set") as caught:
        trainer.train()
    named = [int(word.strip(",")) for word in str(caught.value).split("rows ")[1].split(" of ")[0].split()]
    rows = sorted(trainer.train_dataset[named]["input_ids"])
    batch = sorted([token for token in row if token != tiny_tokenizer.pad_token_id] for row in seen[1].tolist())
    assert rows == batch


def test_a_bad_step_is_left_out_when_asked(tmp_path, tiny_tokenizer):
    poison = Poison("loss", NAN, {2})
    trainer = make_trainer(tmp_path, tiny_tokenizer, poison, "PantheraMLTrainer", on_nonfinite="skip", max_steps=4)
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append({name: p.detach().clone() for name, p in poison.trained.items()})

    trainer.add_callback(Watch())
    result = trainer.train()
    assert result.global_step == 4
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(weights)]
    assert same == [True, False, False]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
    assert math.isfinite(result.training_loss)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] == "NaN"
    assert lines[-1]["skipped_steps"] == 1


def test_too_many_bad_steps_in_a_row_stop(tmp_path, tiny_tokenizer):
    poison = Poison("gradient", NAN, {2, 3, 4})
    trainer = make_trainer(
        tmp_path,
        tiny_tokenizer,
        poison,
        "PantheraMLTrainer",
        on_nonfinite="skip",
        max_nonfinite_steps=2,
        max_steps=6,
    )
    with pytest.raises(NonFiniteError, match="step 4") as caught:
        trainer.train()
    assert "3 steps in a row" in str(caught.value)
    assert unchanged(poison)


def test_a_clean_run_is_not_disturbed(tmp_path, tiny_tokenizer):
    """The guard changes nothing: the same weights as without it."""
    from pantheraml.training.guards import NonFiniteGuard

    results = []
    for guarded in (True, False):
        trainer = make_trainer(tmp_path / str(guarded), tiny_tokenizer, Poison("loss", NAN, set()))
        if not guarded:
            trainer.remove_callback(NonFiniteGuard)
        trainer.train()
        results.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    for one, other in zip(*results):
        assert torch.equal(one, other)


def _one_rank(rank: int, folder: str) -> None:
    """A step whose loss is NaN on rank 1 alone; writes down what was raised."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from pantheraml.training.guards import NonFiniteGuard
    from pantheraml.training.steps import StepWatch

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1)
    args = SimpleNamespace(device=torch.device("cpu"), world_size=2, process_index=rank)
    accelerator = SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_, scaler=None)
    loss = torch.tensor(NAN if rank == 1 else 1.0)
    trainer = SimpleNamespace(
        args=args, accelerator=accelerator, training_step=lambda *arguments: loss, train_dataset=None
    )
    guard = NonFiniteGuard(trainer, StepWatch(trainer))
    trainer.training_step(model, {"input_ids": torch.ones(1, 3 + rank)})
    model.weight.grad = torch.ones_like(model.weight)
    try:
        guard.on_pre_optimizer_step(args, SimpleNamespace(global_step=0), None, model=model)
    except NonFiniteError as error:
        Path(folder, f"rank{rank}").write_text(f"{guard._watch.trained_tokens}|{error}")
    dist.destroy_process_group()


def test_all_ranks_stop_when_one_must(tmp_path):
    torch.multiprocessing.start_processes(_one_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    messages = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert "not finite on rank 1 in step 1" in messages[0]
    assert "the loss is nan in step 1" in messages[1]
    assert "rank 1" in messages[1]
    assert [message.split("|")[0] for message in messages] == ["7", "7"], "tokens of both ranks"

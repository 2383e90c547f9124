"""Parts of the guard that need no training run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from pantheraml.errors import ConfigError, NonFiniteError
from pantheraml.training.guards import NonFiniteGuard, find_rows
from pantheraml.training.steps import StepWatch, count_tokens


class Accelerator:
    """Stands for accelerate's: clips, and may have a gradient scaler."""

    def __init__(self, scale=None):
        self.scaler = None
        if scale is not None:
            self.scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)

    def clip_grad_norm_(self, parameters, max_norm):
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def make(scale=None, **options):
    """A guard around a stand-in trainer of a linear layer; returns the guard, a step function and the layer."""
    model = nn.Linear(3, 1, bias=False)
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1, process_index=0)

    def training_step(model, inputs, num_items_in_batch=None):
        loss = model(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    trainer = SimpleNamespace(
        args=args, accelerator=Accelerator(scale), training_step=training_step, train_dataset=None
    )
    guard = NonFiniteGuard(trainer, StepWatch(trainer), **options)

    def step(x, norm=1.0):
        trainer.training_step(model, {"x": x, "attention_mask": torch.ones(2, 5)})
        if norm is not None:
            trainer.accelerator.clip_grad_norm_(model.parameters(), norm)
        guard.on_pre_optimizer_step(args, SimpleNamespace(global_step=4), None, model=model)

    return guard, step, model


GOOD, BAD = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 1.0]])


@pytest.mark.parametrize("norm", [1.0, None], ids=["norm known", "norm not computed"])
def test_good_steps_pass_and_bad_ones_do_not(norm):
    guard, step, model = make()
    step(GOOD, norm)
    assert model.weight.grad is not None
    with pytest.raises(NonFiniteError, match="step 5"):
        step(BAD, norm)
    assert model.weight.grad is None
    assert guard.skipped == 1


def test_tokens_are_counted_without_padding():
    guard, step, _ = make()
    step(GOOD)
    step(GOOD)
    assert guard._watch.trained_tokens == 20


def test_skipping_counts_only_steps_in_a_row():
    guard, step, _ = make(action="skip", patience=1)
    for x in (BAD, GOOD, BAD, GOOD):
        step(x)
    assert guard.skipped == 2
    step(BAD)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        step(BAD)


@pytest.mark.parametrize(("scale", "stops"), [(1024.0, False), (0.5, True)], ids=["ordinary", "fallen"])
def test_an_overflow_is_left_to_the_gradient_scaler(scale, stops):
    guard, _, model = make(scale)
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    state = SimpleNamespace(global_step=0)
    if stops:
        with pytest.raises(NonFiniteError, match="gradient is not finite"):
            guard.on_pre_optimizer_step(guard._trainer.args, state, None, model=model)
    else:
        guard.on_pre_optimizer_step(guard._trainer.args, state, None, model=model)
        assert guard.skipped == 0


def test_a_loss_that_is_not_finite_is_never_left_to_the_scaler():
    _, step, _ = make(1024.0)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        step(BAD)


def test_unknown_action():
    with pytest.raises(ConfigError, match="on_nonfinite"):
        make(action="stop")


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_found_through_padding(side):
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8]]})
    padded = [[6, 7, 8], [0, 4, 5] if side == "left" else [4, 5, 0]]
    assert find_rows(dataset, torch.tensor(padded)) == [1, 2]


@pytest.mark.parametrize("dataset", [None, [1, 2], Dataset.from_dict({"text": ["a"]})], ids=["none", "list", "text"])
def test_rows_that_cannot_be_told(dataset):
    assert find_rows(dataset, torch.tensor([[1]])) == []
    assert find_rows(Dataset.from_dict({"input_ids": [[1]]}), None) == []


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"input_ids": torch.zeros(2, 3)}, 6),
        ({"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, 3),
        ({"prompt_attention_mask": torch.ones(2, 2), "completion_attention_mask": torch.ones(2, 3)}, 10),
        ({"pixel_values": torch.zeros(1)}, 0),
        ([{"prompt": "a"}], 0),
    ],
    ids=["no mask", "mask", "pairs", "none", "list"],
)
def test_count_tokens(inputs, expected):
    assert int(count_tokens(inputs)) == expected

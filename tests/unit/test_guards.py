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

    def step(x, norm=1.0, optimizer=None):
        trainer.training_step(model, {"x": x, "attention_mask": torch.ones(2, 5)})
        if norm is not None:
            trainer.accelerator.clip_grad_norm_(model.parameters(), norm)
        guard.on_pre_optimizer_step(args, SimpleNamespace(global_step=4), None, model=model, optimizer=optimizer)
        if optimizer is not None:
            optimizer.step()
            guard.on_optimizer_step(args, SimpleNamespace(global_step=4), None, model=model, optimizer=optimizer)
            model.zero_grad()
            guard.on_step_end(args, SimpleNamespace(global_step=5), None, model=model, optimizer=optimizer)

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


def states_of(optimizer):
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_an_optimizer_that_is_told_on_the_device_leaves_a_bad_step_out(wrapped):
    guard, step, model = make(action="skip")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    given = SimpleNamespace(optimizer=optimizer, step=optimizer.step) if wrapped else optimizer
    before = model.weight.clone()
    step(GOOD, optimizer=given)
    weight, states = model.weight.clone(), states_of(optimizer)
    assert not torch.equal(weight, before)
    step(BAD, optimizer=given)
    assert guard.skipped == 1
    assert torch.equal(model.weight, weight)
    assert all(map(torch.equal, states_of(optimizer), states))
    assert not hasattr(optimizer, "found_inf")
    # As if the bad step had not been.
    step(GOOD, optimizer=given)
    other, again, same = make()
    same.load_state_dict({"weight": before})
    plain = torch.optim.AdamW(same.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(2):
        again(GOOD, optimizer=plain)
    assert other.skipped == 0
    assert torch.equal(model.weight, same.weight)
    assert guard._watch.trained_tokens == 30


def test_a_bad_step_that_the_optimizer_left_out_is_named_and_ends_training():
    _, step, model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    weight = model.weight.clone()
    with pytest.raises(NonFiniteError, match="the loss is nan in step 5, micro-batch 1 of 1"):
        step(BAD, optimizer=optimizer)
    assert torch.equal(model.weight, weight)
    _, step, model = make()
    model.register_parameter("other", nn.Parameter(torch.ones(2)))
    model.other.grad = torch.tensor([1.0, float("inf")])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # The gradients are gone by then, and were kept to be named.
    with pytest.raises(NonFiniteError, match=r"gradient is not finite \(norm inf\) in step 5, first in other"):
        step(GOOD, optimizer=optimizer)


def test_a_step_that_an_error_cut_off_is_forgotten():
    guard, step, model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        step(GOOD, optimizer=optimizer)
    handle.remove()
    guard.on_train_begin(None, None, None)
    assert guard._told is None
    assert not hasattr(optimizer, "found_inf")
    step(GOOD, optimizer=optimizer)


def test_an_optimizer_that_counts_on_the_host_is_told_what_it_left_out():
    class Counting(torch.optim.SGD):
        takes_found_inf, uncounted = True, 0

        def step(self, closure=None):
            told, self.found_inf = self.found_inf, None
            if not told:
                super().step(closure)
            self.found_inf = told

        def uncount(self):
            self.uncounted += 1

    guard, step, model = make(action="skip")
    optimizer = Counting(model.parameters(), lr=0.1)
    step(GOOD, optimizer=optimizer)
    weight = model.weight.clone()
    step(BAD, optimizer=optimizer)
    assert (guard.skipped, optimizer.uncounted) == (1, 1)
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize(
    "kind", ["not fused", "scaled", "of a checkpoint that was not fused", "one group not fused", "with momentum"]
)
def test_an_optimizer_that_cannot_be_told_is_not(kind):
    guard, step, model = make(1024.0 if kind == "scaled" else None, action="skip")
    optimizer = torch.optim.AdamW(model.parameters(), fused=kind != "not fused")
    if kind == "of a checkpoint that was not fused":
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    if kind == "one group not fused":
        model.register_parameter("other", nn.Parameter(torch.ones(2)))
        optimizer.add_param_group({"params": [model.other], "fused": False})
    if kind == "with momentum":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, fused=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((guard._told, hasattr(optimizer, "found_inf"))))
    before = model.weight.clone()
    step(BAD, optimizer=optimizer)
    assert torch.equal(model.weight, before)
    step(GOOD, optimizer=optimizer)
    assert not torch.equal(model.weight, before)
    assert seen == [(None, False)] * 2


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

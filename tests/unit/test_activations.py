"""The activation plan: what it keeps for a given memory, and that it never changes a number."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from conftest import make_tiny

from pantheraml.errors import ConfigError, UnsupportedError
from pantheraml.models.activations import ActivationPlan, Budget, Memory, mode_of, set_activation_plan

IDS = torch.arange(3, 27).view(2, 12)


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("value", ["auto", "unsloth", True, "offload", False], ids=str)
def test_every_mode_gives_the_same_gradients_bit_for_bit(value):
    model = make_tiny("llama", num_hidden_layers=4)
    expected = gradients(copy.deepcopy(model))
    set_activation_plan(model, value)
    for _step in range(3):
        for name, grad in gradients(model).items():
            assert torch.equal(grad, expected[name]), name


class Allocator:
    """Stands in for the device: a layer that keeps its activations holds ``keep`` bytes a token until backward."""

    def __init__(self, *, capacity: int, base: int, recompute_peak: int):
        self.capacity, self.base, self.recompute_peak = capacity, base, recompute_peak
        self.kept = 0
        self.peak = base

    def __call__(self, _device) -> Memory:
        return Memory(self.base + self.kept, self.peak, self.capacity - self.base - self.kept)


class RecordingPlan(ActivationPlan):
    """Notes which layers were recomputed instead of recomputing them."""

    def _recompute(self, function, *args):
        return args[0]


class Layer(torch.nn.Module):
    """Calls back when it runs, the way of newer (``forward`` first) or older (``__call__``) transformers."""

    def body(self, hidden, ran):
        ran(self, hidden)
        return hidden

    def bound(self, ran, *, older):
        if older:
            return functools.partial(self.body, ran=ran)
        return functools.partial(lambda layer, hidden: layer.body(hidden, ran), self)


def drive(plan, layers, allocator, *, tokens, keep, older=False):
    """One simulated step; returns, layer by layer, whether it was kept."""
    hidden = torch.zeros(1, tokens, 4, requires_grad=True)
    kept = []

    def ran(layer, h):
        kept.append(layer)
        allocator.kept += keep * tokens + h.numel() * h.element_size()

    for layer in layers:
        plan.run(layer.bound(ran, older=older), hidden)
    allocator.peak = max(allocator.peak, allocator.recompute_peak)
    allocator.kept = 0
    return [layer in kept for layer in layers]


@pytest.mark.parametrize("older", [False, True], ids=["layer bound first", "call of the layer bound"])
def test_the_plan_keeps_the_last_layers_that_fit(older):
    layers = [Layer() for _ in range(8)]
    step = functools.partial(drive, older=older)
    allocator = Allocator(capacity=10_000, base=1_000, recompute_peak=2_000)
    plan = RecordingPlan(layers, "auto", fraction=0.9, memory=allocator)
    assert step(plan, layers, allocator, tokens=10, keep=150) == [False] * 7 + [True]
    # limit 1,000 + 0.9 * 9,000 = 9,100; (9,100 - 2,000) / 1,500 = 4 layers
    assert step(plan, layers, allocator, tokens=10, keep=150) == [False] * 4 + [True] * 4
    # half the tokens cost half, so all eight fit
    assert step(plan, layers, allocator, tokens=5, keep=150) == [True] * 8
    # more tokens than measured: measure again before keeping anything
    assert step(plan, layers, allocator, tokens=20, keep=150) == [False] * 7 + [True]


def test_a_full_device_recomputes_everything():
    budget = Budget(tokens=100, keep_bytes=10, limit=1_000, peak=1_200)
    assert budget.layers_to_keep(100, 32) == 0
    assert Budget(tokens=100, keep_bytes=10, limit=1_000).layers_to_keep(100, 32) == 0


def test_evaluation_is_untouched():
    model = make_tiny("llama")
    plan = set_activation_plan(model, True)
    with torch.no_grad():
        model.train()
        assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)
    assert "recomputed" in plan.describe()


def test_unknown_modes_fractions_and_models_are_refused():
    with pytest.raises(ConfigError, match="sometimes"):
        mode_of("sometimes")
    with pytest.raises(ConfigError, match="fraction"):
        set_activation_plan(make_tiny("llama"), "auto", activation_memory_fraction=1.5)
    with pytest.raises(UnsupportedError, match="Linear"):
        set_activation_plan(torch.nn.Linear(2, 2), True)


@pytest.mark.gpu
def test_a_gpu_keeps_what_fits_and_frees_it():
    model = make_tiny("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=1024).cuda()
    plan = set_activation_plan(model, "auto")
    ids = torch.randint(3, 300, (4, 256), device="cuda")
    losses = []
    for _step in range(3):
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert plan.kept == 6
    assert len(set(losses)) == 1

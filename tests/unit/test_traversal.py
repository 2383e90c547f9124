"""Quick visits to a model's modules give what torch's own give."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from training_support import panthera_model

from pantheraml.training.traversal import parameters_of, quick_traversal, set_mode


class Own(nn.Module):
    """Its normalisation stays in evaluation, as some vision towers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.asked: list[bool] = []

    def train(self, mode: bool = True):
        self.asked.append(mode)
        super().train(mode)
        self.norm.training = False
        return self


class Odd(nn.Module):
    """Modules and parameters that are shared, missing, or have a ``train`` of their own."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.first = nn.Sequential(shared, nn.Dropout(0.5), Own())
        self.second = nn.ModuleList([nn.Linear(2, 2), shared])
        self.second[0].bias = shared.bias
        self.nothing = None
        self.register_module("missing", None)
        self.register_parameter("absent", None)
        self.own = nn.Parameter(torch.zeros(1))


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def models() -> list[nn.Module]:
    return [Odd(), panthera_model(), panthera_model(use_dora=True)]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("index", range(3))
def test_modes_are_those_of_stock(index, mode):
    quick, stock = models()[index], models()[index]
    for model in (quick, stock):
        nn.Module.train(model, not mode)
        next(iter(model.children())).training = mode
    with quick_traversal(quick):
        assert quick.train(mode) is quick
    stock.train(mode)
    assert modes(quick) == modes(stock)
    with pytest.raises(ValueError, match="boolean"):
        set_mode(quick, 1)  # type: ignore[arg-type]


def test_a_class_is_asked_by_its_own_method_once():
    model = Odd()
    with quick_traversal(model):
        model.train(False)
        model.eval()
    assert model.first[2].asked == [False, False]


@pytest.mark.parametrize("index", range(3))
def test_parameters_and_their_order_are_those_of_stock(index):
    model = models()[index]
    expected = list(model.parameters())
    with quick_traversal(model):
        found = list(model.parameters())
        own = list(model.parameters(recurse=False))
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert all(a is b for a, b in zip(own, nn.Module.parameters(model, recurse=False), strict=True))


def test_a_module_that_hides_modules_is_respected():
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(2, 2), nn.Linear(2, 2)

        def named_modules(self, memo=None, prefix="", remove_duplicate=True):
            yield prefix, self
            yield f"{prefix}.seen", self.seen

    model = nn.Sequential(Hiding())
    assert [id(p) for p in parameters_of(model)] == [id(p) for p in model.parameters()]
    assert len(parameters_of(model)) == 2


def test_modules_added_meanwhile_are_visited():
    model = nn.Sequential(nn.Linear(2, 2))
    with quick_traversal(model):
        list(model.parameters())
        model.train()
        model.append(nn.Sequential(nn.Linear(2, 2)))
        model.train(False)
        assert not model[1][0].training
        assert len(list(model.parameters())) == 4


def test_gradients_are_dropped_and_counts_agree():
    model = panthera_model()
    counts = {key: model.num_parameters(**{key: True}) for key in ("only_trainable", "exclude_embeddings")}
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    with quick_traversal(model):
        for key, count in counts.items():
            assert model.num_parameters(**{key: True}) == count
        model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_copy_made_meanwhile_is_its_own_and_nothing_stays():
    model = panthera_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with quick_traversal(model):
        other = copy.deepcopy(model)
        model.train()
        other.eval()
        assert model.training
        assert not any(parameter is mine for parameter, mine in zip(other.parameters(), model.parameters()))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_the_walk_below_a_transformers_model_is_the_quick_one(monkeypatch):
    """transformers' models have a ``train`` of their own, which must not lead back to torch's recursion."""
    model = get_peft_model(panthera_model(lora=False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    visited = []
    original = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: (visited.append(self), original(self, mode))[1])
    with quick_traversal(model):
        model.train()
    assert len(visited) < 10

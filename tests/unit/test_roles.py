"""Structure proposes a role, and a probe of the stock forward decides."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from torch import nn

from pantheraml.models.layers import mlp, norm
from pantheraml.models.probe import Regime
from pantheraml.models.roles import Role, find_head, find_roles


class LlamaLike(nn.Module):
    def __init__(self, size=24, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaLike(LlamaLike):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class LateCast(LlamaLike):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide).to(x.dtype)


class EpsilonOutside(LlamaLike):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(x.dtype)


class OffsetTwo(LlamaLike):
    def forward(self, x):
        return super().forward(x) + x.new_tensor(2.0) * x


class Clamped(LlamaLike):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class Noisy(LlamaLike):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.001, self.training)


class CentredLike(LlamaLike):
    def forward(self, x):
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        return (self.weight.float() * (wide - mean) * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


class Raising(LlamaLike):
    def forward(self, x):
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("cls", "op", "offset", "casting"),
    [
        (LlamaLike, "rms_norm", 0.0, "input"),
        (GemmaLike, "rms_norm", 1.0, "float32"),
        (LateCast, "rms_norm", 0.0, "float32"),
        (CentredLike, "layer_norm", 0.0, "input"),
    ],
)
def test_norms_are_told_apart(cls, op, offset, casting):
    swap = norm.plan(cls())
    assert not isinstance(swap, str), swap
    assert (swap.plan.op, swap.plan.offset, swap.plan.casting) == (op, offset, casting)
    assert Regime.SAME in swap.plan.regimes
    assert swap.plan.eps == 1e-5


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (EpsilonOutside, "something else"),
        (OffsetTwo, "something else"),
        (Clamped, "something else"),
        (Noisy, "random numbers"),
        (Raising, "KeyError"),
    ],
)
def test_norms_that_only_look_so_are_left(cls, reason):
    assert reason in norm.plan(cls())


def test_probing_touches_neither_the_module_nor_the_random_state():
    module = LlamaLike()
    before = module.weight.clone()
    state = torch.random.get_rng_state()
    keys = set(module.__dict__)
    norm.plan(module)
    assert torch.equal(module.weight, before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(module.__dict__) == keys


class GluLike(nn.Module):
    def __init__(self, hidden=16, width=40, act=nn.functional.silu, order="gud", bias=False):
        super().__init__()
        sizes = {"g": (hidden, width), "u": (hidden, width), "d": (width, hidden)}
        names = {"g": "w1", "u": "w3", "d": "w2"}
        for letter in order:
            self.add_module(names[letter], nn.Linear(*sizes[letter], bias=bias))
        self.act = act

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Packed(nn.Module):
    def __init__(self, hidden=16, width=40, gate_first=True):
        super().__init__()
        self.inp = nn.Linear(hidden, 2 * width, bias=False)
        self.out = nn.Linear(width, hidden, bias=False)
        self.width, self.gate_first = width, gate_first

    def forward(self, x):
        first, second = self.inp(x).split(self.width, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.out(nn.functional.silu(gate) * up)


class Interleaved(Packed):
    def forward(self, x):
        both = self.inp(x)
        return self.out(nn.functional.silu(both[..., ::2]) * both[..., 1::2])


class Limited(GluLike):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)).clamp(max=7.0) * self.w3(x))


class Scaled(GluLike):
    def forward(self, x):
        return self.w2(self.act(self.w1(x) * 1.25) * self.w3(x))


class Dropped(GluLike):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.01, self.training)


ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
}


@pytest.mark.parametrize("order", ["gud", "ugd", "dgu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_gated_mlps_are_told_apart(order, bias, name):
    module = GluLike(act=ACTIVATIONS[name], order=order, bias=bias)
    swap = mlp.plan(module)
    assert not isinstance(swap, str), swap
    assert (swap.plan.activation, swap.plan.gate, swap.plan.up, swap.plan.down) == (name, "w1", "w3", "w2")
    x = torch.randn(3, 16)
    torch.testing.assert_close(swap.plan.compute(module, x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "layout"),
    [(Packed(), "gate_first"), (Packed(gate_first=False), "up_first"), (Interleaved(), "interleaved")],
    ids=["gate_first", "up_first", "interleaved"],
)
def test_packed_mlps(module, layout):
    swap = mlp.plan(module)
    assert not isinstance(swap, str), swap
    assert (swap.plan.layout, swap.plan.up) == (layout, None)
    x = torch.randn(3, 16)
    torch.testing.assert_close(swap.plan.compute(module, x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Limited(), "something else"),
        (Scaled(), "something else"),
        (Dropped(), "random numbers"),
        (GluLike(act=nn.functional.mish), "something else"),
    ],
    ids=["limited", "scaled", "dropout", "mish"],
)
def test_mlps_that_only_look_so_are_left(module, reason):
    assert reason in mlp.plan(module)


def test_projections_of_different_dtype_are_left():
    module = GluLike()
    module.w2.to(torch.bfloat16)
    assert "dtype" in mlp.plan(module)


@pytest.mark.parametrize(
    ("model_type", "counts"),
    [
        ("llama", {Role.NORM: 5, Role.GLU_MLP: 2, Role.LAYER: 2, Role.HEAD: 1}),
        ("qwen3", {Role.NORM: 9, Role.GLU_MLP: 2, Role.LAYER: 2, Role.HEAD: 1}),
        ("phi3", {Role.NORM: 5, Role.GLU_MLP: 2, Role.LAYER: 2, Role.HEAD: 1}),
        ("mixtral", {Role.NORM: 5, Role.EXPERTS: 2, Role.LAYER: 2, Role.HEAD: 1}),
        ("gpt2", {Role.NORM: 5, Role.HEAD: 1}),
    ],
)
def test_roles_of_families(model_type, counts):
    overrides = {"num_local_experts": 4} if model_type == "mixtral" else {}
    found = [candidate.role for candidate in find_roles(make_tiny(model_type, **overrides))]
    assert {role: found.count(role) for role in set(found) - {Role.ATTENTION}} == counts


def test_the_head_is_found_under_any_name_and_may_be_missing():
    from transformers import AutoConfig, AutoModel

    assert find_head(make_tiny("bert", is_decoder=True))[0] == "cls.predictions.decoder"
    assert find_head(AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=64, hidden_size=32,
                     intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))) is None  # fmt: skip

"""Experts of a mixture as one node, alone and under PEFT's adapters, against the stock forwards and float64 truth."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from test_fused_layers import FLOOR, IDS, step
from torch import nn

from pantheraml.models.activations import set_activation_plan
from pantheraml.models.adapt import adapt, restore
from pantheraml.models.layers import experts
from pantheraml.models.layers.experts import innermost
from pantheraml.models.roles import is_parameter_lora, looks_like_experts

CHOICE = {"num_experts_per_tok": 2}
FAMILIES = {
    "qwen3_moe": {**CHOICE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24},
    "mixtral": {**CHOICE, "num_local_experts": 4},
    # Stacks that lie transposed, biases, gate and up interleaved, clamped.
    "gpt_oss": {**CHOICE, "head_dim": 16, "num_local_experts": 4, "intermediate_size": 48, "sliding_window": 4},
    # Shared experts, and a dense layer first.
    "deepseek_v3": {
        **CHOICE, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 2,
        "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    # Gate and up are as wide as the model.
    "olmoe": {**CHOICE, "num_experts": 4, "intermediate_size": 32},
    "granitemoe": {**CHOICE, "num_local_experts": 4, "intermediate_size": 64},
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family, **more):
    model = make_tiny(family, **{**FAMILIES[family], **more})
    with torch.no_grad():
        for parameter in model.parameters():
            # Stacks and biases start empty, and clamps have to hold somewhere.
            parameter.copy_(torch.randn_like(parameter) * (0.6 if parameter.dim() == 3 else 0.2))
    return model.train()


def stacks(model):
    return sorted({n.split(".", 3)[3] for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n})


def with_lora(family, **more):
    model = tiny(family, **more)
    # Attention has an adapter too, whatever it calls its projections.
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=stacks(model), init_lora_weights=False
    )
    torch.manual_seed(3)
    return get_peft_model(model, config).train()


def truth_of(model):
    """The step in float64, which torch's grouped product does not take."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    return step(exact)


def assert_near_truth(got, stock, truth):
    assert abs(got[0] - truth[0]) <= 3 * abs(stock[0] - truth[0]) + 8 * 2.0**-23 * truth[0]
    assert got[1].keys() == truth[1].keys() == stock[1].keys()
    for name, exact in truth[1].items():
        error, allowed = ((g[1][name] - exact).norm() / (exact.norm() + 1e-12) for g in (got, stock))
        assert error <= 3 * allowed + FLOOR, (name, error, allowed)


@pytest.fixture
def calls(monkeypatch):
    """How many adapters each fused call had."""
    seen = []
    original = experts.kernels.experts_mlp

    def counted(x, chosen, weights, up, down, *args, **kwargs):
        seen.append((up.A is not None) + (down.A is not None))
        return original(x, chosen, weights, up, down, *args, **kwargs)

    monkeypatch.setattr(experts.kernels, "experts_mlp", counted)
    return seen


def mixtures(model):
    return sum(looks_like_experts(module) for module in model.modules())


@each_family
def test_trained_experts_equal_stock(family, calls):
    model = tiny(family)
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    report = adapt(model)
    assert sum(entry.role == "experts" for entry in report.swapped) == mixtures(model) > 0
    calls.clear()
    assert_near_truth(step(model), stock, truth)
    assert calls == [0] * mixtures(model)
    restore(model)
    again = step(model)
    assert all(torch.equal(grad, stock[1][name]) for name, grad in again[1].items())


@each_family
def test_adapters_on_experts_equal_peft(family, calls):
    model = with_lora(family)
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    names = list(model.state_dict())
    report = adapt(model)
    assert not [entry for entry in report.left if entry.role in ("experts", "lora")], report.summary()
    calls.clear()
    assert_near_truth(step(model), stock, truth)
    assert calls == [2] * mixtures(model)
    assert list(model.state_dict()) == names
    assert any("experts" in name and "lora_B" in name for name in truth[1])


def test_twenty_steps_follow_peft():
    """AdamW over LoRA on attention and experts: each loss as the stock run's."""
    model = with_lora("qwen3_moe")
    twin = copy.deepcopy(model)
    adapt(model)

    def losses(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        found = []
        for _ in range(20):
            found.append(step(model)[0])
            optimizer.step()
        return torch.stack(found)

    ours, theirs = losses(model), losses(twin)
    assert theirs[-1] < theirs[0] - 0.3
    assert ((ours - theirs).abs() <= 2e-4 * theirs).all(), (ours, theirs)


@pytest.mark.parametrize("value", [True, "auto", False])
def test_recomputed_layers_give_the_same_gradients(value, calls):
    model = with_lora("qwen3_moe")
    adapt(model)
    expected = step(model)
    calls.clear()
    set_activation_plan(model, value)
    got = step(model)
    assert len(calls) == mixtures(model) * (2 if value is True else 1)
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad)


def test_adapters_can_be_disabled_switched_combined_and_merged():
    model = with_lora("gpt_oss")
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 2
    model.add_adapter("other", config)

    def logits():
        with torch.no_grad():
            return model(input_ids=IDS, use_cache=False).logits + 0

    def tour():
        seen = [logits()]
        model.set_adapter("other")
        seen.append(logits())
        model.base_model.set_adapter(["default", "other"])
        seen.append(logits())
        with model.disable_adapter():
            seen.append(logits())
        model.merge_adapter()
        seen.append(logits())
        model.unmerge_adapter()
        model.set_adapter("default")
        return seen

    model.eval()
    expected = tour()
    adapt(model)
    for index, (got, want) in enumerate(zip(tour(), expected)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=f"stage {index}")
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_a_hook_on_what_is_passed_over_is_still_called(calls):
    model = with_lora("mixtral")
    adapt(model)
    seen = []
    inside = next(module for module in model.modules() if looks_like_experts(module))
    inside.register_forward_hook(lambda *args: seen.append(1))
    expected = step(with_lora("mixtral"))
    calls.clear()
    got = step(model)
    assert seen
    # The layer without the hook takes its adapters as they are, the other gets stacks that PEFT has added them to.
    assert sorted(calls) == [0, 2]
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_stays_within_eager_error(family, autocast, calls):
    """One layer's experts: routers that choose otherwise after a rounding would hide the error of the arithmetic."""
    model = with_lora(family).bfloat16()
    wrapper = next(module for module in model.modules() if is_parameter_lora(module))
    x, weights = torch.randn(40, 64).bfloat16(), torch.rand(40, 2).bfloat16()
    chosen = torch.randint(4, (40, 2))

    def run(dtype, implementation):
        copied = copy.deepcopy(wrapper).to(dtype)
        innermost(copied).config._experts_implementation = implementation
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weights)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y = copied(leaves[0], chosen, leaves[1])
        torch.manual_seed(4)
        y.backward(torch.randn(40, 64, dtype=torch.float64).to(y.dtype))
        trained = [p.grad for p in copied.parameters() if p.requires_grad]
        return [t.double() for t in (y.detach(), *(leaf.grad for leaf in leaves), *trained)]

    dtype = torch.float32 if autocast else torch.bfloat16
    truth = run(torch.float64, "eager")
    stock = run(dtype, "eager")
    adapt(model)
    calls.clear()
    ours = run(dtype, "grouped_mm")
    assert calls == [2]
    assert len(ours) == len(stock) == 7
    for index, (got, eager, exact) in enumerate(zip(ours, stock, truth)):
        assert (got - exact).norm() <= 1.2 * (eager - exact).norm() + 2.0**-9 * exact.norm(), index


def test_another_implementation_that_was_asked_for_is_left():
    model = tiny("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    report = adapt(model)
    reasons = {entry.reason for entry in report.left if entry.role == "experts"}
    assert reasons == {"experts_implementation='batched_mm' was asked for"}


def stack_of(family="qwen3_moe"):
    return next(module for module in tiny(family).modules() if looks_like_experts(module))


def test_experts_that_compute_something_else_are_left():
    real = stack_of()
    eager = inspect.unwrap(type(real).forward)

    class Clamped(type(real)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return eager(self, hidden_states, top_k_index, top_k_weights).clamp(-1, 1)

    real.__class__ = Clamped
    assert experts.plan(real) == "its gate is of no form that is known here"

    real = stack_of()
    real.norm = nn.LayerNorm(64)
    assert "besides two stacks" in experts.plan(real)
    real = stack_of()
    real.third = nn.Parameter(torch.zeros(4, 2, 2))
    assert "no gate and up" in experts.plan(real)


def test_what_the_plan_says_of_gpt_oss():
    real = stack_of("gpt_oss")
    plan = experts.plan(real).plan
    assert (plan.transposed, plan.biased, plan.activation) == (True, True, "silu")
    assert plan.options == {"interleaved": True, "limit": real.limit, "alpha": real.alpha, "up_offset": 1.0}

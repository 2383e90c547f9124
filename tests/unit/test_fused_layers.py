"""Fused attention and fused LoRA layers against the stock forwards: losses, gradients, and what adapters mean."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model

from pantheraml.models.adapt import adapt, restore
from pantheraml.models.layers import attention, decoder, lora
from pantheraml.models.roles import looks_like_attention

IDS = torch.arange(3, 43).view(4, 10)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

HEADS = {"head_dim": 16}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma2": {**HEADS, "sliding_window": 4},
    "gemma3_text": {**HEADS, "sliding_window": 4},
    "granite": {},
    "olmo2": {},
    "cohere": {},
    "glm": HEADS,
    # Queries are scaled by how far a token is into its row: here from the fourth on.
    "ministral3": {
        **HEADS,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.3, "max_position_embeddings": 16,
        },
    },
    "stablelm": {},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "qwen3_moe": {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def step(model):
    model.zero_grad()
    labels = IDS.masked_fill(MASK == 0, -100)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def truth_of(model):
    """The step in float64; in float32 where experts are multiplied in groups, which torch does in no other."""
    grouped = any("expert" in name for name, _ in model.named_parameters())
    return step(copy.deepcopy(model) if grouped else copy.deepcopy(model).double())


# A hundred roundings of float32, for what passes through two layers.
FLOOR = 100 * 2.0**-23


def assert_near_truth(got, stock, truth):
    """The error against float64 is at most three times stock's, or that of some roundings where stock has none."""
    assert abs(got[0] - truth[0]) <= 3 * abs(stock[0] - truth[0]) + 4 * 2.0**-23 * truth[0]
    assert got[1].keys() == truth[1].keys()
    for name, exact in truth[1].items():
        error, allowed = ((g[1][name] - exact).norm() / (exact.norm() + 1e-12) for g in (got, stock))
        assert error <= 3 * allowed + FLOOR, (name, error, allowed)


@pytest.fixture
def part_by_part(monkeypatch):
    """Layers run their own forward, whose parts are fused each for itself."""
    monkeypatch.setattr(decoder, "_prepare", lambda *args: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_stock(family, part_by_part):
    model = make_tiny(family, **FAMILIES[family])
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    report = adapt(model)
    assert sum(entry.role == "attention" for entry in report.swapped) == model.config.num_hidden_layers
    assert_near_truth(step(model), stock, truth)
    restore(model)
    again = step(model)
    assert all(torch.equal(grad, stock[1][name]) for name, grad in again[1].items())


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe", "olmo2", "llama"])
def test_norms_of_heads_and_the_rotation_are_one_op_where_a_kernel_makes_both(family, part_by_part, monkeypatch):
    calls = []
    resolve, op = attention.kernels.resolve, attention.kernels.qk_norm_rotary
    monkeypatch.setattr(
        attention.kernels, "resolve", lambda name, *a: "triton" if name == "qk_norm_rotary" else resolve(name, *a)
    )
    monkeypatch.setattr(attention.kernels, "qk_norm_rotary", lambda *a, **k: calls.append(a) or op(*a, **k))
    model = make_tiny(family, **FAMILIES[family])
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    adapt(model)
    assert_near_truth(step(model), stock, truth)
    assert len(calls) == (2 if family in ("qwen3", "gemma3_text", "qwen3_moe") else 0)
    if calls:
        # What somebody hooked is called by itself.
        seen = []
        model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *args: seen.append(args))
        calls.clear()
        assert_near_truth(step(model), stock, truth)
        assert len(calls) == len(seen) == 1


def test_generation_with_a_cache_equals_stock():
    model = make_tiny("llama").eval()
    stock = model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False)
    adapt(model)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False), stock)


def test_attention_learns_what_the_family_tells_its_attention_function():
    module = next(m for m in make_tiny("mistral", sliding_window=4).modules() if looks_like_attention(m))
    plan = attention.plan(module).plan
    assert dict(plan.evaluation) == {"dropout": 0.0, "scaling": 0.25, "sliding_window": 4}
    sinks = next(m for m in make_tiny("gpt_oss", **FAMILIES["gpt_oss"]).modules() if looks_like_attention(m))
    assert attention.plan(sinks).plan.keywords(sinks)["s_aux"] is sinks.sinks


def test_an_attention_that_computes_something_else_is_left():
    class Odd(torch.nn.Module):
        def __init__(self, real):
            super().__init__()
            self.__dict__.update({k: v for k, v in vars(real).items() if not k.startswith("_")})
            for name, child in real.named_children():
                self.add_module(name, child)

        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            q = self.q_proj(hidden_states * 2)
            return self.o_proj(q), None

    real = next(m for m in make_tiny("llama").modules() if looks_like_attention(m))
    assert isinstance(attention.plan(Odd(real)), str)


def peft_model(family="llama", **config):
    torch.manual_seed(0)
    model = get_peft_model(
        make_tiny(family),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **config),
    )
    model.train()
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_lora_equals_peft(family, part_by_part):
    model = peft_model(family)
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    report = adapt(model)
    assert sum(entry.role == "lora" for entry in report.swapped) == 7 * model.config.num_hidden_layers
    assert_near_truth(step(model), stock, truth)


def test_fused_projections_are_really_used(monkeypatch, part_by_part):
    model = peft_model()
    adapt(model)
    calls = []
    for name in ("lora_linear", "lora_qkv", "lora_mlp"):
        original = getattr(lora.kernels, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(lora.kernels, name, counted)
    step(model)
    layers = model.config.num_hidden_layers
    assert {name: calls.count(name) for name in set(calls)} == {
        "lora_linear": layers,
        "lora_qkv": layers,
        "lora_mlp": layers,
    }


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"use_rslora": True}, {"lora_bias": True}],
    ids=["dora", "dropout", "rslora", "lora bias"],
)
def test_variants_keep_their_meaning(config):
    model = peft_model(**config)

    def seeded():
        torch.manual_seed(7)
        return step(model)

    expected = seeded()
    adapt(model)
    got = seeded()
    assert abs(got[0] - expected[0]) <= 4 * 2.0**-23 * expected[0]
    for name, grad in expected[1].items():
        # Either may be off by 1e-5 of the largest element, which is stock's own error against float64 here.
        assert (got[1][name] - grad).abs().max() <= 2e-5 * grad.abs().max(), name


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_dropout_is_drawn_in_the_fused_layers(share, monkeypatch):
    """PEFT's draws at PEFT's places, of one adapter and of two; nothing is dropped in evaluation."""
    model = peft_model(lora_dropout=share)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, lora_dropout=share)
    model.add_adapter("other", config)
    shares = []
    original = lora.kernels.lora_linear
    monkeypatch.setattr(
        lora.kernels, "lora_linear", lambda *a, **k: (shares.append(k["dropout"]), original(*a, **k))[1]
    )
    twin = copy.deepcopy(model)
    adapt(model)
    for names in ("default", ["default", "other"]):
        results = []
        for each in (twin, model):
            each.base_model.set_adapter(names)
            torch.manual_seed(7)
            results.append(step(each))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert shares == [share] * 2 * 7 * model.config.num_hidden_layers
    shares.clear()
    model.eval()
    step(model)
    assert not any(shares)


def test_adapters_that_drop_different_shares_run_pefts_forward(monkeypatch):
    model = peft_model(lora_dropout=0.5)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.1)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    twin = copy.deepcopy(model)
    adapt(model)
    monkeypatch.setattr(lora.kernels, "lora_linear", None)
    results = []
    for each in (twin, model):
        torch.manual_seed(7)
        results.append(step(each))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_adapters_can_be_disabled_switched_combined_and_merged():
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"))

    def logits():
        with torch.no_grad():
            return model(input_ids=IDS, use_cache=False).logits + 0

    def tour():
        seen = []
        model.set_adapter("default")
        seen.append(logits())
        model.set_adapter("other")
        seen.append(logits())
        model.base_model.set_adapter(["default", "other"])
        seen.append(logits())
        with model.disable_adapter():
            seen.append(logits())
        model.merge_adapter()
        seen.append(logits())
        model.unmerge_adapter()
        return seen

    model.eval()
    expected = tour()
    adapt(model)
    for index, (got, want) in enumerate(zip(tour(), expected)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"stage {index}")


def test_autocast_bf16_stays_within_eager_error():
    model = peft_model()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        truth = step(model)

    def half():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(model)

    eager = half()
    adapt(model)
    fused = half()

    def error(gradients):
        return sum((gradients[name] - truth[1][name]).square().sum() for name in truth[1]).sqrt()

    assert error(fused[1]) <= 1.2 * error(eager[1])


def test_state_dict_and_names_do_not_change():
    model = peft_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model)
    step(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)

"""Small calls without a gradient, and decoding steps that are recorded once, give what the long way gives."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache

from pantheraml.models import decoding
from pantheraml.models.adapt import adapt
from pantheraml.models.attention import exact
from pantheraml.models.inference import attach_generate
from pantheraml.models.layers import step
from pantheraml.models.layers.slots import stock_forward

IDS = torch.arange(3, 23).view(2, 10)
MASK = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
NEW = 24


def adapted(family="llama", dtype=torch.float32, device="cpu", **overrides):
    """A tiny model with LoRA that changes what it says, as the loaders leave one."""
    model = make_tiny(family, dtype=dtype, **overrides).to(device)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter)
    adapt(model)
    attach_generate(model)
    return model.eval()


def greedy(model, **options):
    device = next(model.parameters()).device
    given = {"input_ids": IDS.to(device), "attention_mask": MASK.to(device), "max_new_tokens": NEW, "do_sample": False}
    # No end of a text: all rows and all contenders make as many tokens.
    return model.generate(**{**given, "eos_token_id": None, "pad_token_id": 0, **options}).cpu()


class Simulated:
    """What a CUDA graph does, on a CPU: recording has no effect, replaying repeats the call into the same output."""

    made = 0

    def __init__(self, call, cache):
        self.call, type(self).made = call, type(self).made + 1
        self.cache = cache
        state = [(layer.keys.clone(), layer.values.clone(), layer.cumulative_length.clone()) for layer in cache.layers]
        self.output = call()
        for layer, (keys, values, length) in zip(cache.layers, state):
            layer.keys.copy_(keys), layer.values.copy_(values), layer.cumulative_length.copy_(length)

    def replay(self):
        counts = [getattr(layer, "cumulative_length_int", None) for layer in self.cache.layers]
        self.output.logits.copy_(self.call().logits)
        for layer, count in zip(self.cache.layers, counts):
            if count is not None:
                layer.cumulative_length_int = count

    def reset(self):
        self.call = None


@pytest.fixture
def simulated(monkeypatch):
    """Recorded steps without a GPU."""

    def record(call):
        graph = Simulated(call, call.keywords["past_key_values"])
        return graph, graph.output

    Simulated.made = 0
    monkeypatch.setattr(decoding, "_record", record)
    monkeypatch.setattr(decoding, "obstacle", lambda model, prompt, kwargs: None)
    return Simulated


# ---- small calls


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_small_call_of_a_lora_layer_equals_pefts(count, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    for i in range(1, count):
        model.add_adapter(f"more {i}", LoraConfig(r=3, lora_alpha=12, target_modules=["0"]))
    model.base_model.set_adapter(list(model.peft_config))
    layer = model.base_model.model[0]
    for parameter in layer.parameters():
        parameter.data.normal_()
    adapt(model)
    x = torch.randn(3, 1, 24)
    with torch.no_grad(), step.weights_unchanged():
        for _ in range(2):
            torch.testing.assert_close(layer(x), stock_forward(layer, x), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer(x), stock_forward(layer, x), rtol=1e-5, atol=1e-5)


def test_parameters_are_converted_once_while_nobody_changes_them():
    model = adapted(dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    A = layer.lora_A["default"].weight
    A.data = A.data.float()
    x = torch.randn(1, 1, A.shape[1], dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with step.weights_unchanged():
            before = layer(x)
            A.data.zero_()
            assert torch.equal(layer(x), before)
        # Afterwards what has changed counts.
        assert not torch.equal(layer(x), before)


def test_bases_are_not_copied_into_another_dtype():
    model = adapted()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), step.weights_unchanged():
        model(IDS)
        kept = [parameter for parameter, _ in step.known().copies.values()]
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert kept
    assert {id(parameter) for parameter in kept} <= adapters


def test_a_small_call_in_training_drops_what_pefts_does():
    model = nn.Sequential(nn.Linear(24, 40))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], lora_dropout=0.5))
    layer = model.base_model.model[0]
    for parameter in layer.parameters():
        parameter.data.normal_()
    adapt(model)
    x = torch.randn(3, 1, 24)
    results = []
    with torch.no_grad():
        for run in (layer, lambda x: stock_forward(layer, x)):
            torch.manual_seed(2)
            results.append(run(x))
        layer.eval()
        assert not torch.allclose(layer(x), results[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_step_is_a_small_call_that_records_no_gradient():
    x = torch.zeros(1, 1, 8)
    assert not step.is_step(x)
    with torch.no_grad():
        assert step.is_step(x)
        assert step.is_bound_by_host(x)
        assert not step.is_step(torch.zeros(1, step.TOKENS + 1, 8))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_attention_of_one_query_equals_torchs(heads, kind):
    torch.manual_seed(1)
    q = torch.randn(2, heads[0], 1, 16)
    k, v = torch.randn(2, heads[1], 9, 16), torch.randn(2, heads[1], 9, 12)
    mask = torch.rand(2, 1, 1, 9) > 0.4
    mask[..., -1] = True
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(exact.step_attention(q, k, v, given, scale=0.3), expected, rtol=1e-5, atol=1e-6)


# ---- recorded steps


# Windows that the longest row fits into.
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "granite": {},
    "gemma2": {"sliding_window": 64},
    "mistral": {"sliding_window": 34},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_generate_the_same(family, simulated, monkeypatch):
    model = adapted(family, **FAMILIES[family])
    with monkeypatch.context() as undone:
        undone.setattr(decoding, "obstacle", lambda *_: "not now")
        expected = greedy(model)
    inner = model.base_model.model
    assert torch.equal(greedy(model), expected)
    assert simulated.made == 1
    assert "forward" not in vars(inner)
    assert not hasattr(inner, "_cache")
    # Another prompt, and the base model alone: each call records its own.
    with model.disable_adapter():
        assert not torch.equal(greedy(model), expected)
    assert simulated.made == 2


def test_sampling_streaming_and_several_sequences_work_on_recorded_steps(simulated, monkeypatch):
    model = adapted()
    seen = []
    streamer = types.SimpleNamespace(put=lambda tokens: seen.append(tokens), end=lambda: None)
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 5}
    results = []
    for reason in (None, "not now"):
        monkeypatch.setattr(decoding, "obstacle", lambda *_, reason=reason: reason)
        torch.manual_seed(5)
        results.append(greedy(model, **options))
    assert torch.equal(*results)
    assert results[0].shape == (6, 10 + NEW)
    monkeypatch.setattr(decoding, "obstacle", lambda *_: None)
    one = greedy(model, input_ids=IDS[:1], attention_mask=MASK[:1], streamer=streamer)
    assert torch.equal(torch.cat([t.view(-1) for t in seen]), one[0])


def test_what_cannot_be_recorded_runs_and_is_told_once(simulated, monkeypatch, capsys):
    def record(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = adapted()
    expected = greedy(model)
    monkeypatch.setattr(decoding, "_record", record)
    monkeypatch.setattr(decoding, "_unrecordable", type(decoding._unrecordable)())
    for _ in range(2):
        assert torch.equal(greedy(model), expected)
    said = capsys.readouterr()
    assert (said.out + said.err).count("cannot be recorded (operation not permitted") == 1


def test_the_forward_comes_back_when_generation_fails(simulated):
    model = adapted()

    def fail(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, logits_processor=[fail])
    assert "forward" not in vars(model.base_model.model)


def test_a_step_compiles_whole():
    """As transformers compiles it where ``cache_implementation="static"`` is asked for."""
    model = adapted().base_model.model
    token, positions = IDS[:, :1], torch.full((2, 1), 10)
    results = []
    with torch.no_grad(), step.weights_unchanged():
        for run in (model, torch.compile(model.__call__, backend="eager", fullgraph=True)):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(IDS, past_key_values=cache)
            results.append(run(input_ids=token, past_key_values=cache, position_ids=positions).logits)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_changed_call_is_not_replayed():
    def forward(**kwargs):
        return kwargs

    recording = decoding.Recording.__new__(decoding.Recording)
    one, two = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long)
    recording.kwargs = {
        "input_ids": two,
        "attention_mask": {"full": one},
        "past_key_values": forward,
        "use_cache": True,
    }
    given = {**recording.kwargs, "input_ids": two + 1, "attention_mask": {"full": one + 1}}
    assert recording.covers(given)
    for change in (
        {"input_ids": torch.zeros(2, 1, dtype=torch.long)},
        {"attention_mask": {"full": one.double()}},
        {"attention_mask": None},
        {"past_key_values": object()},
        {"use_cache": False},
        {"more": 1},
    ):
        assert not recording.covers({**given, **change})
    assert not recording.covers({"input_ids": two})


def test_on_a_cpu_nothing_is_recorded():
    assert decoding.obstacle(make_tiny(), IDS, {"max_new_tokens": 64}) == "graphs are CUDA's"


@pytest.mark.gpu
class TestOnGpu:
    """The graphs themselves."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_recorded_model_says_the_same_and_leaves_nothing(self, family, monkeypatch):
        model = adapted(family, device="cuda", **FAMILIES[family])
        recorded = []
        monkeypatch.setattr(decoding, "_record", lambda call, old=decoding._record: recorded.append(1) or old(call))
        plain = greedy(model, cache_implementation="dynamic")
        assert not recorded
        assert torch.equal(greedy(model), plain)
        assert recorded == [1]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            assert torch.equal(greedy(model), plain)
        assert torch.cuda.memory_allocated() == before
        with model.disable_adapter():
            assert not torch.equal(greedy(model), plain)
        model.train()
        model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()

    @pytest.mark.parametrize("blocked", [False, True])
    def test_half_precision_under_autocast(self, blocked):
        model = adapted(dtype=torch.bfloat16, device="cuda")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        options = {"cache_implementation": "dynamic"} if blocked else {}
        context = torch.inference_mode() if blocked else torch.no_grad()
        with context, torch.autocast("cuda", torch.bfloat16):
            logits = []
            keep = [lambda ids, scores: logits.append(scores.clone()) or scores]
            greedy(model, logits_processor=keep, **options)
            positions = (MASK.cumsum(-1) - 1).clamp(min=0).cuda()
            given = {"input_ids": IDS.cuda(), "attention_mask": MASK.cuda(), "position_ids": positions}
            expected = model(**given).logits[:, -1].float()
        assert len(logits) == NEW
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=2e-2 * float(expected.abs().max()))

    def test_four_bit_weights(self):
        bnb = pytest.importorskip("bitsandbytes")
        model = make_tiny(dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":
                    four = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    four.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(module, name, four)
        model = get_peft_model(model.cuda(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        adapt(model)
        attach_generate(model)
        model.eval()
        # Rounding may choose another token somewhere: what was said until then is the same.
        assert torch.equal(greedy(model)[:, :14], greedy(model, cache_implementation="dynamic")[:, :14])

    def test_requests_that_do_not_fit_are_left_alone(self):
        model = adapted(device="cuda").base_model.model
        ids = IDS.cuda()
        assert decoding.obstacle(model, ids, {"max_new_tokens": NEW}) is None
        for options, reason in (
            ({"max_new_tokens": 4}, "4 tokens"),
            ({"max_new_tokens": NEW, "num_beams": 2}, "searches"),
            ({"max_new_tokens": NEW, "use_cache": False}, "searches"),
            ({"max_new_tokens": NEW, "cache_implementation": "dynamic"}, "cache_implementation is set"),
            ({"max_new_tokens": NEW, "return_dict_in_generate": True}, "return_dict_in_generate is set"),
            ({"max_new_tokens": NEW, "pixel_values": ids}, "more than token ids"),
            ({"max_new_tokens": 10**10}, "too large"),
        ):
            assert reason in decoding.obstacle(model, ids, options)
        for window, reason in ((10 + NEW - 1, "it goes beyond a window"), (10 + NEW, None)):
            windowed = adapted("mistral", device="cuda", sliding_window=window).base_model.model
            assert decoding.obstacle(windowed, ids, {"max_new_tokens": NEW}) == reason

"""A decoder layer as one node: losses and gradients at every level of what is kept, and when the layer runs itself."""

from __future__ import annotations

import copy
import gc
import importlib

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from test_fused_layers import FAMILIES, IDS, TARGETS, assert_near_truth, step, truth_of

from pantheraml.kernels import projections
from pantheraml.models.activations import set_activation_plan
from pantheraml.models.adapt import adapt
from pantheraml.models.layers import attended, block, decoder, levels, pieces
from pantheraml.models.layers.costs import costs_of
from pantheraml.models.layers.decoder import DecoderPlan
from pantheraml.models.layers.levels import Host, Keep, Level
from pantheraml.models.layers.slots import plan_of, swap_of

# Llama; sandwich norms, windows, soft caps; norms of heads; of all heads, none before; parallel; scaled; packed; bias;
# queries, keys and values packed too; queries scaled by position.
WHOLE = {
    "llama": {},
    "gemma2": FAMILIES["gemma2"],
    "qwen3": FAMILIES["qwen3"],
    "olmo2": {},
    "cohere": {},
    "granite": {"residual_multiplier": 0.6},
    "glm": FAMILIES["glm"],
    "qwen2": {},
    "phi3": FAMILIES.get("phi3", {}),
    "ministral3": FAMILIES["ministral3"],
}
LEVELS = [None, *reversed(levels.LEVELS)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the layers that ran as one node."""
    seen = []
    original = decoder.decoder_layer
    monkeypatch.setattr(decoder, "decoder_layer", lambda *args: seen.append(args) or original(*args))
    return seen


def with_lora(model, **config):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, LoraConfig(target_modules=options.pop("target_modules", "all-linear"), **options))


def adapted(model, level=None):
    model = copy.deepcopy(model)
    report = adapt(model)
    if level is not None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        plan = set_activation_plan(inner, True)
        plan.levels = [level] * len(plan.levels)
        if level.host and not torch.cuda.is_available():
            plan.keep = lambda _layer, _hidden: (level, copied)
    return model.train(), report


def copied(tensors):
    """Stands in for the way to the host and back."""
    held = [t.clone() for t in tensors]
    return lambda: [t.clone() for t in held]


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("family", WHOLE)
def test_every_level_has_the_gradients_of_stock(family, trained, calls, monkeypatch):
    model = make_tiny(family, **WHOLE[family])
    model = (with_lora(model) if trained == "lora" else model).train()
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    # Smaller than the 40 rows of the batch, so that the MLP runs in pieces where its inner part is not kept.
    monkeypatch.setattr(block, "MLP_ROWS", 16)
    for level in LEVELS:
        ours, report = adapted(model, level)
        layers = model.config.num_hidden_layers
        assert sum(entry.role == "layer" for entry in report.swapped) == layers
        calls.clear()
        assert_near_truth(step(ours), stock, truth)
        assert len(calls) == layers, level


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gemma3_text", "glm", "phi3"])
def test_the_kernels_launchers_are_called_rightly(family, trained, monkeypatch):
    from pantheraml.kernels import _triton

    if not _triton.interpreted():
        pytest.skip("runs in Triton's interpreter, see tests/ops")
    monkeypatch.setattr(pieces, "resolve", lambda *args: "triton")
    joint = []
    original = pieces.qk_norm_rotary_launch
    monkeypatch.setattr(
        pieces, "qk_norm_rotary_launch", lambda *args, **options: joint.append(args) or original(*args, **options)
    )
    model = make_tiny(family, **FAMILIES.get(family, WHOLE.get(family)))
    model = (with_lora(model) if trained == "lora" else model).train()
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    for level in (None, Level(Keep.INPUT)):
        assert_near_truth(step(adapted(model, level)[0]), stock, truth)
    # Norms of heads and the rotation are one kernel: twice each way in two layers, and once more where they are
    # computed again.
    assert len(joint) == (10 if family in ("qwen3", "gemma3_text") else 0)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm"])
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("level", [None, Level(Keep.INPUT)], ids=str)
def test_adapters_in_float32_on_a_base_in_half_precision(level, joined, family, monkeypatch, calls):
    """The thin products by the kernels, which read adapters as they are, at both ends of what is kept.

    Joined, the activation's kernels add what the adapters of gate and up give.
    """
    from pantheraml.kernels import _triton, dispatch

    lora_mlp = importlib.import_module("pantheraml.kernels.lora_mlp")

    if not _triton.interpreted():
        pytest.skip("runs in Triton's interpreter, see tests/ops")
    resolve = dispatch.resolve
    monkeypatch.setattr(projections, "KERNEL_ROWS", 1)
    monkeypatch.setattr(block, "MLP_ROWS", 24)
    monkeypatch.setattr(
        dispatch, "resolve", lambda op, *a, **k: "triton" if op == "lora_linear" else resolve(op, *a, **k)
    )
    if joined:
        monkeypatch.setattr(pieces, "resolve", lambda *args: "triton")
    backwards = []
    original = lora_mlp.lora_glu_backward
    monkeypatch.setattr(
        lora_mlp, "lora_glu_backward", lambda *args, **options: backwards.append(args) or original(*args, **options)
    )
    # Half precision, for Triton's interpreter multiplies the bits of bfloat16.
    model = with_lora(make_tiny(family, **FAMILIES.get(family, WHOLE.get(family)))).train()
    truth = truth_of(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
    with torch.autocast("cpu", dtype=torch.float16):
        stock, ours = step(copy.deepcopy(model)), step(adapted(model, level)[0])
    assert len(calls) == model.config.num_hidden_layers
    # The MLP takes the batch of 40 rows in two pieces; phi3 and glm make gate and up by one projection.
    assert len(backwards) == (2 * len(calls) if joined else 0)
    assert abs(ours[0] - truth[0]) <= 2 * abs(stock[0] - truth[0]) + 2e-3 * truth[0]
    for name, grad in truth[1].items():
        error, allowed = ((g[1][name].double() - grad).norm() / grad.norm() for g in (ours, stock))
        assert error <= 1.5 * allowed + 4e-3, name


def test_the_plan_says_what_the_layer_does():
    expected = {
        "llama": (("input_layernorm", None, "post_attention_layernorm", None), 1.0, False),
        "olmo2": ((None, "post_attention_layernorm", None, "post_feedforward_layernorm"), 1.0, False),
        "cohere": (("input_layernorm", None, "input_layernorm", None), 1.0, True),
        "granite": (("input_layernorm", None, "post_attention_layernorm", None), 0.6, False),
    }
    for family, (norms, scale, parallel) in expected.items():
        model = make_tiny(family, **WHOLE[family])
        adapt(model)
        plan: DecoderPlan = plan_of(model.model.layers[0])
        assert (plan.norms, plan.scale, plan.parallel) == (norms, scale, parallel), family


def test_half_trained_layers(calls):
    """Adapters on some projections, a trained norm, a bias, and a first layer whose input needs no gradient."""
    model = with_lora(make_tiny("qwen2"), target_modules=["q_proj", "down_proj"], bias="all").train()
    model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    stock, truth = step(copy.deepcopy(model)), truth_of(model)
    assert_near_truth(step(adapted(model)[0]), stock, truth)
    assert len(calls) == 2


def test_adapters_keep_their_meaning(calls):
    model = with_lora(make_tiny("llama"), target_modules=TARGETS).train()
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"))
    ours, _ = adapted(model)
    for change in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ):
        change(model)
        change(ours)
        if any(p.requires_grad for p in model.parameters()):
            assert_near_truth(step(ours), step(model), truth_of(model))


@pytest.mark.parametrize("level", [None, Level(Keep.INPUT)], ids=str)
def test_a_layers_output_can_be_written_into(level, calls):
    """As models do that add features of images to the tokens of some layers."""
    model = with_lora(make_tiny("llama")).train()

    def written(model):
        for layer in model.get_base_model().model.layers:
            layer.register_forward_hook(lambda _module, _args, output: output.__setitem__((0, slice(2)), 0.5))
        return step(model)

    expected = written(copy.deepcopy(model))
    ours, _ = adapted(model, level)
    got = written(ours)
    assert len(calls) == 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "reason", ["a hook", "a cache", "dropout in attention", "dropout in an adapter", "a replaced module"]
)
def test_calls_that_the_node_does_not_cover_run_the_layer_itself(reason, calls):
    model = make_tiny("llama", **({"attention_dropout": 0.3} if reason == "dropout in attention" else {}))
    if reason == "dropout in an adapter":
        model = with_lora(model, target_modules=TARGETS, lora_dropout=0.2)
    ours, _ = adapted(model)
    layer = (ours.get_base_model() if hasattr(ours, "get_base_model") else ours).model.layers[0]
    seen = []
    if reason == "a hook":
        layer.self_attn.register_forward_hook(lambda *args: seen.append(args))
    if reason == "a replaced module":
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)
    loss = ours(input_ids=IDS, labels=IDS, use_cache=reason == "a cache").loss
    assert torch.isfinite(loss)
    covered = {"a cache": 0, "dropout in attention": 0, "dropout in an adapter": 0}
    assert len(calls) == covered.get(reason, model.config.num_hidden_layers - 1)
    assert (reason == "a hook") == bool(seen)


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm"])
def test_a_module_that_is_replaced_between_calls_is_noticed(name):
    stock = with_lora(make_tiny("llama")).train()
    ours, _ = adapted(stock)
    step(ours)
    for model in (stock, ours):
        layer = model.get_base_model().model.layers[0]
        module = copy.deepcopy(getattr(layer, name))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        setattr(layer, name, module)
    assert_near_truth(step(ours), step(copy.deepcopy(stock)), truth_of(stock))


def test_a_norm_that_is_wrapped_between_calls_is_trained():
    stock = with_lora(make_tiny("llama")).train()
    ours, _ = adapted(stock)
    step(ours)
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["input_layernorm"], task_type="CAUSAL_LM")
    for model in (stock, ours):
        torch.manual_seed(4)
        model.add_adapter("other", config)
        model.set_adapter("other")
    got = step(ours)
    assert sum("modules_to_save" in name for name in got[1]) == 2
    assert_near_truth(got, step(copy.deepcopy(stock)), truth_of(stock))


def test_a_graph_can_be_gone_through_twice_when_asked():
    model, _ = adapted(with_lora(make_tiny("llama")))
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    for name, grad in first.items():
        # The first pass computes again what the second finds kept.
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_parameter_written_to_before_the_backward_is_noticed():
    model, _ = adapted(with_lora(make_tiny("llama")))
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.0.mlp.down_proj.lora_A" in n).mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_what_is_kept_costs_what_the_table_says():
    """Bytes that each level holds, counted by the storages that the node's context reaches."""
    model, _ = adapted(with_lora(make_tiny("qwen3", **WHOLE["qwen3"])))
    layer = model.get_base_model().model.layers[0]
    tokens, width = 64, model.config.hidden_size
    costs = costs_of(layer, tokens, tokens)
    assert set(costs) == set(LEVELS[1:])
    assert [c.bytes for c in costs.values()] == sorted(c.bytes for c in costs.values())
    seconds = [costs[Level(keep)].seconds for keep in Keep]
    assert seconds == sorted(seconds, reverse=True)
    nothing = [level for level, cost in costs.items() if cost.bytes == 0]
    assert set(nothing) == {Level(k, Host.RESULTS) for k in (Keep.INPUT, Keep.ATTENTION)} | {
        Level(Keep.RESIDUAL, Host.RESIDUAL)
    }
    assert costs[Level(Keep.INPUT)].bytes == tokens * width * 4
    inner = model.config.intermediate_size
    assert costs[Level(Keep.ALL)].bytes - costs[Level(Keep.RESIDUAL)].bytes == tokens * 2 * inner * 4
    for level in levels.LEVELS:
        if not level.host:
            continue
        there, here = costs[level], costs[Level(level.keep)]
        assert there.bytes + there.host_bytes == here.bytes + here.host_bytes
        assert there.seconds > here.seconds
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    positions = model.get_base_model().model.rotary_emb(hidden, torch.arange(tokens)[None])
    for level in (Level(Keep.RESIDUAL), Level(Keep.ALL)):
        plan = set_activation_plan(model.get_base_model(), True)
        plan.levels = [level] * len(plan.levels)
        out = layer(hidden, position_embeddings=positions, attention_mask=None)
        held = _held(out.grad_fn) + hidden.numel() * 4
        assert abs(held - costs[level].bytes) < 0.1 * costs[level].bytes + 2 * tokens * 16 * 4, level


def _large(least):
    """Bytes of the distinct memories of all tensors of at least ``least`` bytes."""
    found = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.nbytes >= least:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("level", LEVELS[1:], ids=str)
def test_nothing_stays_after_a_backward_and_what_is_moved_does_not_stay_before_it(level, monkeypatch):
    monkeypatch.setattr(attended, "LEAST_BYTES", 1024)
    model, _ = adapted(with_lora(make_tiny("llama", **WHOLE["llama"])), level)
    layer = model.get_base_model().model.layers[0]
    tokens, width = 512, model.config.hidden_size
    there = []

    def moved(tensors):
        there.append([t.numpy().copy() for t in tensors])
        return lambda: [torch.from_numpy(x.copy()) for x in there.pop()]

    if level.host:
        layer._gradient_checkpointing_func.__self__.keep = lambda _layer, _hidden: (level, moved)
    source = torch.randn(1, tokens, width, requires_grad=True)
    positions = model.get_base_model().model.rotary_emb(source, torch.arange(tokens)[None])
    least = tokens * 16 * 4
    stays = costs_of(layer, tokens, tokens)[level].bytes
    gc.collect()
    gc.disable()
    try:
        begin = _large(least)
        out = layer(source * 1, position_embeddings=positions, attention_mask=None)
        held = _large(least) - begin - out.nbytes
        out.sum().backward()
        del out
        source.grad = None
        left = _large(least) - begin
    finally:
        gc.enable()
    # The C++ part of the graph, which holds h and attention's own tensors, is not seen from here.
    assert held <= stays + tokens * 16 * 4
    assert left == 0


def _held(node):
    """Bytes of distinct storages in a node's state, the graph of attention included."""
    storages = {}
    state = node.state
    found = [*state.unnormed, state.middle, state.branch, state.skinny, state.attended.result]
    found += [getattr(piece, name) for piece in state.mlp or () for name in ("gate", "up", "branch")]
    inner = state.attended.end.node
    while inner is not None and not any(name.startswith("_saved_query") for name in dir(inner)):
        inner = inner.next_functions[0][0] if inner.next_functions else None
    if inner is not None:
        found += [inner._saved_query, inner._saved_key, inner._saved_value]
    for tensor in found:
        if tensor is not None:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "qwen3", "olmo2", "cohere", "granite", "phi3", "qwen2", "mistral"]
)
def test_half_precision_on_a_gpu(family, calls):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_tiny(family, **{**WHOLE.get(family, {}), **sizes, "head_dim": 64})
    model = with_lora(model).train().cuda()
    ids = torch.randint(3, 300, (2, 160), device="cuda")

    def run(m):
        m.zero_grad()
        loss = m(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach().double(), {n: p.grad.double() for n, p in m.named_parameters() if p.grad is not None}

    truth = run(copy.deepcopy(model).double())
    half = copy.deepcopy(model)
    for name, p in half.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        stock = run(copy.deepcopy(half))
        for level in LEVELS:
            ours, _ = adapted(half, level)
            calls.clear()
            result = run(ours)
            assert len(calls) == model.config.num_hidden_layers
            assert abs(result[0] - truth[0]) <= 2 * abs(stock[0] - truth[0]) + 2e-3 * truth[0]
            for name, grad in truth[1].items():
                error, allowed = ((g[1][name] - grad).norm() / grad.norm() for g in (result, stock))
                # Rounding in another order may cost half of what it costs stock, once more.
                assert error <= 1.5 * allowed + 4e-3, (name, level)


def test_reports_name_what_is_left():
    model = make_tiny("qwen3_moe", **FAMILIES["qwen3_moe"])
    report = adapt(model)
    assert not [entry for entry in report.swapped if entry.role == "layer"]
    assert swap_of(model.model.layers[0]) is None


def test_a_dropout_that_drops_keeps_the_layers_own_forward(calls):
    model, _ = adapted(make_tiny("phi3", resid_pdrop=0.0))
    step(model)
    assert len(calls) == model.config.num_hidden_layers
    # Set later: the node would leave it out.
    model.model.layers[0].resid_mlp_dropout.p = 0.5
    calls.clear()
    step(model)
    assert len(calls) == model.config.num_hidden_layers - 1
    model, report = adapted(make_tiny("phi3", resid_pdrop=0.3).eval())
    assert not [entry for entry in report.swapped if entry.role == "layer"]

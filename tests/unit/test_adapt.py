"""Swapping modules of an instance: same results, same names, and a way back."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from conftest import make_tiny
from torch import nn

from pantheraml import log
from pantheraml.errors import UnsupportedError
from pantheraml.models.adapt import adapt, restore
from pantheraml.models.layers import decoder
from pantheraml.models.layers.lazy import LazyLogits
from pantheraml.models.layers.slots import is_installed, swap_of
from pantheraml.models.layers.step import TOKENS
from pantheraml.models.loss import token_statistics

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "granite", "cohere"]


@pytest.fixture
def batch():
    ids = torch.randint(3, 384, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, :5] = -100
    return {"input_ids": ids, "labels": labels}


def instance_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_agree(stock, adapted, batch):
    (left, left_gradients), (right, right_gradients) = step(stock, batch), step(adapted, batch)
    torch.testing.assert_close(right.loss, left.loss, rtol=1e-6, atol=1e-6)
    assert left_gradients.keys() == right_gradients.keys()
    for name, gradient in left_gradients.items():
        torch.testing.assert_close(
            right_gradients[name], gradient, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(right.logits + 0, left.logits, rtol=0, atol=1e-6)
    return right


# ------------------------------------------------------------------------------------------------- adapt and restore


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapted_agrees_with_stock_in_hidden_states_loss_and_gradients(model_type, batch):
    stock = make_tiny(model_type)
    adapted = copy.deepcopy(stock)
    report = adapt(adapted)
    assert {entry.role for entry in report.swapped} >= {"norm", "glu", "head"}
    assert_agree(stock, adapted, batch)
    left = stock(**batch, output_hidden_states=True).hidden_states
    right = adapted(**batch, output_hidden_states=True).hidden_states
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_adapt_is_idempotent_and_restore_leaves_nothing(batch):
    model = make_tiny("gemma2")
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = adapt(model)
    methods = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    second = adapt(model)
    assert first == second == model.adapt_report
    assert methods == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert list(model.state_dict()) == list(state)
    restore(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert instance_forwards(model) == []
    assert type(model(**batch).logits) is torch.Tensor
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert adapt(model) == first


def test_a_gradient_penalty_is_refused_with_fused_operations_and_right_without(batch):
    model, stock = (make_tiny("llama", attn_implementation="eager") for _ in range(2))
    stock.load_state_dict(model.state_dict())
    adapt(model)

    def penalised(model):
        model.zero_grad()
        loss = model(**batch).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in gradients)).backward()
        return [p.grad.clone() for p in model.parameters()]

    with pytest.raises(UnsupportedError, match=r"differentiated once[\s\S]*restore\(model\)"):
        penalised(model)
    restore(model)
    torch.testing.assert_close(penalised(model), penalised(stock))


def test_classes_and_other_instances_stay_stock():
    bystander = make_tiny("llama")
    forwards = {type(module): type(module).forward for module in bystander.modules()}
    adapt(make_tiny("llama"))
    assert instance_forwards(bystander) == []
    assert all(cls.forward is forward for cls, forward in forwards.items())


def test_report_names_modules_roles_and_reasons():
    report = adapt(make_tiny("mixtral", num_local_experts=4))
    assert "model.norm" in [entry.module for entry in report.swapped if entry.role == "norm"]
    assert [entry.module for entry in report.swapped if entry.role == "head"] == ["lm_head"]
    assert {(entry.role, entry.module) for entry in report.left} == {("layer", f"model.layers.{i}") for i in range(2)}
    assert all(entry.reason for entry in report.left)
    line = report.summary()
    assert "\n" not in line
    assert line.startswith(f"MixtralForCausalLM: {len(report.swapped)} modules swapped (")
    assert "rms_norm 5, " in line
    assert "linear_cross_entropy 1" in line
    assert "experts_mlp[silu] 2, " in line
    assert "left: layer 2 (its MLP is a mixture of experts" in line


def test_a_deep_copy_runs_on_its_own_weights(batch):
    model = make_tiny("llama")
    adapt(model)
    twin = copy.deepcopy(model)
    assert twin.model.norm.forward.__self__ is twin.model.norm
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    stock = make_tiny("llama")
    stock.load_state_dict(twin.state_dict())
    assert_agree(stock, twin, batch)
    restore(twin)
    assert instance_forwards(twin) == []
    assert is_installed(model.lm_head)


def test_saving_and_loading_is_untouched(tmp_path, batch):
    from transformers import AutoModelForCausalLM

    model = make_tiny("llama")
    adapt(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_agree(loaded, model, batch)


def test_an_unknown_architecture_is_left_alone_and_told(monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            return self.layer(x)

    told = []
    monkeypatch.setattr(log, "once", lambda message, **_: told.append(message))
    model = Odd()
    report = adapt(model)
    assert report.swapped == []
    assert instance_forwards(model) == []
    assert told == ["Odd runs unaccelerated: none of its modules has a form that is known here"]
    restore(model)


def test_an_unusual_call_goes_to_the_stock_forward():
    model = make_tiny("llama")
    adapt(model)
    layer = model.model.layers[0]
    x = torch.randn(1, 3, 64)
    assert torch.equal(layer.mlp(x=x), layer.mlp(x))
    assert torch.equal(model.model.norm(hidden_states=x), model.model.norm(x))


def test_a_forward_of_another_library_is_left(batch):
    model = make_tiny("llama")
    called = []

    def foreign(self, x):
        called.append(True)
        return type(self).forward(self, x)

    model.model.norm.forward = types.MethodType(foreign, model.model.norm)
    report = adapt(model)
    assert [(entry.module, entry.reason) for entry in report.left] == [
        ("model.norm", "another library replaced its forward")
    ]
    model(**batch)
    assert called
    restore(model)
    assert model.model.norm.forward.__func__ is foreign


@pytest.mark.parametrize("first", ["adapt", "hook"])
def test_accelerate_hooks_compose(first, batch):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            type(self).calls += 1
            return args, kwargs

    stock = make_tiny("llama")
    model = copy.deepcopy(stock)
    for action in ["adapt", "hook"] if first == "adapt" else ["hook", "adapt"]:
        if action == "adapt":
            adapt(model)
        else:
            for module in (model.model.norm, model.model.layers[0].mlp, model.lm_head):
                add_hook_to_module(module, Counting())
    Counting.calls = 0
    right = assert_agree(stock, model, batch)
    assert Counting.calls == 3
    assert isinstance(right.logits, LazyLogits)
    restore(model)
    assert all(swap_of(module) is None for module in model.modules())
    assert type(model(**batch).logits) is torch.Tensor
    assert Counting.calls == 6
    remove_hook_from_module(model.lm_head)
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 4], ids=["few tokens", "many"])
@pytest.mark.parametrize("last", [adapt, "offload"], ids=["offloaded first", "adapted first"])
def test_an_offloaded_model_is_adapted_and_gives_real_logits(rows, last, batch):
    from accelerate import cpu_offload

    batch = {name: value.repeat(rows, 1) for name, value in batch.items()}
    assert (batch["input_ids"].numel() > TOKENS) == (rows > 1)
    stock = make_tiny("llama")
    model = copy.deepcopy(stock)
    if last == "offload":
        adapt(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if last is adapt:
        adapt(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        result = model(**batch)
    assert type(result.logits) is torch.Tensor
    torch.testing.assert_close(result.loss, stock(**batch).loss.detach(), rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_give_what_stock_gives():
    """Norm weights in float32 under hidden states in bfloat16, as preparation for 4-bit training leaves them."""
    for model_type in ("llama", "gemma2", "olmo2", "cohere"):
        stock = make_tiny(model_type).model.norm.float()
        with torch.no_grad():
            stock.weight.uniform_(0.5, 1.5)
        adapted = copy.deepcopy(stock)
        holder = nn.Module()
        holder.norm = adapted
        adapt(holder)
        assert is_installed(adapted)
        for dtype in (torch.float32, torch.bfloat16):
            for autocast in (False, True):
                x = torch.randn(3, 64).to(dtype)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    left, right = stock(x), adapted(x)
                assert left.dtype == right.dtype
                torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-6)


def test_four_bit_projections(batch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    stock = make_tiny("llama")
    for layer in stock.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            quantised = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.mlp, name, quantised.to("cpu"))
    adapted = copy.deepcopy(stock)
    report = adapt(adapted)
    assert sum(entry.role == "glu" for entry in report.swapped) == 2
    assert_agree(stock, adapted, batch)


# ---------------------------------------------------------------------------------------------------------------- PEFT

LORA = {
    "projections": {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved_norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
}


def lora(model, kind):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **LORA[kind]))
    return wrapped.train()


@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("kind", list(LORA))
def test_peft(kind, order, batch):
    stock = lora(make_tiny("llama"), kind)
    base = make_tiny("llama")
    if order in ("before", "both"):
        adapt(base)
    adapted = lora(base, kind)
    if order in ("after", "both"):
        adapt(adapted)
    assert list(stock.state_dict()) == list(adapted.state_dict())
    right = assert_agree(stock, adapted, batch)
    if order != "before":
        report = adapted.adapt_report
        assert sum(entry.role == "glu" for entry in report.swapped) == 2
        assert isinstance(right.logits, LazyLogits)
        heads = [entry.module for entry in report.swapped if entry.role == "head"]
        expected = (
            ["lm_head"] if kind != "saved_head" else ["lm_head.original_module", "lm_head.modules_to_save.default"]
        )
        assert heads == expected
    with stock.disable_adapter(), adapted.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(adapted(**batch).loss, stock(**batch).loss, rtol=1e-6, atol=1e-6)
    restore(adapted)
    assert all(swap_of(module) is None for module in adapted.modules())
    assert_agree(stock, adapted, batch)


def test_merging_and_unloading_an_adapter(batch):
    stock, adapted = lora(make_tiny("llama"), "head"), lora(make_tiny("llama"), "head")
    adapt(adapted)
    left, right = stock.merge_and_unload(), adapted.merge_and_unload()
    adapt(right)
    for model in (left, right):
        model.requires_grad_(True)
    assert_agree(left, right, batch)


# --------------------------------------------------------------------------------------------------- TRL's fused head


def trl_pair(model_type, batch, *, kind=None, **arguments):
    """A model with TRL's own fused head, and an adapted copy with ours in its place."""
    utils = pytest.importorskip("trl.trainer.utils")
    from pantheraml.models.fused_head import install_fused_head

    models = []
    for ours in (False, True):
        model = make_tiny(model_type)
        utils.add_fused_lm_head(model, **arguments)
        if kind is not None:
            model = lora(model, kind)
        if ours:
            adapt(model)
            assert install_fused_head(model)
        models.append(model)
    return models


FIELDS = ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("shifted", [False, True])
def test_fused_head_serves_trls_contract(model_type, shifted, batch):
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    stock, adapted = trl_pair(model_type, batch, temperature=0.8, outputs=outputs)
    arguments = {"input_ids": batch["input_ids"]}
    arguments["shift_labels" if shifted else "labels"] = batch["labels"]
    results = [model(**arguments, num_items_in_batch=11, fused_lm_head=True) for model in (stock, adapted)]
    left, right = results
    assert type(left) is type(right)
    for name in FIELDS:
        torch.testing.assert_close(getattr(right, name), getattr(left, name), rtol=2e-5, atol=2e-5, msg=name)
    for result in results:
        (result.loss + 0.1 * result.entropy.sum()).backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), adapted.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=2e-6 + 2e-6 * a.grad.abs().max().item(), msg=name)
    # Without the keyword, the model is the stock one.
    torch.testing.assert_close(adapted(**batch).loss, stock(**batch).loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        adapted.generate(batch["input_ids"], max_new_tokens=3, do_sample=False),
        stock.generate(batch["input_ids"], max_new_tokens=3, do_sample=False),
    )
    restore(adapted)
    assert adapted.forward.__func__.__code__ is stock.forward.__func__.__code__


@pytest.mark.parametrize("hooked", ["before TRL", "last"])
def test_fused_head_of_a_spread_model_answers_where_it_was_asked(hooked, batch):
    """accelerate's hook brings the output of a model on several devices to its input's; dtypes stand for devices."""
    from accelerate.hooks import ModelHook, add_hook_to_module
    from trl.trainer.utils import add_fused_lm_head

    from pantheraml.models.fused_head import install_fused_head

    class Place(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            assert kwargs["input_ids"].dtype is torch.int32
            self.calls += 1
            return args, kwargs | {name: kwargs[name].long() for name in batch}

        def post_forward(self, module, output):
            return type(output)({k: v.double() if v.is_floating_point() else v for k, v in output.items()})

    reference, model = make_tiny("mixtral"), make_tiny("mixtral")
    place = Place()
    if hooked != "last":
        add_hook_to_module(model, place)
    for one in (reference, model):
        one.config.output_router_logits = True
        add_fused_lm_head(one)
    adapt(model)
    assert install_fused_head(model)
    if hooked == "last":
        add_hook_to_module(model, place)
    elsewhere = {name: value.int() for name, value in batch.items()}
    found, due = model(**elsewhere, fused_lm_head=True), reference(**batch, fused_lm_head=True)
    for name in ("loss", "log_probs", "aux_loss"):
        assert found[name].dtype is torch.float64
        torch.testing.assert_close(found[name].float(), due[name], rtol=1e-5, atol=1e-5)
    plain = model(**elsewhere, output_router_logits=False, use_cache=False)
    assert plain.loss.dtype is torch.float64
    assert place.calls == 2


def test_fused_head_adds_the_router_loss(batch):
    results = []
    for model in trl_pair("mixtral", batch, outputs=("log_probs",)):
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = 0.5
        results.append(model(**batch, fused_lm_head=True))
    left, right = results
    torch.testing.assert_close(right.aux_loss, left.aux_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(right.loss, left.loss, rtol=1e-6, atol=1e-6)
    assert right.entropy is None


@pytest.mark.parametrize("kind", ["head", "saved_head", "projections"])
def test_fused_head_with_adapters_agrees_with_the_models_own_logits(kind, batch):
    """TRL's head reads lm_head.weight; ours calls the head that there is."""
    _, adapted = trl_pair("llama", batch, kind=kind, outputs=("log_probs", "entropy"))
    result = adapted(**batch, fused_lm_head=True)
    reference = lora(make_tiny("llama"), kind)
    logits = reference(input_ids=batch["input_ids"]).logits[:, :-1]
    expected = token_statistics(logits, batch["labels"][:, 1:], outputs=("entropy",))
    torch.testing.assert_close(result.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    result.log_probs.sum().backward()
    expected.log_probs.sum().backward()
    for (name, a), (_, b) in zip(reference.named_parameters(), adapted.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_fused_head_in_float32(batch, monkeypatch):
    """GRPO casts the head to float32 and gives it a forward of its own."""
    # Layers as nodes round less often than stock in half precision; this is about the head.
    monkeypatch.setattr(decoder, "_prepare", lambda *args: None)
    utils = pytest.importorskip("trl.trainer.utils")
    from pantheraml.models.fused_head import install_fused_head

    results = []
    for ours in (False, True):
        model = make_tiny("llama", dtype=torch.bfloat16)
        model.lm_head.float()
        head = model.lm_head
        head.forward = lambda x, head=head: nn.functional.linear(x.float(), head.weight)
        utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
        if ours:
            adapt(model)
            assert install_fused_head(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(model(**batch, fused_lm_head=True))
    torch.testing.assert_close(results[1].log_probs, results[0].log_probs, rtol=1e-5, atol=1e-5)
    restore(model)
    assert model.lm_head.forward.__name__ == "<lambda>"


def test_install_without_trls_patch_does_nothing():
    from pantheraml.models.fused_head import install_fused_head

    model = make_tiny("llama")
    adapt(model)
    assert not install_fused_head(model)
    assert "forward" not in model.__dict__

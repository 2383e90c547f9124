"""Models loaded in fp8, and in 4 bits with products in fp8: loading, adapters, training, saving and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CORPUS, build_tokenizer, make_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pantheraml.errors import ConflictError, PantheraMLError, UnsupportedError
from pantheraml.models import FastLanguageModel
from pantheraml.models.adapt import restore
from pantheraml.models.layers.fp8 import Fp8Linear
from pantheraml.models.record import record_of

IDS = torch.tensor([[0, 20, 30, 40, 50, 60, 70]])
OPTIONS = {
    "rows": {"load_in_fp8": True},
    "block": {"load_in_fp8": "block"},
    "nf4": {"load_in_4bit": True, "load_in_fp8": True},
}
KIND = pytest.mark.parametrize("kind", OPTIONS)
FP8_KIND = pytest.mark.parametrize("kind", ["rows", "block"])


def load(folder, kind="rows", **options):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    return FastLanguageModel.from_pretrained(str(folder), **OPTIONS[kind], **options)[0]


def adapted(folder, kind="rows", **options):
    model = FastLanguageModel.get_peft_model(load(folder, kind, **options), r=4)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float() + 0


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@KIND
def test_decoder_layers_are_quantised_while_loading(tiny_llama_dir, kind):
    model = load(tiny_llama_dir, kind)
    names = {name for name, module in model.named_modules() if "Fp8" in type(module).__name__}
    linears = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names == {f"model.layers.{i}.{name}" for i in range(2) for name in linears}
    assert type(model.lm_head) is torch.nn.Linear
    assert model.dtype == torch.float32
    assert not any(parameter.is_meta for parameter in model.parameters())
    expected = {"rows": "fp8_rows", "block": "fp8_block", "nf4": "nf4"}[kind]
    assert record_of(model).quantization == expected
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    # e4m3 moves each product by about 4 %, nf4 by about 10 % besides.
    assert 0.005 < relative(logits(model), logits(stock)) < (0.25 if kind == "nf4" else 0.1)


@FP8_KIND
def test_weights_are_those_of_the_checkpoint(tiny_llama_dir, kind):
    model = load(tiny_llama_dir, kind, dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            assert module.compute_dtype == torch.bfloat16
            dense = stock.get_submodule(name).weight
            assert relative(module.dense_weight(torch.float32), dense) < 0.04
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight.bfloat16())


def test_one_weight_at_a_time_is_dense(tiny_llama_dir, monkeypatch):
    alive, most = [], []
    original = Fp8Linear.quantize

    def counted(self, weight):
        import weakref

        alive.append(weakref.ref(weight))
        most.append(sum(reference() is not None for reference in alive))
        return original(self, weight)

    monkeypatch.setattr(Fp8Linear, "quantize", counted)
    load(tiny_llama_dir)
    assert len(most) == 14
    assert max(most) <= 2


def test_routers_and_experts_stay(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    make_tiny("qwen3_moe", **experts, head_dim=16).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["q_proj"] is Fp8Linear
    assert kinds["gate"] is not Fp8Linear
    assert relative(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path))) < 0.2


def test_layers_with_odd_sides_stay(tmp_path, capsys):
    make_tiny("llama", intermediate_size=136).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is Fp8Linear
    assert "6 linear layers stay in 16 bit" in "".join(capsys.readouterr())


@KIND
def test_fused_layers_equal_pefts_own(tiny_llama_dir, kind):
    """The fused and the stock path round alike but for the joint scales of gradients."""
    model = adapted(tiny_llama_dir, kind).train()

    def step():
        model.zero_grad()
        output = model(IDS, labels=IDS)
        output.loss.backward()
        return output.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    assert any("lora_linear" in entry.implementation for entry in model.get_base_model().adapt_report.swapped)
    restore(model)
    stock_loss, stock = step()
    assert loss == pytest.approx(stock_loss, rel=2e-3)
    assert gradients.keys() == stock.keys()
    for name, gradient in stock.items():
        assert gradients[name].dtype == torch.float32
        assert relative(gradients[name], gradient) < 0.1, name


@FP8_KIND
def test_adapters_start_in_the_compute_dtype_and_are_float32(tiny_llama_dir, kind):
    model = FastLanguageModel.get_peft_model(load(tiny_llama_dir, kind, dtype=torch.bfloat16), r=4)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_A" in name:
            assert parameter.dtype == torch.float32
            # An initialisation rounded to e4m3 would have a handful of values.
            assert parameter.unique().numel() > 200


@FP8_KIND
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_back(tiny_llama_dir, kind, safe):
    model = adapted(tiny_llama_dir, kind)
    inner = model.get_base_model()
    before, plain = logits(model), {n: t.clone() for n, t in inner.state_dict().items()}
    model.merge_adapter(safe_merge=safe)
    layer = inner.model.layers[0].mlp.up_proj
    dense = layer.base_layer.weight.detach().clone()
    assert dense.dtype == torch.float32
    # Merged, the input is no longer rounded: only the weight is.
    assert relative(logits(model), before) < 0.1
    model.unmerge_adapter()
    after = inner.state_dict()
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in plain.items())
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert relative(logits(model), before) > 0.02
    merged = model.merge_and_unload()

    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, dense)


@KIND
def test_disabled_adapters_leave_the_base(tiny_llama_dir, kind):
    model = adapted(tiny_llama_dir, kind)
    base = logits(load(tiny_llama_dir, kind))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)


@KIND
def test_adapter_is_saved_alone_and_comes_back(tiny_llama_dir, kind, tmp_path):
    model = adapted(tiny_llama_dir, kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama_dir)
    again = load(tmp_path, kind).eval()
    assert isinstance(again, PeftModel)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    if kind != "nf4":
        again.merge_adapter()
        again.unmerge_adapter()
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@KIND
@pytest.mark.parametrize("onto", ["auto", "dequantized"])
def test_merged_save_is_16_bit(tiny_llama_dir, kind, onto, tmp_path):
    model = adapted(tiny_llama_dir, kind, dtype=torch.bfloat16)
    model.save_pretrained_merged(str(tmp_path), save_method="merged_16bit", merge_onto=onto)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or name not in (
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.k_proj",
        ):
            continue
        base = stock.get_submodule(name).weight
        if onto == "dequantized":
            base = module.base_layer.dense_weight(torch.float32) if kind != "nf4" else None
        if base is not None:
            expected = base + module.get_delta_weight("default")
            # One rounding to bfloat16.
            torch.testing.assert_close(merged.get_submodule(name).weight.float(), expected, rtol=2.0**-8, atol=1e-6)
    assert relative(logits(merged), logits(model)) < 0.2


def test_merged_in_memory_is_saved_as_it_is(tiny_llama_dir, tmp_path):
    model = adapted(tiny_llama_dir)
    model.merge_adapter()
    expected = logits(model)
    model.save_pretrained_merged(str(tmp_path), save_method="merged_16bit")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(saved), expected) < 1e-5


def test_layers_that_peft_wrapped_itself(tiny_llama_dir):
    model = get_peft_model(load(tiny_llama_dir), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def losses(folder, kind, *, steps=30):
    """Losses of some steps of LoRA training on text."""
    tokenizer = build_tokenizer()
    options = {"load_in_4bit": False} if kind == "float32" else OPTIONS[kind]
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, **options)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=False)
    ids = torch.stack([torch.tensor((tokenizer(text)["input_ids"] * 20)[:32]) for text in CORPUS[:3]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


def test_training_follows_float32(tiny_llama_dir):
    """30 steps from a random model: each loss within 1 % of that in float32, 0.3 % in the mean."""
    exact = losses(tiny_llama_dir, "float32")
    assert exact[-1] < 0.85 * exact[0]
    for kind in ("rows", "block"):
        deviation = (losses(tiny_llama_dir, kind) / exact - 1).abs()
        assert 0 < deviation.max() < 0.01, (kind, deviation)
        assert deviation.mean() < 0.003, (kind, deviation)


REFUSALS = {
    "full fine-tuning": ({"load_in_fp8": True, "full_finetuning": True}, ConflictError, "full_finetuning"),
    "16 bit": ({"load_in_fp8": True, "load_in_16bit": True}, ConflictError, "contradict"),
    "8 bit": ({"load_in_fp8": True, "load_in_8bit": True}, ConflictError, "contradict"),
    "nf4 in tiles": ({"load_in_fp8": "block", "load_in_4bit": True}, ConflictError, "each row"),
    "unknown kind": ({"load_in_fp8": "tensor"}, PantheraMLError, "block"),
}


@pytest.mark.parametrize(("options", "error", "text"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(tiny_llama_dir, options, error, text):
    with pytest.raises(error, match=text):
        FastLanguageModel.from_pretrained(str(tiny_llama_dir), **options)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_that_read_the_base_are_refused(tiny_llama_dir, options):
    with pytest.raises(UnsupportedError, match="reads the base's weights"):
        FastLanguageModel.get_peft_model(load(tiny_llama_dir), r=4, **options)


def test_saving_the_base_as_it_is_is_refused(tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(tiny_llama_dir).save_pretrained(tmp_path)


@pytest.mark.gpu
@KIND
def test_on_a_gpu(tmp_path, kind):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matrix units")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_tiny("llama", **sizes).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = FastLanguageModel.get_peft_model(load(tmp_path, kind), r=8)
    # What rounding to fp8 costs, apart from what four bits do.
    stock, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=kind == "nf4", dtype=torch.bfloat16)
    ids = torch.randint(5, 300, (2, 128), device="cuda")
    assert relative(logits(model.eval(), ids), logits(stock.eval(), ids)) < 0.1
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name

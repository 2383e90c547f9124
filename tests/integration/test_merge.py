"""What a merged save writes is what was trained: for every kind of adapter, base and layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import pantheraml
from pantheraml import save as facade
from pantheraml.errors import CheckpointError, ConfigError, ConflictError, UnsupportedError
from pantheraml.export import dense, merge, parameters, verify
from pantheraml.export.merge import save_merged
from pantheraml.models.checkpointing import set_checkpointing
from pantheraml.models.record import ModelRecord, attach_record

MOE = {"num_experts_per_tok": 2}
QWEN_MOE = {**MOE, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def move(model, scale=0.05):
    """Stand in for training: every trainable parameter moves."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * scale
    return model


def adapted(base, **config):
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return move(get_peft_model(base, LoraConfig(**config)))


def logits(model):
    return verify.logits_of(model, verify.sample_inputs(parameters.unwrapped(model)))


def greedy(model, count=16):
    ids = torch.tensor([[5, 17, 40, 9]])
    model.eval()
    return model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=2)[0].tolist()


def quantized(folder, bits=4, **kwargs):
    pytest.importorskip("bitsandbytes")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, **kwargs)
    record = ModelRecord(str(folder), str(folder), None, torch.bfloat16, "nf4" if bits == 4 else "int8", False, 64)
    attach_record(model, record)
    return model


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


CASES = {
    "llama": ("llama", {}, {}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "dora": ("llama", {}, {"use_dora": True}),
    "dora-embedding": ("llama", {}, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "bias": ("qwen2", {}, {"bias": "all"}),
    "lora-bias": ("qwen2", {}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "modules-to-save": ("llama", {}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules-to-save-container": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "trainable-tokens": ("llama", {}, {"trainable_token_indices": [3, 7]}),
    "tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "tied-trainable-tokens": ("llama", {"tie_word_embeddings": True}, {"trainable_token_indices": [3, 7]}),
    "layers": ("llama", {}, {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}),
    "gemma2": ("gemma2", {"head_dim": 16}, {}),
    "phi3": ("phi3", {}, {}),
    "gpt2-conv1d": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt_oss": ("gpt_oss", {**MOE, "num_local_experts": 4}, {"target_modules": ["q_proj", "o_proj"]}),
    "mixtral-attention": ("mixtral", {**MOE, "num_local_experts": 4}, {"target_modules": ["q_proj", "v_proj"]}),
    "qwen3_moe-attention": ("qwen3_moe", QWEN_MOE, {"target_modules": ["q_proj"]}),
    "qwen3_moe-experts": ("qwen3_moe", QWEN_MOE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "not-peft": ("llama", {}, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_merged_model_equals_the_adapted_one_in_fp32(tmp_path, case):
    model_type, overrides, config = case
    base = make_tiny(model_type, **overrides)
    model = move(base) if config is None else adapted(base, **config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = save_merged(model, tmp_path / "out", max_shard_size="60KB")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    reference = logits(model)
    torch.testing.assert_close(logits(plain), reference, atol=1e-5, rtol=1e-5)
    assert greedy(plain) == greedy(model)
    assert plain.dtype == torch.float32
    assert report.untied is False
    assert plain.config.tie_word_embeddings is bool(overrides.get("tie_word_embeddings"))
    assert report.verification.method == "reload"
    assert report.verification.deviation < 1e-5
    assert report.verification.tokens == (16, 16)
    assert report.merged_modules == len(parameters.adapter_modules(parameters.unwrapped(model)))
    assert (report.merged_modules == 0) == (config is None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was changed by saving"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_the_fp32_merge_rounded_once(tmp_path, dtype):
    model = adapted(make_tiny("llama", dtype=dtype))
    report = save_merged(model, tmp_path / "out")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.lora_B.default.weight.float() @ layer.lora_A.default.weight.float() * layer.scaling["default"]
    expected = (layer.base_layer.weight.float() + delta).to(dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, expected)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert report.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_plain_lora_merged_some_rows_at_a_time_has_the_bits_of_the_whole(tmp_path, monkeypatch):
    model = adapted(make_tiny("llama", dtype=torch.bfloat16))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    move(model)
    monkeypatch.setattr(dense, "_plain_lora", lambda layer: False)
    save_merged(model, tmp_path / "whole")
    monkeypatch.undo()
    monkeypatch.setattr(dense, "BLOCK", 64 * 24)  # 24 rows of most weights, and a last block of fewer
    monkeypatch.setattr(dense, "_run_merge", lambda *_: pytest.fail("plain LoRA was merged by PEFT"))
    threads = torch.get_num_threads()
    save_merged(model, tmp_path / "rows")
    assert torch.get_num_threads() == threads
    assert (tmp_path / "rows" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_model_that_computes_in_16_bits_is_verified_as_such(tmp_path):
    model = move(make_tiny("llama"))
    # As Accelerate leaves it.
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    report = save_merged(model, tmp_path / "out")
    assert 1e-4 < report.verification.deviation < report.verification.budget


def test_another_dtype_can_be_written(tmp_path):
    save_merged(adapted(make_tiny("llama")), tmp_path / "out", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


UNTIED = {
    "head-trained": {"modules_to_save": ["lm_head"]},
    "embeddings-trained": {"modules_to_save": ["embed_tokens"]},
    "lora-on-embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("config", UNTIED.values(), ids=UNTIED.keys())
def test_a_tie_that_training_broke_is_given_up_and_told(tmp_path, config, capsys):
    model = adapted(make_tiny("llama", tie_word_embeddings=True), **config)
    report = save_merged(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    assert report.untied
    assert plain.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    assert "no longer tied" in capsys.readouterr().err


def test_resized_vocabulary(tmp_path):
    base = make_tiny("llama")
    base.resize_token_embeddings(391)
    model = adapted(base, modules_to_save=["embed_tokens", "lm_head"])
    save_merged(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.config.vocab_size == plain.get_input_embeddings().weight.shape[0] == 391
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_sequence_classification(tmp_path, tiny_llama_dir):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=3)
    model = adapted(base, task_type="SEQ_CLS", target_modules=["q_proj"])
    report = save_merged(model, tmp_path / "out")
    assert report.verification.tokens is None
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_all_active_adapters_are_merged_and_no_other(tmp_path):
    model = adapted(make_tiny("llama"))
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True))
    model.base_model.set_adapter(["default", "third"])
    move(model)
    save_merged(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_a_merge_done_in_memory_before_is_not_done_twice(tmp_path):
    model = adapted(make_tiny("llama"))
    reference = logits(model)
    model.merge_adapter()
    save_merged(model, tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), reference, atol=1e-5, rtol=1e-5
    )


def test_adapters_added_by_transformers_itself(tmp_path):
    model = make_tiny("llama")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    move(model)
    report = save_merged(model, tmp_path / "out")
    assert report.merged_modules == 4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
def test_a_model_on_a_gpu_is_merged_and_verified_there(tmp_path, config):
    model = adapted(make_tiny("llama", dtype=torch.bfloat16).to("cuda"), **config)
    report = save_merged(model, tmp_path / "out", max_shard_size="60KB")
    assert report.verification.method == "reload"
    assert report.verification.deviation < 0.03
    assert next(model.parameters()).device.type == "cuda"


# ----------------------------------------------------------------------------------------------------- quantised bases


QUANTIZED = {
    "nf4": ("llama", {}, {}, 4),
    "nf4-modules-to-save": ("llama", {}, {"modules_to_save": ["lm_head"]}, 4),
    "nf4-tied-bias": ("qwen2", {"tie_word_embeddings": True}, {"bias": "all"}, 4),
    "nf4-gpt2-conv1d": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_proj"]}, 4),
    "nf4-moe": ("qwen3_moe", QWEN_MOE, {"target_modules": ["q_proj"]}, 4),
    "int8": ("llama", {}, {}, 8),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantised_model_merges_onto_its_16_bit_base(tmp_path, case, capsys):
    model_type, overrides, config, bits = case
    make_tiny(model_type, dtype=torch.bfloat16, **overrides).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model = adapted(quantized(tmp_path / "base", bits), **config)
    report = save_merged(model, tmp_path / "out", max_shard_size="60KB")

    # The truth: the same adapter on the model that was never quantised.
    truth = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    twin = get_peft_model(truth, model.peft_config["default"])
    state = {
        n: p for n, p in model.state_dict().items() if "lora_" in n or "modules_to_save" in n or n.endswith("bias")
    }
    assert not twin.load_state_dict(state, strict=False).unexpected_keys
    save_merged(twin, tmp_path / "twin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype="auto").state_dict()
    for name, tensor in plain.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        # Two devices may round the fp32 product differently; nf4 differs from its original by a tenth.
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-5)
    assert report.onto == str(tmp_path / "base")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    # Without the base: told, and equal to what the quantised model computes.
    capsys.readouterr()
    shutil.rmtree(tmp_path / "base")
    report = save_merged(model, tmp_path / "out2")
    assert report.onto == "dequantized"
    assert "not there any more" in capsys.readouterr().err
    assert report.verification.deviation < report.verification.budget == verify._LOGIT_BUDGET[torch.bfloat16]
    with pytest.raises(CheckpointError, match="not there any more"):
        save_merged(model, tmp_path / "out3", merge_onto="base")
    assert not (tmp_path / "out3").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_dequantised_weights_are_right_before_and_after_an_evaluation_forward(tmp_path):
    """On some CPUs bitsandbytes rearranges 4-bit weights in an evaluation forward."""
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = quantized(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    save_merged(model, tmp_path / "before", merge_onto="dequantized", verify=False)
    logits(model)
    save_merged(model, tmp_path / "after", merge_onto="dequantized", verify=False)
    for folder in ("before", "after"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        for name, tensor in base.state_dict().items():
            other = plain.state_dict()[name].float()
            assert (other - tensor.float()).norm() <= 0.12 * tensor.float().norm(), (folder, name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_dora_on_a_quantised_model(tmp_path):
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    quantised = quantized(tmp_path / "base")
    for module in quantised.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # PEFT's DoRA cannot read the rearranged weights
    model = adapted(quantised, use_dora=True)
    report = save_merged(model, tmp_path / "out", merge_onto="dequantized")
    assert report.verification.deviation < 0.02


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_loftq_adapters_belong_to_the_quantised_weights(tmp_path, capsys):
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(quantized(tmp_path / "base"))
    model.peft_config["default"].init_lora_weights = "loftq"
    assert save_merged(model, tmp_path / "out").onto == "dequantized"
    assert "loftq" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_base_that_changed_since_is_not_merged_onto(tmp_path):
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(quantized(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    make_tiny("llama", dtype=torch.bfloat16, seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="not those that were loaded"):
        save_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_base_with_other_names_is_not_merged_onto(tmp_path, capsys):
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(quantized(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    make_tiny("llama", dtype=torch.bfloat16, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    assert save_merged(model, tmp_path / "out").onto == "dequantized"
    assert "no counterpart" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- folder and options


def test_folder_is_complete_and_other_files_stay(tmp_path, tiny_tokenizer):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "log").write_text("mine")
    (out / "model-00001-of-00009.safetensors").write_text("stale")
    side = tiny_tokenizer.padding_side
    save_merged(adapted(make_tiny("llama")), out, tiny_tokenizer)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "runs"} <= names
    assert "model-00001-of-00009.safetensors" not in names
    assert (out / "runs" / "log").read_text() == "mine"
    reloaded = AutoTokenizer.from_pretrained(out)
    assert reloaded.padding_side == "left"
    assert reloaded.chat_template == tiny_tokenizer.chat_template
    assert tiny_tokenizer.padding_side == side


@pytest.mark.parametrize("stated", [True, False])
def test_a_cache_that_is_off_for_training_alone_is_on_in_the_folder(tmp_path, stated):
    model = adapted(make_tiny("llama", use_cache=stated))
    set_checkpointing(model, "unsloth")
    assert model.config.use_cache is False
    save_merged(model, tmp_path, None)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is stated
    assert model.config.use_cache is False
    set_checkpointing(model, mode=False)
    assert model.config.use_cache is stated


def test_lora_saves_what_plain_peft_loads(tmp_path, tiny_llama_dir, tiny_tokenizer):
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    report = save_merged(model, tmp_path / "lora", tiny_tokenizer, save_method="lora")
    reference = logits(model)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), reference, atol=0, rtol=0)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(logits(again), reference, atol=0, rtol=0)
    assert report.files == ("adapter_model.safetensors",)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").padding_side == "left"
    with pytest.raises(ConflictError, match="holds an adapter"):
        save_merged(model, tmp_path / "lora")
    with pytest.raises(ConfigError, match="no adapter"):
        facade.save_lora(
            base.get_base_model() if hasattr(base, "get_base_model") else make_tiny("llama"), tmp_path / "x"
        )


BAD_OPTIONS = {
    "unknown-method": ({"save_method": "merged_16bits"}, ConfigError, "did you mean 'merged_16bit'"),
    "merged_4bit": ({"save_method": "merged_4bit"}, UnsupportedError, "merged_4bit_forced"),
    "fp8_static": ({"save_method": "fp8_static"}, UnsupportedError, "llm-compressor"),
    "pickle": ({"safe_serialization": False}, ConfigError, "safetensors"),
    "state-dict": ({"state_dict": {}}, UnsupportedError, "state_dict"),
    "save-function": ({"save_function": print}, UnsupportedError, "save_function"),
    "variant": ({"variant": "fp16"}, UnsupportedError, "variant"),
    "calibration": ({"num_calibration_samples": 5}, UnsupportedError, "num_calibration_samples"),
    "shard-size": ({"max_shard_size": "5XB"}, ConfigError, "no size"),
    "memory": ({"maximum_memory_usage": 2.0}, ConfigError, "share of the memory"),
    "dtype": ({"dtype": torch.int8}, ConfigError, "cannot write"),
    "merge-onto": ({"merge_onto": "elsewhere"}, ConfigError, "merge_onto"),
    "merge-onto-not-quantised": ({"merge_onto": "base"}, ConfigError, "not quantised"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_that_cannot_be_honoured_raise_and_write_nothing(tmp_path, case):
    options, error, message = case
    with pytest.raises(error, match=message):
        facade.save_pretrained_merged(adapted(make_tiny("llama")), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_save_method_none_means_merged_16bit(tmp_path):
    report = facade.save_pretrained_merged(make_tiny("llama"), tmp_path / "out", save_method=None)
    assert report.save_method == "merged_16bit"


def test_disabled_adapters_are_refused(tmp_path):
    model = adapted(make_tiny("llama"))
    with model.disable_adapter(), pytest.raises(ConflictError, match="disabled"):
        save_merged(model, tmp_path / "out")


def test_only_the_main_rank_writes(tmp_path, monkeypatch):
    model = make_tiny("llama")
    assert save_merged(model, tmp_path / "out", is_main_process=False) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert save_merged(model, tmp_path / "out") is None
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- never claims success


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(tmp_path, bad):
    model = adapted(make_tiny("llama"))
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B.default.weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        save_merged(model, tmp_path / "out")
    assert isinstance(caught.value, CheckpointError)
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_the_dtype_that_is_written(tmp_path):
    model = adapted(make_tiny("llama"))
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B.default.weight.data[0, 0] = 1e9
    with pytest.raises(parameters.NonFiniteWeightError, match="bfloat16"):
        save_merged(model, tmp_path / "out", dtype=torch.float16)


def test_a_module_that_would_be_left_out_is_an_error(tmp_path, monkeypatch):
    model = adapted(make_tiny("llama"))
    real = merge._Producer.__call__

    def forgetful(self, spec):
        tensor = real(self, spec)
        self.layers.discard("model.layers.0.self_attn.q_proj")
        return tensor

    monkeypatch.setattr(merge._Producer, "__call__", forgetful)
    with pytest.raises(CheckpointError, match="1 of 14 adapter modules were not merged"):
        save_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_verification_catches_a_wrong_weight(tmp_path, monkeypatch):
    """A delta left out changes the logits, whatever the checksums say."""
    model = adapted(make_tiny("llama"))
    monkeypatch.setattr(parameters, "merged_rows", lambda module, *_, **__: iter([module.weight.detach().clone()]))
    with pytest.raises(CheckpointError, match="computes something else"):
        save_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    save_merged(model, tmp_path / "out", verify=False)
    assert (tmp_path / "out").is_dir()


def test_verification_catches_a_wrong_greedy_token(tmp_path, monkeypatch):
    """One logit of ten thousand is nothing to their RMS, and another token to who reads it."""
    model, real = adapted(make_tiny("llama", dtype=torch.bfloat16)), verify.logits_of

    def changed(which, inputs):
        found = real(which, inputs)
        if which is not model:
            found[0, -5, 300] = found[0, -5].max() + 4 * found.std()
        return found

    monkeypatch.setattr(verify, "logits_of", changed)
    with pytest.raises(CheckpointError, match=r"after the same 12 tokens it chooses 300"):
        save_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_verification_catches_what_the_disk_changed(tmp_path, monkeypatch):
    real = verify.verify_merged

    def flipped(directory, *args, **kwargs):
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x01
        path.write_bytes(content)
        return real(directory, *args, **kwargs)

    monkeypatch.setattr(merge, "verify_merged", flipped)
    with pytest.raises(CheckpointError, match="1 weights are not the merged ones"):
        save_merged(adapted(make_tiny("llama")), tmp_path / "out")
    monkeypatch.setattr(verify, "_fits", lambda size, device: False)
    with pytest.raises(CheckpointError, match="read back"):
        save_merged(adapted(make_tiny("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_verification_without_room_for_a_second_copy_reads_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_fits", lambda size, device: False)
    report = save_merged(adapted(make_tiny("llama")), tmp_path / "out", max_shard_size="60KB")
    assert report.verification.method == "files"
    assert report.verification.tensors == 21


def test_peak_memory_is_a_few_tensors_and_not_a_second_model(tmp_path):
    """The merge of a 100 MB model in shards of 8 MB needs far less than two shards beside it."""
    script = textwrap.dedent(
        """
        import resource, sys, torch
        sys.path[:0] = sys.argv[2:]
        from conftest import make_tiny
        from peft import LoraConfig, get_peft_model
        from pantheraml.export.merge import save_merged
        torch.set_num_threads(1)
        shape = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8)
        model = make_tiny("llama", **shape)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        small = get_peft_model(make_tiny("llama"), LoraConfig(r=4, target_modules="all-linear"))
        save_merged(small, sys.argv[1] + "/warm", verify=False)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        report = save_merged(model, sys.argv[1] + "/out", max_shard_size="8MB", verify=False)
        print(report.nbytes, len(report.files), peak() - before)
        """
    )
    paths = [str(Path(sys.modules["conftest"].__file__).parent), str(Path(pantheraml.__file__).parent.parent)]
    # What is freed goes back at once, so that the peak is what was held, whichever thread was ahead.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, str(tmp_path), *paths]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    nbytes, files, growth = map(int, result.stdout.split())
    assert nbytes > 90e6
    assert files > 10
    assert growth < 2 * 8e6  # two shards

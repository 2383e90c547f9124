"""FastLanguageModel.from_pretrained on tiny local models: precision, length, adapters, heads, and every bad input."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, build_tokenizer, make_tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pantheraml.device import is_installed
from pantheraml.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConflictError,
    MissingDependencyError,
    ModelNotFoundError,
    PantheraMLError,
    UnknownArchitectureError,
    UnsupportedError,
)
from pantheraml.models import FastLanguageModel, FastModel
from pantheraml.models.loader import FastLlamaModel, FastMistralModel
from pantheraml.models.record import record_of

IDS = torch.tensor([[0, 20, 30, 40, 50, 60, 70]])


def load(path, **options):
    options.setdefault("load_in_4bit", False)
    return FastLanguageModel.from_pretrained(str(path), **options)


@pytest.fixture
def folder(tiny_llama_dir, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_unquantised_load_gives_stock_logits(tiny_llama_dir):
    model, tokenizer = load(tiny_llama_dir, max_seq_length=128, dtype=None, token=None)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-5)
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 128
    assert {module.max_seq_length for module in model.modules()} == {128}
    assert model.generation_config.max_length == 256
    record = record_of(model)
    assert (record.base, record.quantization, record.full_finetuning) == (str(tiny_llama_dir), "none", False)
    assert model.adapt_report.swapped


def test_positional_arguments_are_unsloths(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), 64, torch.bfloat16, False)
    assert (model.dtype, model.max_seq_length, record_of(model).quantization) == (torch.bfloat16, 64, "none")


@pytest.mark.parametrize(
    ("options", "layer", "method"),
    [
        ({}, "Linear4bit", "nf4"),
        ({"load_in_4bit": True}, "Linear4bit", "nf4"),
        ({"load_in_8bit": True}, "Linear8bitLt", "int8"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "Linear4bit", "fp4"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "Linear8bitLt", "int8"),
    ],
    ids=["default", "4bit", "8bit", "config-dict", "config-object"],
)
def test_16_bit_weights_are_quantised_while_loading(tiny_llama_dir, options, layer, method):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), **options)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layer
    assert type(model.lm_head).__name__ == "Linear"
    assert record_of(model).quantization == method
    with torch.no_grad():
        quantised, exact = model(IDS).logits, stock(IDS).logits
    error = (quantised - exact).norm() / exact.norm()
    # nf4 keeps about 4 bits of each weight, int8 about 8: coarse, and never exact.
    assert 0 < error < (0.05 if method == "int8" else 0.3)
    if method == "nf4":
        config = model.config.quantization_config
        assert (config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype) == (True, torch.float32)


def test_prequantised_checkpoint_keeps_its_configuration(tiny_llama_dir, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_llama_dir), quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path))
    assert record_of(again).quantization == "nf4"
    assert again.config.quantization_config.bnb_4bit_use_double_quant is False
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    for options in ({"load_in_8bit": True}, {"load_in_4bit": False}, {"load_in_16bit": True}):
        with pytest.raises(ConflictError, match="own quantisation"):
            FastLanguageModel.from_pretrained(str(tmp_path), **options)
    with pytest.raises(ConflictError, match="full_finetuning"):
        FastLanguageModel.from_pretrained(str(tmp_path), full_finetuning=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(tiny_llama_dir, dtype, expected):
    model, _ = load(tiny_llama_dir, dtype=dtype)
    assert model.dtype == expected


def test_torch_dtype_is_the_same_argument(tiny_llama_dir):
    assert load(tiny_llama_dir, torch_dtype="bfloat16")[0].dtype == torch.bfloat16


def test_full_finetuning_trains_everything_and_is_unquantised(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny_llama_dir), dtype="bfloat16", full_finetuning=True, float32_mixed_precision=True
    )
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    assert FastLanguageModel.get_peft_model(model) is model
    half, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), dtype="bfloat16", full_finetuning=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_longer_context_scales_rope_linearly(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, max_seq_length=1024)
    stock, _ = load(tiny_llama_dir)
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == model.generation_config.max_length == 1024
    # Position interpolation: position 4p in the longer model is position p in the original.
    positions = torch.arange(8)[None]
    x = torch.zeros(1, 8, 64)
    far = model.model.rotary_emb(x, positions * 4)[0]
    near = stock.model.rotary_emb(x, positions)[0]
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)


def test_default_length_never_scales(tiny_llama_dir):
    model, tokenizer = load(tiny_llama_dir)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert model.max_seq_length == tokenizer.model_max_length == 256


def test_native_scaling_is_kept(folder):
    native = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    edit_config(folder, rope_parameters=native)
    model, _ = load(folder, max_seq_length=512)
    assert model.config.rope_parameters == native
    assert model.config.max_position_embeddings == 512


def test_explicit_rope_scaling(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, max_seq_length=512, rope_scaling={"type": "dynamic", "factor": 3.0})
    assert (model.config.rope_parameters["rope_type"], model.config.rope_parameters["factor"]) == ("dynamic", 3.0)
    # Dynamic scaling is computed from the original maximum.
    assert model.config.max_position_embeddings == 256
    with pytest.raises(ConfigError, match="rope_scaling"):
        load(tiny_llama_dir, rope_scaling={"rope_type": "spiral", "factor": 2.0})


def test_sliding_layers_keep_their_rope(tmp_path):
    make_tiny("gemma3_text", head_dim=16).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path, max_seq_length=512)
    rope = model.config.rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["factor"]) == ("linear", 2.0)
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_learned_positions_cannot_be_extended(tmp_path):
    make_tiny("gpt2").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path)[0].max_seq_length == 256
    with pytest.raises(UnsupportedError, match="learned"):
        load(tmp_path, max_seq_length=512)


def test_num_labels_gives_a_classifier_with_an_unquantised_head(tiny_llama_dir):
    model, tokenizer = FastModel.from_pretrained(
        str(tiny_llama_dir), num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert type(model.score) is torch.nn.Linear
    assert model.score.weight.dtype == torch.float32
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert model.config.id2label[1] == "b"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["hello", "hello there you"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 3)
    tuned = FastModel.get_peft_model(model, r=4)
    assert tuned.peft_config["default"].task_type == "SEQ_CLS"
    assert any(name.startswith("base_model.model.score.modules_to_save") for name, p in tuned.named_parameters())


def test_a_new_head_is_the_same_each_time(tiny_llama_dir):
    def head():
        torch.rand(5)
        return load(tiny_llama_dir, num_labels=2)[0].score.weight

    assert torch.equal(head(), head())


def test_resize_model_vocab(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, resize_model_vocab=400)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 400


def test_text_decoder_of_a_multimodal_model(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        text_config={"model_type": "llama", **TINY},
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    whole, _ = FastModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    text, _ = FastModel.from_pretrained(str(tmp_path), load_in_4bit=False, text_only=True)
    assert (type(whole).__name__, type(text).__name__) == ("LlavaForConditionalGeneration", "LlamaForCausalLM")
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, text(IDS).logits)


@pytest.fixture
def hub_cache(tiny_llama_dir, tmp_path):
    """A hub cache that holds the tiny model as org/tiny and an adapter of it as org/adapter; offline."""

    def add(name, folder):
        repository = tmp_path / "cache" / f"models--org--{name}"
        snapshot = repository / "snapshots" / "0123abcd"
        for part in (repository / "refs", repository / "blobs", snapshot):
            part.mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abcd")
        for file in folder.iterdir():
            shutil.copy(file, repository / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")

    make_adapter(tiny_llama_dir, tmp_path / "adapter", with_tokenizer=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/tiny"}))
    add("tiny", tiny_llama_dir)
    add("adapter", tmp_path / "adapter")
    return str(tmp_path / "cache")


@pytest.mark.disable_socket
def test_hub_ids_are_read_from_the_cache(hub_cache, tiny_llama_dir):
    model, tokenizer = load("org/tiny", cache_dir=hub_cache)
    local, _ = load(tiny_llama_dir)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, local(IDS).logits)
    assert record_of(model).load_kwargs == {"cache_dir": hub_cache}
    assert tokenizer.pad_token == "<pad>"
    adapted, _ = load("org/adapter", cache_dir=hub_cache)
    assert (record_of(adapted).name, record_of(adapted).base) == ("org/adapter", "org/tiny")
    assert adapted.peft_config["default"].r == 4
    with pytest.raises(UnsupportedError, match="local folders only"):
        load("org/tiny", cache_dir=hub_cache, use_safetensors=False)


def test_configuration_fields_and_attention_pass_through(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, attention_dropout=0.25, attn_implementation="eager", low_cpu_mem_usage=True)
    assert model.config.attention_dropout == 0.25
    assert model.config._attn_implementation == "eager"


def test_family_names_are_the_same_loader(tiny_llama_dir):
    assert FastMistralModel is FastLlamaModel
    model, _ = FastLlamaModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=False)
    assert model.max_seq_length == 256


def test_signature_shows_unsloths_defaults():
    shown = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert shown["load_in_4bit"].default == True  # noqa: E712  (an int that compares as True)
    assert repr(shown["load_in_4bit"].default) == "True"
    assert shown["max_seq_length"].default == 2048
    assert shown["model_name"].default == "unsloth/Llama-3.2-1B-Instruct"
    for name in ("auto_device_map", "max_memory", "use_multi_gpu", "use_tpu", "tpu_cores", "unsloth_tiled_mlp"):
        assert name in shown


def make_adapter(tiny_llama_dir, path, with_tokenizer=True):
    model, tokenizer = load(tiny_llama_dir, max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(path)
    if with_tokenizer:
        tokenizer.chat_template = "of the adapter"
        tokenizer.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("with_tokenizer", [True, False], ids=["own-tokenizer", "base-tokenizer"])
def test_adapter_folder_loads_its_base_and_stays_trainable(tiny_llama_dir, tmp_path, capfd, with_tokenizer):
    before = make_adapter(tiny_llama_dir, tmp_path, with_tokenizer)
    model, tokenizer = load(tmp_path)
    assert f"adapter of {tiny_llama_dir}" in capfd.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before(IDS).logits, rtol=0, atol=1e-5)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 14
    assert all("lora_" in name for name in trainable)
    assert (record_of(model).name, record_of(model).base) == (str(tmp_path), str(tiny_llama_dir))
    assert (tokenizer.chat_template == "of the adapter") is with_tokenizer
    assert tokenizer.padding_side == "left"
    with pytest.raises(ConflictError, match="adapter"):
        load(tmp_path, full_finetuning=True)


def test_adapter_without_its_base(tiny_llama_dir, tmp_path):
    make_adapter(tiny_llama_dir, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(ModelNotFoundError, match=r"base model of the adapter .* /gone/base"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelNotFoundError, match="does not say"):
        load(tmp_path)


def test_adapter_of_another_shape(tiny_llama_dir, tmp_path):
    make_adapter(tiny_llama_dir, tmp_path / "adapter")
    make_tiny("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(CheckpointError, match="does not fit its base"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_lenght": 128}, ArgumentError, "did you mean 'max_seq_length'"),
        ({"load_in_4bits": True}, ArgumentError, "did you mean 'load_in_4bit'"),
        ({"dtype": "bfloat61"}, ConfigError, "did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, ConfigError, "not computed in torch.int8"),
        ({"dtype": 16}, ArgumentError, "dtype"),
        ({"dtype": "float32", "torch_dtype": "float16"}, ConflictError, "contradict"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ConflictError, "load_in_4bit and load_in_8bit"),
        ({"load_in_8bit": True, "load_in_16bit": True}, ConflictError, "contradict"),
        ({"load_in_4bit": True, "full_finetuning": True}, ConflictError, "full_finetuning"),
        ({"load_in_8bit": True, "full_finetuning": True}, ConflictError, "full_finetuning"),
        (
            {"load_in_8bit": True, "quantization_config": {"load_in_4bit": True}},
            ConflictError,
            "quantization_config",
        ),
        ({"quantization_config": {"bits": 3}}, ConfigError, "names no method"),
        ({"quantization_config": {"quant_method": "magic"}}, ConfigError, "quantisation method"),
        ({"quantization_config": "nf4"}, ArgumentError, "quantization_config"),
        ({"load_in_4bit": "yes"}, ArgumentError, "load_in_4bit"),
        ({"load_in_fp8": "tensor"}, ArgumentError, "load_in_fp8"),
        ({"load_in_fp8": "block", "load_in_4bit": True}, ConflictError, "each row"),
        ({"max_seq_length": 0}, ConfigError, "max_seq_length"),
        ({"max_seq_length": 12.5}, ArgumentError, "max_seq_length"),
        ({"fast_inference": True, "full_finetuning": True}, UnsupportedError, "fast_inference"),
        ({"float8_kv_cache": True}, UnsupportedError, "float8_kv_cache"),
        ({"qat_scheme": "int4"}, ValueError, "needs full_finetuning=True"),
        ({"qat_scheme": "int5"}, ConfigError, "did you mean 'int4'|unknown scheme"),
        ({"unsloth_tiled_mlp": "arctic"}, UnsupportedError, "unsloth_tiled_mlp"),
        ({"unsloth_force_compile": True}, UnsupportedError, "unsloth_force_compile"),
        ({"use_multi_gpu": True}, UnsupportedError, "at least two GPUs"),
        ({"max_memory": {0: "10GB"}}, UnsupportedError, "max_memory"),
        ({"tpu_cores": 4}, UnsupportedError, "tpu_cores"),
        ({"device_map": "unsloth-planner"}, ConfigError, "device_map"),
        ({"device_map": "cuda:0"}, UnsupportedError, "computes on cpu"),
        ({"activation_memory_fraction": 1.5}, ConfigError, "activation_memory_fraction"),
        ({"use_gradient_checkpointing": "always"}, ConfigError, "checkpointing mode"),
        ({"attn_implementation": "org/kernel"}, UnsupportedError, "download and run a kernel"),
        ({"weights_only": False}, UnsupportedError, "unpickle"),
        ({"resize_model_vocab": 10}, ConfigError, "resize_model_vocab"),
        ({"whisper_language": "English"}, ConfigError, "whisper_language"),
        ({"auto_model": 3}, ArgumentError, "auto_model"),
        ({"trust_remote_code": None}, ArgumentError, "trust_remote_code"),
        ({"token": 5}, ArgumentError, "token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_raise_before_anything_is_read(tiny_llama_dir, monkeypatch, options, error, message):
    if next(iter(options)) not in ("resize_model_vocab", "whisper_language"):
        monkeypatch.setattr(
            "pantheraml.models.load._read_weights", lambda *_: pytest.fail("weights were read for a bad option")
        )
    with pytest.raises(error, match=message) as raised:
        FastLanguageModel.from_pretrained(str(tiny_llama_dir), **options)
    assert isinstance(raised.value, PantheraMLError)


@pytest.mark.skipif(is_installed("vllm"), reason="vllm is installed")
def test_fast_inference_needs_vllm(tiny_llama_dir):
    with pytest.raises(ImportError, match="vllm"):
        load(tiny_llama_dir, fast_inference=True)


@pytest.mark.skipif(is_installed("torch_xla"), reason="torch_xla is installed")
def test_use_tpu_needs_torch_xla(tiny_llama_dir):
    with pytest.raises(MissingDependencyError, match="torch_xla"):
        load(tiny_llama_dir, use_tpu=True)


def test_missing_folder_names_the_nearest(tiny_llama_dir):
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*tiny-llama") as raised:
        load(f"{tiny_llama_dir}s")
    assert isinstance(raised.value, FileNotFoundError)


def test_unknown_hub_id_offline():
    with pytest.raises(ModelNotFoundError, match="neither a local folder nor a repository"):
        load("nobody/no-such-model")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        load(folder)


def test_trainer_output_folder_names_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ModelNotFoundError, match="checkpoint-10"):
        load(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no model weights"):
        load(folder)


@pytest.mark.skipif(not is_installed("gguf"), reason="gguf is not installed")
def test_missing_gguf_file(tiny_llama_dir):
    with pytest.raises(ModelNotFoundError, match=r"no file model\.gguf"):
        load(tiny_llama_dir, gguf_file="model.gguf")


def test_folder_without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load(folder)


def test_tokenizer_from_another_place(folder, tiny_llama_dir):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    _, tokenizer = load(folder, tokenizer_name=str(tiny_llama_dir))
    assert len(tokenizer) == 384


def test_unknown_architecture(folder):
    edit_config(folder, model_type="lama")
    with pytest.raises(UnknownArchitectureError, match=r"'lama'[^$]*llama"):
        load(folder)


def test_broken_config_names_line_and_column(folder):
    (folder / "config.json").write_text('{"model_type": "llama",\n "hidden_size": }')
    with pytest.raises(CheckpointError, match="line 2, column"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hidden_size": 32}, CheckpointError, "shapes that config.json says"),
        ({"hidden_size": "big"}, ConfigError, "hidden_size"),
        ({"num_attention_heads": 0}, ConfigError, "cannot be"),
        ({"hidden_act": "magic"}, ConfigError, "magic"),
    ],
    ids=["shape", "type", "zero", "activation"],
)
def test_config_values_that_cannot_be_used(folder, fields, error, message):
    edit_config(folder, **fields)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_cut_short(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(folder)


def test_weights_missing_from_the_checkpoint_are_told(folder, capfd):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)
    assert "model.norm.weight" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_names(name):
    with pytest.raises(ArgumentError, match="model_name"):
        FastLanguageModel.from_pretrained(name)


def test_a_file_is_no_model(tiny_llama_dir):
    with pytest.raises(ConfigError, match="is a file"):
        load(tiny_llama_dir / "config.json")


def test_token_is_in_no_message(tiny_llama_dir, capfd):
    model, _ = load(tiny_llama_dir, token="hf_canary")
    assert "hf_canary" not in capfd.readouterr().err + repr(record_of(model)) + repr(model.config)
    with pytest.raises(PantheraMLError) as raised:
        load("nobody/no-such-model", token="hf_canary")
    assert "hf_canary" not in str(raised.value)


def test_the_share_of_memory_for_activations_lasts(tiny_llama_dir):
    model = load(tiny_llama_dir, load_in_4bit=False, activation_memory_fraction=0.4)
    model = FastLanguageModel.get_peft_model(model[0], use_gradient_checkpointing="auto")
    assert model.get_base_model().activation_plan.fraction == 0.4
    FastLanguageModel.for_inference(model)
    FastLanguageModel.for_training(model)
    assert model.get_base_model().activation_plan.fraction == 0.4


_MEMORY_OF_A_LOAD = """
import sys, torch
torch.set_num_threads(1)
from pantheraml.models import FastLanguageModel
import bitsandbytes

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

FastLanguageModel.from_pretrained(sys.argv[1], load_in_4bit=True)
before = held()
model, _ = FastLanguageModel.from_pretrained(sys.argv[2], load_in_4bit=True)
print(held() - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_leaves_no_more_on_the_host_than_the_model(tiny_llama_dir, tmp_path):
    """What was read in 16 bits, by several threads, is given back to the system once it is quantised."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    make_tiny("llama", **sizes).bfloat16().save_pretrained(tmp_path, max_shard_size="32MB")
    build_tokenizer().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MEMORY_OF_A_LOAD, str(tiny_llama_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept, model = map(float, done.stdout.split()[-2:])
    # The checkpoint has 178 MB, of which the threads' heaps would keep most.
    assert kept < model + 32, (kept, model)

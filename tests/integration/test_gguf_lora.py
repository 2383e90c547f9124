"""Adapters alone as GGUF files: added to the base model's file they give the merged model's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, make_tiny
from peft import LoraConfig, get_peft_model

from pantheraml import save as facade
from pantheraml.errors import CheckpointError, ConfigError, ConflictError, UnsupportedError

gguf = pytest.importorskip("gguf")

from pantheraml.export.gguf import lora  # noqa: E402
from pantheraml.models.record import ModelRecord, attach_record  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
CASES = {
    "llama": ("llama", {}, {}),
    "rank-stabilised": ("llama", {}, {"use_rslora": True, "lora_alpha": 8}),
    "ranks-and-alphas": ("llama", {}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "embeddings": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS, {"target_modules": ["q_proj", "o_proj"]}),
    "phi3": ("phi3", {}, {}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "granite": ("granite", {}, {}),
}


def adapted(base, **config):
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def file(result) -> Path:
    (name,) = result["gguf_files"]
    return Path(name)


def updates(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each weight."""
    alpha = gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents()
    factors, result = tensors(path), {}
    for name in {name.rpartition(".")[0] for name in factors}:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        result[name] = alpha / b.shape[1] * (a @ b.T if name == "token_embd.weight" else b @ a)
    return result


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_base_and_adapter_give_the_merged_file(tmp_path, case, tiny_tokenizer):
    family, overrides, config = case
    base = make_tiny(family, **overrides)
    before = tensors(file(facade.save_pretrained_gguf(base, tmp_path / "base", tiny_tokenizer, "f32", verify=False)))
    model = adapted(base, **config)
    merged = tensors(file(facade.save_pretrained_gguf(model, tmp_path / "all", tiny_tokenizer, "f32", verify=False)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = file(facade.save_pretrained_gguf(model, tmp_path / "m", None, "f32", save_method="lora"))
    assert path == tmp_path / "m_gguf" / "m.F32-LoRA.gguf"
    added = updates(path)
    changed = {name for name in merged if not np.array_equal(merged[name], before[name])}
    assert changed == set(added)
    for name, update in added.items():
        np.testing.assert_allclose(before[name] + update, merged[name], rtol=1e-5, atol=1e-6, err_msg=name)
    reader = gguf.GGUFReader(path)
    keys = {"general.type": "adapter", "adapter.type": "lora"}
    assert {key: reader.get_field(key).contents() for key in keys} == keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [entry.name for entry in (tmp_path / "m_gguf").iterdir()] == ["m.F32-LoRA.gguf"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_active_adapters_are_one_in_the_file(tmp_path):
    model = adapted(make_tiny("llama"), target_modules=["q_proj", "up_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    path = file(facade.save_pretrained_ggml(model, tmp_path / "m", outtype="f32"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    rows = expected.reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)  # four heads, halves interleaved
    found = torch.from_numpy(updates(path)["blk.0.attn_q.weight"])
    torch.testing.assert_close(found, rows.detach(), rtol=1e-5, atol=1e-6)
    assert tensors(path)["blk.0.attn_q.weight.lora_a"].shape == (6, 64)
    assert tensors(path)["blk.0.ffn_up.weight.lora_a"].shape == (4, 64)


def test_ggml_writes_f16_into_the_folder_it_is_given(tmp_path):
    model = adapted(make_tiny("llama"), r=32)
    attach_record(model.get_base_model(), ModelRecord("org/base", "org/base", None, torch.float32, "none", False, 64))
    result = facade.save_pretrained_ggml(model, tmp_path / "m")
    path = file(result)
    assert path == tmp_path / "m" / "m.F16-LoRA.gguf"
    assert result["modelfile_location"] is None
    reader = gguf.GGUFReader(path)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}
    assert reader.get_field("general.base_model.0.repo_url").contents() == "https://huggingface.co/org/base"
    path = file(facade.save_pretrained_ggml(model, tmp_path / "m", outtype="Q8_0"))
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {"Q8_0"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["m.F16-LoRA.gguf", "m.Q8_0-LoRA.gguf"]
    assert facade.save_pretrained_ggml(model, tmp_path / "n", is_main_process=False) is None
    assert not (tmp_path / "n").exists()


def test_updates_too_small_for_16_bits_stay_in_32(tmp_path):
    model = get_peft_model(make_tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-6)
    path = file(facade.save_pretrained_ggml(model, tmp_path / "m"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight.lora_a"] == "F16"
    assert kinds["blk.0.attn_q.weight.lora_b"] == "F32"


TIED = {"tie_word_embeddings": True}
REFUSED = {
    "dora": ({}, {"use_dora": True}, "variant of LoRA"),
    "modules-to-save": ({}, {"modules_to_save": ["lm_head"]}, "as a whole"),
    "tokens": ({}, {"trainable_token_indices": [3]}, "single tokens"),
    "biases": ({}, {"bias": "all"}, "bias='all'"),
    "lora-bias": ({}, {"lora_bias": True}, "lora_bias|bias"),
    "tied": (TIED, {"target_modules": ["embed_tokens", "q_proj"]}, "one weight in the file"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_such_a_file_cannot_hold_is_refused(tmp_path, case):
    overrides, config, message = case
    family = "qwen2" if config.get("lora_bias") else "llama"
    if config.get("lora_bias"):
        config = {**config, "target_modules": ["q_proj", "v_proj"]}
    model = adapted(make_tiny(family, **overrides), **config)
    with pytest.raises(UnsupportedError, match=rf"(?s)({message}).*merge the adapter"):
        facade.save_pretrained_ggml(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_nothing_to_save_and_wrong_types(tmp_path):
    model = adapted(make_tiny("llama"))
    with pytest.raises(RuntimeError, match="no adapter"):
        facade.save_pretrained_ggml(make_tiny("llama"), tmp_path / "m")
    with model.disable_adapter(), pytest.raises(ConflictError, match="disabled"):
        facade.save_pretrained_ggml(model, tmp_path / "m")
    model.merge_adapter()
    with pytest.raises(ConflictError, match="merged into"):
        facade.save_pretrained_ggml(model, tmp_path / "m")
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="argument outtype"):
        facade.save_pretrained_ggml(model, tmp_path / "m", outtype="q4_k_m")
    with pytest.raises(UnsupportedError, match="first_conversion"):
        facade.save_pretrained_gguf(model, tmp_path / "m", None, "f16", "f32", save_method="lora")
    assert not list(tmp_path.iterdir())


def test_a_wrong_update_never_gets_its_name(tmp_path, monkeypatch):
    """Every tensor is as planned, and the scale with which llama.cpp adds them is not."""
    model = adapted(make_tiny("llama"), target_modules=["q_proj"])
    original = lora._plan

    def halved(*args):
        alpha, pairs = original(*args)
        return alpha / 2, pairs

    monkeypatch.setattr(lora, "_plan", halved)
    with pytest.raises(CheckpointError, match="not what the adapter computes"):
        facade.save_pretrained_ggml(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_push_uploads_the_adapter_with_a_card(tmp_path, monkeypatch):
    from pantheraml.export.gguf import api

    seen = {}

    def upload(folder, target):
        seen.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return target.repo_id

    monkeypatch.setattr(api, "create_repo", lambda target: target.repo_id)
    monkeypatch.setattr(api, "upload", upload)
    model = adapted(make_tiny("llama"))
    assert facade.push_to_hub_ggml(model, "me/mine", build_tokenizer(), outtype="bf16") == "me/mine"
    assert set(seen) == {"mine.BF16-LoRA.gguf", "README.md"}

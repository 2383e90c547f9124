"""A hostile model folder: no code runs, nothing outside the folder is opened, nothing is fetched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys

import pytest
import torch

from pantheraml.errors import (
    CheckpointError,
    ConfigError,
    PantheraMLError,
    UnknownArchitectureError,
    UnsupportedError,
)
from pantheraml.models import FastLanguageModel, attention
from pantheraml.models.safety import check_attention, check_inside, clean_config

pytestmark = pytest.mark.disable_socket

IDS = torch.tensor([[0, 20, 30, 40]])


def load(path, **options):
    return FastLanguageModel.from_pretrained(str(path), load_in_4bit=False, **options)


@pytest.fixture
def folder(tiny_llama_dir, tmp_path):
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def edit_config(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class _Marker:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def with_code(folder, marker, **fields):
    """Give the folder Python files that create ``marker`` when they are imported."""
    code = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
    (folder / "modeling_evil.py").write_text(
        code + "from transformers import LlamaForCausalLM\nfrom .configuration_evil import EvilConfig\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
    )
    (folder / "configuration_evil.py").write_text(
        code + "from transformers import LlamaConfig\nclass EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    )
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilModel",
        },
        **fields,
    )


def test_own_code_is_not_run_without_the_flag(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked interactively"))
    marker = tmp_path / "marker"
    with_code(folder, marker, model_type="evil")
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ConfigError, match="trust_remote_code=True"):
            load(folder, **options)
    assert not marker.exists()


def test_own_code_of_a_known_architecture_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked interactively"))
    marker = tmp_path / "marker"
    with_code(folder, marker)
    edit_config(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", None]})
    model, _ = load(folder)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not marker.exists()


@pytest.mark.parametrize("fields", [{"model_type": "evil"}, {}], ids=["unknown", "known"])
def test_own_code_runs_when_asked(folder, tmp_path, monkeypatch, capfd, fields):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    marker = tmp_path / "marker"
    with_code(folder, marker, **fields)
    model, _ = load(folder, trust_remote_code=True)
    assert marker.exists()
    assert type(model).__name__ == "EvilModel"
    assert "running the Python code" in capfd.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation_internal": "evil/repo"},
        {"_experts_implementation_internal": "evil/repo"},
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel:function"},
        {"attn_implementation": "flash_attention_2"},
        {"trust_remote_code": True},
        {"use_kernels": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_config_fields_that_select_code_are_ignored_and_told(folder, tiny_llama_dir, capfd, fields):
    edit_config(folder, **fields)
    model, _ = load(folder)
    assert next(iter(fields)) in capfd.readouterr().err
    assert model.config._attn_implementation == attention.NAME
    expected, _ = load(tiny_llama_dir)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_nested_configurations_are_cleaned():
    config = {
        "text_config": {
            "_attn_implementation_internal": "evil/repo",
            "hidden_size": 8,
            "auto_map": {"AutoModel": "x.Y"},
        },
        "parts": [{"trust_remote_code": True, "depth": 1}],
        "attn_implementation": {"": "sdpa", "vision_config": "org/kernel"},
        "auto_map": {"AutoConfig": "x.Y"},
    }
    cleaned, removed = clean_config(config, trust_remote_code=False)
    assert cleaned == {"text_config": {"hidden_size": 8}, "parts": [{"depth": 1}]}
    assert set(removed) == {
        "text_config._attn_implementation_internal",
        "text_config.auto_map",
        "parts[0].trust_remote_code",
        "attn_implementation",
        "auto_map",
    }
    assert "_attn_implementation_internal" in config["text_config"]
    kept, _ = clean_config({"auto_map": {"AutoConfig": "x.Y"}, "attn_implementation": "eager"}, trust_remote_code=True)
    assert kept == {"auto_map": {"AutoConfig": "x.Y"}, "attn_implementation": "eager"}


@pytest.mark.parametrize("value", ["org/kernel", "paged|org/kernel", {"text_config": "org/kernel@main"}])
def test_kernels_of_a_hub_are_refused_as_arguments(value):
    with pytest.raises(PantheraMLError, match="download and run"):
        check_attention(value)


@pytest.mark.parametrize("value", [None, "sdpa", "eager", {"": "sdpa"}])
def test_attention_of_torch_is_allowed(value):
    check_attention(value)


def test_pickled_weights_are_refused_by_default_and_read_safely_on_request(folder, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, a pickle[^$]*use_safetensors=False"):
        load(folder)
    model, _ = load(folder, use_safetensors=False)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_never_does(folder, tmp_path, protocol):
    marker = tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Marker(marker)}, folder / "pytorch_model.bin", pickle_protocol=protocol)
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises((PantheraMLError, pickle.UnpicklingError)):
            load(folder, **options)
        assert not marker.exists()


def sharded(folder, name):
    """Make the folder a sharded checkpoint whose index names ``name``."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "a/../../secret.safetensors",
        "/etc/passwd",
        "C:\\secret.safetensors",
        "..\\secret.safetensors",
        "secret\x00.safetensors",
        "",
    ],
    ids=["parent", "nested-parent", "absolute", "drive", "backslash", "nul", "empty"],
)
def test_weights_outside_the_folder_are_not_opened(folder, tiny_llama_dir, name):
    shutil.copy(tiny_llama_dir / "model.safetensors", folder.parent / "secret.safetensors")
    sharded(folder, name)
    with pytest.raises(CheckpointError, match="which is refused"):
        load(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder, tiny_llama_dir):
    sharded(folder, "linked.safetensors")
    (folder / "linked.safetensors").symlink_to(tiny_llama_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match="link that leads out"):
        load(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_bytes(b"x")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    check_inside(snapshot, ["model.safetensors"], where="here")


def test_missing_shards_are_named(folder):
    sharded(folder, "model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load(folder)


def test_weights_file_named_by_the_config_stays_inside(folder):
    edit_config(folder, transformers_weights="../other.safetensors")
    with pytest.raises(CheckpointError, match="which is refused"):
        load(folder)


def test_unknown_architecture_without_code(folder):
    edit_config(folder, model_type="nothing_like_it")
    with pytest.raises(UnknownArchitectureError):
        load(folder)


def test_an_adapter_cannot_have_a_module_imported(tiny_llama_dir, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = tmp_path / "adapter"
    base, _ = load(tiny_llama_dir)
    FastLanguageModel.get_peft_model(base, r=2).save_pretrained(adapter)
    edit_config(adapter, "adapter_config.json", megatron_config={"x": 1}, megatron_core="evil_module")
    with pytest.raises(UnsupportedError, match="evil_module"):
        load(adapter)
    assert not (tmp_path / "marker").exists()


def test_pickled_adapter_is_refused(folder, tiny_llama_dir, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    marker = tmp_path / "marker"
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny_llama_dir)}
        )
    )
    torch.save({"x": _Marker(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin"):
        load(adapter)
    with pytest.raises((PantheraMLError, pickle.UnpicklingError)):
        load(adapter, use_safetensors=False)
    assert not marker.exists()

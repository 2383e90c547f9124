"""``pantheraml export``: every format from a folder, and refusals before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pantheraml.cli import main
from pantheraml.models.loader import FastLanguageModel


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama_dir, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def export(capsys, *argv: object) -> tuple[int, dict, str]:
    code = main(["export", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


@pytest.mark.parametrize("name", ["merged_16bit", "merged-16bit"])
def test_an_adapter_is_merged(adapter, tiny_llama_dir, tmp_path, capsys, name):
    code, record, _ = export(capsys, adapter, tmp_path / "m", "--format", name, "--dtype", "float32")
    assert code == 0
    assert record == {
        "format": "merged_16bit",
        "folder": str(tmp_path / "m"),
        "files": ["model.safetensors"],
        "verified": True,
    }
    name = "model.layers.0.mlp.up_proj.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    delta = 8 / 4 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
    expected = load_file(tiny_llama_dir / "model.safetensors")[name] + delta
    torch.testing.assert_close(load_file(tmp_path / "m" / "model.safetensors")[name], expected, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "m" / "tokenizer.json").exists()


FORMATS = {
    "lora": (["--format", "lora"], "m", ["adapter_model.safetensors"]),
    "gguf": (["--format", "gguf", "-q", "F16", "q8_0"], "m_gguf", ["m.F16.gguf", "m.Q8_0.gguf"]),
    "gguf_lora": (["--format", "gguf-lora", "-q", "f16"], "m_gguf", ["m.F16-LoRA.gguf"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats(adapter, tmp_path, capsys, name):
    flags, folder, files = FORMATS[name]
    if "gguf" in name:
        pytest.importorskip("gguf")
    code, record, _ = export(capsys, adapter, tmp_path / "m", *flags)
    assert code == 0
    assert (record["folder"], record["files"]) == (str(tmp_path / folder), files)
    assert all((tmp_path / folder / file).stat().st_size > 0 for file in files)
    assert [entry.name for entry in tmp_path.iterdir()] == [folder]


REFUSALS = {
    "unknown": (["--format", "merged_16bits"], "did you mean 'merged_16bit'"),
    "merged_4bit": (["--format", "merged-4bit"], "merged_4bit_forced"),
    "gguf-type": (["--format", "gguf", "-q", "q9"], "unknown GGUF type"),
    "adapter-type": (["--format", "gguf_lora", "-q", "q4_0"], "adapters are not written as"),
    "idle-type": (["-q", "q8_0"], "--quantization makes no difference"),
    "idle-repo": (["--repo_id", "me/x"], "--repo_id needs --push_to_hub"),
    "no-repo": (["--push-to-hub"], "--repo_id is needed"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_cost_no_loading(adapter, tmp_path, capsys, monkeypatch, name):
    flags, message = REFUSALS[name]
    monkeypatch.setattr(FastLanguageModel, "from_pretrained", None)
    code, _, errors = export(capsys, adapter, tmp_path / "m", *flags)
    assert code == 2
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_failed_check_leave_nothing(adapter, tmp_path, capsys, monkeypatch):
    import shutil

    from pantheraml.export import verify

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        code, _, errors = export(capsys, adapter, tmp_path / "m")
    assert code == 5
    assert "not enough disk space" in errors
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(verify, "deviation", lambda found, expected: 1.0)
    code, _, errors = export(capsys, adapter, tmp_path / "m")
    assert code == 5
    assert "computes something else" in errors
    assert not list(tmp_path.iterdir())
    assert export(capsys, adapter, tmp_path / "m", "--no_verify")[0] == 0

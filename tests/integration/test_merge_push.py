"""Pushing a merged model: what is uploaded is the verified folder, in the order in which the hub wants it."""

from __future__ import annotations

import shutil
from typing import ClassVar

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pantheraml import save as facade
from pantheraml.errors import CheckpointError, ConfigError
from pantheraml.export import parameters, verify
from pantheraml.models.record import ModelRecord, attach_record


def adapted(base):
    """``base`` with adapters on all linear layers that are not what they began as."""
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


def logits(model):
    return verify.logits_of(model, verify.sample_inputs(parameters.unwrapped(model)))


class StubApi:
    """Stands for huggingface_hub.HfApi: records the calls and keeps a copy of what was uploaded."""

    calls: ClassVar[list] = []
    kept = None

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        return type("RepoUrl", (), {"repo_id": full})()

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def upload_folder(self, **kwargs):
        self.calls.append(("upload_folder", kwargs))
        shutil.copytree(kwargs["folder_path"], self.kept)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stub = type("Stub", (StubApi,), {"calls": [], "kept": tmp_path / "uploaded"})
    monkeypatch.setattr("pantheraml.export.hub.HfApi", stub)
    return stub


def test_push_uploads_the_verified_folder_with_a_card(tmp_path, hub, tiny_tokenizer, capsys):
    model = adapted(make_tiny("llama"))
    attach_record(model, ModelRecord("org/base", "org/base", None, torch.float32, "none", False, 64, token="hf_secret"))
    result = facade.push_to_hub_merged(
        model,
        "mine",
        tiny_tokenizer,
        private=True,
        token="hf_secret",
        commit_message="done",
        revision="v2",
        tags=["fun"],
        datasets=["org/data"],
        temporary_location=tmp_path,
    )
    assert result == "someone/mine"
    kinds = [call[0] for call in hub.calls if call[0] != "token"]
    assert kinds == ["create_repo", "create_repo", "create_branch", "upload_folder"]
    upload = hub.calls[-1][1]
    assert (upload["repo_id"], upload["commit_message"], upload["revision"]) == ("someone/mine", "done", "v2")
    assert hub.calls[1] == ("create_repo", "mine", {"private": True, "repo_type": "model", "exist_ok": True})
    card = (hub.kept / "README.md").read_text()
    assert "base_model: org/base" in card
    assert "- fun" in card
    assert "- org/data" in card
    plain = AutoModelForCausalLM.from_pretrained(hub.kept)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["uploaded"]
    assert "hf_secret" not in capsys.readouterr().err


def test_push_failures_are_typed_and_hide_the_token(tmp_path, hub, monkeypatch):
    def refuse(self, repo_id, **kwargs):
        raise OSError("401 for hf_secret")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(CheckpointError) as caught:
        facade.push_to_hub_merged(make_tiny("llama"), "a/b", token="hf_secret")
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="no repository name"):
        facade.push_to_hub_merged(make_tiny("llama"), "a/b/c d")


def test_saving_with_push_keeps_the_local_folder(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facade.save_pretrained_merged(make_tiny("llama"), "mine", push_to_hub=True)
    assert (tmp_path / "mine" / "model.safetensors").exists()
    assert (hub.kept / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")  # of torchao, about itself
def test_quantised_folders_are_pushed_too(tmp_path, hub, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization")
    monkeypatch.chdir(tmp_path)
    config = quantization.Int8WeightOnlyConfig(version=2)
    facade.save_pretrained_torchao(make_tiny("llama"), "mine", torchao_config=config, push_to_hub=True, token="hf_x")
    assert "torchao" in (hub.kept / "config.json").read_text()
    assert {"model.safetensors", "README.md"} <= {path.name for path in hub.kept.iterdir()}
    assert {call[1] for call in hub.calls if call[0] == "token"} == {"hf_x"}


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'variant'"):
        facade.push_to_hub_merged(object(), "a/b", varriant=None)

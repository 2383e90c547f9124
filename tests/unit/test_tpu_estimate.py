"""What the estimate of a TPU's memory does before anything is compiled; the compiler's part is tests/xla."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pantheraml.cli import main
from pantheraml.errors import ConfigError, MissingDependencyError, ModelNotFoundError
from pantheraml.training import tpu_estimate
from pantheraml.training.tpu_estimate import estimate_tpu_step, slice_of, without_weights


def test_slices_have_two_spellings():
    assert slice_of("v5e-8") == slice_of("V5E:2x4") == ("v5e-8", "v5e:2x4", 8)
    assert slice_of("v6e-256") == ("v6e-256", "v6e:16x16", 256)


@pytest.mark.parametrize("name", ["v5e", "v5e-7", "v5e:3x3", "v9x-8", "8", ""])
def test_an_unknown_slice_is_refused(name):
    with pytest.raises(ConfigError, match="v5e or v6e with 1, 4, 8"):
        slice_of(name)


def test_slices_of_several_sizes_are_refused(tiny_llama_dir):
    with pytest.raises(ConfigError, match="differ in their chips"):
        estimate_tpu_step(str(tiny_llama_dir), ["v5e-4", "v6e-8"])


@pytest.mark.parametrize("name", ["torch_xla", "libtpu", "jax"])
def test_a_missing_package_is_told_with_its_install_line(name, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else object())
    with pytest.raises(MissingDependencyError, match=rf"not installed: {name}\n(.*\n)*.*pantheraml\[tpu\]"):
        estimate_tpu_step(str(tiny_llama_dir), "v5e-8")


def test_a_folder_without_weights_loads_as_the_model(tiny_llama_dir, tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(tiny_llama_dir, source)
    (source / "model.safetensors").unlink()
    made.mkdir()
    without_weights(str(source), made)
    wanted = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).state_dict()
    model, info = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert not any(parameter.any() for parameter in model.parameters())
    assert (made / "tokenizer.json").is_file()


def test_a_folder_without_a_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        without_weights(str(tmp_path / "empty"), tmp_path)


def test_the_error_of_a_process_is_what_it_ended_with():
    output = (
        'noise\nTraceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: no\n  why: so\n'
    )
    assert tpu_estimate._error_of(output) == "ValueError: no\n  why: so"
    assert tpu_estimate._error_of("killed\n") == "killed"


ESTIMATE = tpu_estimate.TPUEstimate(
    tpu="v5e-8",
    topology="v5e:2x4",
    chips=8,
    parameters=1_000_000,
    trainable=1000,
    rows=16,
    seq_length=128,
    arguments=2**30,
    temporaries=2**31,
    outputs=2**20,
    updated=2**20,
    code=0,
    needed=3 * 2**30,
    hbm=16 * 2**30,
    fits=True,
    kernels=0,
    collectives={"all-gather": 7},
    trace_seconds=1.0,
    compile_seconds=2.0,
)


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def estimate(*args, **kwargs):
        calls.append((args, kwargs))
        return [ESTIMATE]

    monkeypatch.setattr(tpu_estimate, "estimate_tpu_step", estimate)
    return calls


def test_the_command_prints_the_figures(asked, capsys):
    flags = ["--tpu", "v5e-8", "--max_seq_length", "128", "--per_device_train_batch_size", "2", "--r", "4"]
    flags += ["--mesh_shape", "4", "2"]
    assert main(["estimate", "some/model", *flags]) == 0
    wanted = {
        "max_seq_length": 128,
        "per_device_train_batch_size": 2,
        "mesh_shape": [4, 2],
        "lora_r": 4,
        "use_gradient_checkpointing": True,
    }
    assert asked == [(("some/model", "v5e-8"), wanted)]
    printed = capsys.readouterr().out
    assert "v5e-8 (v5e:2x4): fits, 3.00 of 16.00 GiB" in printed
    assert "7 all-gather" in printed
    assert main(["estimate", "some/model", "--tpu", "v5e-8", "--full_finetuning", "--no_checkpointing", "--json"]) == 0
    assert asked[1][1]["lora_r"] is None
    assert asked[1][1]["use_gradient_checkpointing"] is False
    assert json.loads(capsys.readouterr().out)["needed"] == 3 * 2**30


def test_the_command_fails_where_the_step_does_not_fit(asked, capsys, monkeypatch):
    large = dataclasses.replace(ESTIMATE, fits=False, needed=20 * 2**30, arguments=None, collectives={})
    monkeypatch.setattr(tpu_estimate, "estimate_tpu_step", lambda *args, **kwargs: [large])
    assert main(["estimate", "some/model", "--tpu", "v5e-8"]) == 4
    assert "does not fit, at least 20.00 of 16.00 GiB" in capsys.readouterr().out


def test_the_command_refuses_what_would_not_act(capsys):
    assert main(["estimate", "some/model", "--tpu", "v5e-8", "--full_finetuning", "--r", "4"]) == 2
    assert "--r" in capsys.readouterr().err
    assert main(["estimate", "some/model"]) == 2
    assert "--tpu" in capsys.readouterr().err

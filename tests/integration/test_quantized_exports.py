"""Merged models in quantised formats: what is on disk, what loads it, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pantheraml import device
from pantheraml import save as facade
from pantheraml.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConflictError,
    MissingDependencyError,
    UnsupportedError,
)
from pantheraml.export import compressed, merge, verify
from pantheraml.export.merge import save_merged
from pantheraml.export.methods import COMPRESSED, TORCHAO

SHAPE = {"hidden_size": 256, "intermediate_size": 384}
QUIET = pytest.mark.filterwarnings("ignore")  # of torchao and bitsandbytes, about themselves


def adapted(family="llama", **shape):
    base = make_tiny(family, dtype=torch.bfloat16, **{**SHAPE, **shape})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def dense(model, tmp_path):
    save_merged(model, tmp_path / "dense", verify=False)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@QUIET
def test_forced_4_bits_are_what_loading_the_merged_model_in_4_bits_gives(tmp_path, tiny_tokenizer):
    pytest.importorskip("bitsandbytes")
    model = adapted()
    report = facade.save_pretrained_merged(model, tmp_path / "out", tiny_tokenizer, "merged_4bit_forced", tags=["x"])
    assert (report.save_method, report.merged_modules, report.verification.method) == (
        "merged_4bit_forced",
        14,
        "reload",
    )
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert not list((tmp_path / "out").glob("*.tmp"))
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_use_double_quant"]) == ("nf4", True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    dense(model, tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype="auto", quantization_config=written.config.quantization_config
    )
    assert torch.equal(written.model.layers[0].mlp.up_proj.weight.data, twin.model.layers[0].mlp.up_proj.weight.data)
    assert report.nbytes < 0.7 * sum(p.numel() * 2 for p in model.get_base_model().parameters())


def _steps(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Largest distance to the nearest value that a format has, for each weight."""
    if name in ("FP8_DYNAMIC", "FP8_BLOCK", "MXFP8"):
        largest = weight.abs().amax()
        return weight.abs() / 16 + largest * 2.0**-9  # three bits of mantissa, and the smallest steps
    bits = 8 if "8A" in name else 4
    groups = weight.unflatten(1, (-1, weight.shape[1] if name == "W8A8" else {"MXFP4A16": 32}.get(name, 128)))
    largest = groups.abs().amax(-1, keepdim=True)
    # Halves of a step; e2m1 steps by two between four and six, after scaling by a power of two.
    step = largest / (2 ** (bits - 1) - 0.5) / 2 if name != "MXFP4A16" else largest / 3
    return step.expand_as(groups).flatten(1) + weight.abs() * 2.0**-7


@QUIET
@pytest.mark.parametrize("method", sorted({preset: name for name, preset in COMPRESSED.items()}.values()))
def test_compressed_tensors_round_to_the_nearest_value(tmp_path, method):
    pytest.importorskip("compressed_tensors")
    model = adapted()
    report = facade.save_pretrained_merged(model, tmp_path / "out", None, method.upper())
    assert report.verification.method == "reload"
    assert report.verification.deviation < (0.1 if "4" not in method else 0.5)
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["ignore"] == ["lm_head"]
    merged = linears(dense(model, tmp_path))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        found(torch.arange(3, 9)[None])  # unpacks
    found = linears(found)
    assert found.keys() == merged.keys()
    for name, module in found.items():
        reference = merged[name].weight.float()
        error = (module.weight.float() - reference).abs()
        assert (error <= _steps(COMPRESSED[method], reference)).all(), name
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").lm_head.weight
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").lm_head.weight, head)


@QUIET
def test_rows_that_do_not_divide_stay_and_are_named(tmp_path):
    pytest.importorskip("compressed_tensors")
    facade.save_pretrained_merged(adapted(intermediate_size=320), tmp_path / "out", None, "int4")
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@QUIET
def test_no_more_than_one_weight_is_held_while_writing(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    most = []
    original = merge._Producer.__call__

    def counted(self, spec):
        result = original(self, spec)
        most.append(len(self._held))
        return result

    monkeypatch.setattr(merge._Producer, "__call__", counted)
    facade.save_pretrained_merged(adapted(), tmp_path / "out", None, "int4", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert max(most) <= 2  # scales and shape beside the packed weight


@QUIET
def test_a_wrong_compression_never_gets_its_name(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    original = compressed.Compression.tensors
    monkeypatch.setattr(
        compressed.Compression, "tensors", lambda self, name, dense: original(self, name, dense.flip(0))
    )
    with pytest.raises(CheckpointError, match="computes something else"):
        save_merged(adapted(), tmp_path / "out", save_method="fp8")
    assert list(tmp_path.iterdir()) == []


EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@QUIET
@pytest.mark.parametrize(("method", "package"), [("fp8", "compressed_tensors"), ("torchao_int8", "torchao")])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_refused(tmp_path, family, method, package):
    pytest.importorskip(package)
    model = make_tiny(family, **EXPERTS[family])
    with pytest.raises(UnsupportedError, match=r"(?s)experts are not written(.*)stay in 16 bit: \d"):
        save_merged(model, tmp_path / "out", save_method=method)
    assert list(tmp_path.iterdir()) == []


@QUIET
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_experts_that_stay_as_they_are_are_told(tmp_path, package, capsys):
    pytest.importorskip(package)
    model = make_tiny("qwen3_moe", dtype=torch.bfloat16, **SHAPE, **EXPERTS["qwen3_moe"])
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        facade.save_pretrained_torchao(model, tmp_path / "out", torchao_config=Int8WeightOnlyConfig(version=2))
    else:
        save_merged(model, tmp_path / "out", save_method="merged_4bit_forced")
    count = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    told = "not quantised by this format"
    assert f"{told}: {count:,} weights stay in torch.bfloat16" in capsys.readouterr().err
    model = make_tiny("llama", dtype=torch.bfloat16, **SHAPE)
    save_merged(model, tmp_path / "dense", save_method="merged_4bit_forced")
    assert told not in capsys.readouterr().err


@QUIET
@pytest.mark.parametrize("method", ["torchao_fp8", "portable_int8"])
def test_torchao(tmp_path, method):
    pytest.importorskip("torchao")
    model = adapted()
    report = facade.save_pretrained_merged(model, tmp_path / "out", None, method)
    assert report.verification.deviation < 0.1
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["quant_type"]["default"]["_type"] == TORCHAO[method][0]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        found = written(torch.arange(3, 27)[None]).logits.float()
        truth = model(torch.arange(3, 27)[None]).logits.float()
    assert (found - truth).norm() < 0.1 * truth.norm()


@QUIET
def test_torchao_by_a_configuration_of_ones_own(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8DynamicActivationIntxWeightConfig()
    report = facade.save_pretrained_torchao(adapted(), tmp_path / "out", torchao_config=config)
    assert report.save_method == "torchao"
    with pytest.raises(ArgumentError, match="configuration of torchao"):
        facade.save_pretrained_torchao(adapted(), tmp_path / "other", torchao_config="int8")
    with pytest.raises(UnsupportedError, match="cannot be quantised"):
        facade.save_pretrained_torchao(
            adapted(), tmp_path / "other", torchao_config=quantization.Float8DynamicActivationFloat8WeightConfig()
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_torchao_needs_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no configuration of torchao"):
        facade.save_pretrained_torchao(make_tiny("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "package"), [("fp8", "compressed-tensors"), ("int4", "compressed-tensors"), ("torchao_int8", "torchao")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, method, package):
    monkeypatch.setattr(device, "is_installed", lambda name: False)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'pantheraml\[{package}\]'"):
        save_merged(adapted(), tmp_path / "out", save_method=method)
    assert list(tmp_path.iterdir()) == []


@QUIET
def test_folders_of_adapters_are_left_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = adapted()
    save_merged(model, tmp_path / "out", save_method="lora")
    with pytest.raises(ConflictError, match="holds an adapter"):
        save_merged(model, tmp_path / "out", save_method="merged_4bit_forced")


@QUIET
def test_a_4_bit_model_that_cannot_be_right_never_gets_its_name(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    real = verify.logits_of
    monkeypatch.setattr(
        verify,
        "logits_of",
        lambda model, inputs: real(model, inputs).flip(-1) if "4bit" in str(model) else real(model, inputs),
    )
    with pytest.raises(CheckpointError, match="computes something else"):
        save_merged(adapted(), tmp_path / "out", save_method="merged_4bit_forced")
    assert list(tmp_path.iterdir()) == []

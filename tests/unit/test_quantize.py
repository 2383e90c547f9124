"""Quantisation flags, configuration objects and what a checkpoint already is."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig, GPTQConfig

from pantheraml.device import Device
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.models.quantize import Flags, compute_dtype_of, method_of, resolve_quantization

CPU = Device("cpu", "cpu", 0, 1, "x86", None, None, False, False, False)
MPS = Device("mps", "mps", 0, 1, "Apple GPU", None, None, True, True, False)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4}
MXFP4 = {"quant_method": "mxfp4"}


def resolve(flags=None, *, existing=None, given=None, name="org/model", device=CPU, family="llama", **fields):
    config = AutoConfig.for_model(family, **fields)
    if existing is not None:
        config.quantization_config = existing
    return resolve_quantization(
        flags or Flags(), name=name, config=config, given=given, dtype=torch.bfloat16, device=device
    )


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (Flags(), "nf4"),
        (Flags(load_in_4bit=True), "nf4"),
        (Flags(load_in_4bit=False), "none"),
        (Flags(load_in_8bit=True), "int8"),
        (Flags(load_in_4bit=False, load_in_8bit=True), "int8"),
        (Flags(load_in_16bit=True), "none"),
        (Flags(full_finetuning=True), "none"),
        (Flags(load_in_4bit=False, full_finetuning=True), "none"),
        (Flags(load_in_16bit=True, full_finetuning=True), "none"),
        (Flags(load_in_fp8=True), "fp8_rows"),
        (Flags(load_in_4bit=False, load_in_fp8="block"), "fp8_block"),
        (Flags(load_in_4bit=True, load_in_fp8=True), "nf4"),
    ],
)
def test_flags(flags, method):
    assert resolve(flags).method == method


def test_nf4_is_double_quantised_and_computes_in_the_dtype():
    config = resolve().config
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant is True
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert config.llm_int8_skip_modules is None


def test_routers_stay_unquantised():
    config = resolve(family="qwen3_moe", num_experts=8).config
    assert {"lm_head", "router", ".gate"} <= set(config.llm_int8_skip_modules)


def test_bf16_in_the_name():
    assert resolve(name="org/model-BF16").method == "none"
    assert resolve(Flags(load_in_4bit=True), name="org/model-BF16").method == "nf4"


@pytest.mark.parametrize(
    "flags",
    [
        Flags(load_in_4bit=True, load_in_8bit=True),
        Flags(load_in_4bit=True, load_in_16bit=True),
        Flags(load_in_8bit=True, load_in_16bit=True),
        Flags(load_in_8bit=True, load_in_fp8=True),
        Flags(load_in_16bit=True, load_in_fp8=True),
        Flags(load_in_4bit=True, load_in_fp8="block"),
        Flags(load_in_fp8=True, full_finetuning=True),
        Flags(load_in_4bit=True, load_in_fp8=True, full_finetuning=True),
        Flags(load_in_4bit=True, full_finetuning=True),
        Flags(load_in_8bit=True, full_finetuning=True),
    ],
)
def test_contradictions(flags):
    with pytest.raises(RuntimeError, match="contradict"):
        flags.check()


@pytest.mark.parametrize("value", [1, "row", None])
def test_fp8_is_a_bool_or_block(value):
    with pytest.raises(ArgumentError, match="load_in_fp8"):
        Flags(load_in_fp8=value).check()


def test_fp8_settings():
    rows, block = (resolve(Flags(load_in_fp8=value)).config for value in (True, "block"))
    assert (rows.block, block.block) == (False, True)
    assert rows.compute_dtype is torch.bfloat16
    assert json.loads(rows.to_json_string())["compute_dtype"] == "bfloat16"
    moe = resolve(Flags(load_in_fp8=True), family="qwen3_moe", num_experts=8).config
    assert {"lm_head", "router", ".gate"} <= set(moe.modules_to_not_convert)
    assert resolve(Flags(load_in_4bit=True, load_in_fp8=True)).fp8_compute
    assert not resolve(Flags(load_in_4bit=True)).fp8_compute


@pytest.mark.parametrize(
    ("device", "dtype", "text"),
    [
        (Device("cuda", "cuda", 0, 1, "NVIDIA A100", (8, 0), 80 << 30, True, True, False), torch.bfloat16, "8.0"),
        (Device("cuda", "cuda", 0, 1, "NVIDIA H100", (9, 0), 80 << 30, True, True, True), torch.float16, "bfloat16"),
        (MPS, torch.bfloat16, "Apple GPU"),
    ],
    ids=["A100", "float16", "mps"],
)
@pytest.mark.parametrize("flags", [Flags(load_in_fp8=True), Flags(load_in_4bit=True, load_in_fp8=True)])
def test_fp8_needs_units_and_bfloat16(flags, device, dtype, text):
    config = AutoConfig.for_model("llama")
    with pytest.raises(UnsupportedError, match=text):
        resolve_quantization(flags, name="org/model", config=config, given=None, dtype=dtype, device=device)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_checkpoints_in_fp8_load_as_they_are(method):
    found = resolve(Flags(load_in_fp8=True), existing={"quant_method": method})
    assert (found.method, found.config, found.fp8_compute) == (method, None, False)


def test_nf4_checkpoints_multiply_in_fp8_when_both_are_named():
    found = resolve(Flags(load_in_4bit=True, load_in_fp8=True), existing=NF4)
    assert (found.method, found.config, found.fp8_compute) == ("nf4", None, True)
    with pytest.raises(ConflictError, match="load_in_4bit=True too"):
        resolve(Flags(load_in_fp8=True), existing=NF4)
    with pytest.raises(ConflictError, match="load_in_fp8"):
        resolve(Flags(load_in_fp8=True), existing=GPTQ)


@pytest.mark.parametrize("value", [1, "True", None])
def test_flags_are_bools(value):
    with pytest.raises(ArgumentError):
        Flags(load_in_8bit=value).check()


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
        (NF4, "nf4"),
        (GPTQConfig(bits=4, dataset="c4", tokenizer=None), "gptq"),
    ],
)
def test_given_configuration(given, method):
    found = resolve(given=given)
    assert found.method == method
    assert method_of(found.config) == method


def test_given_configuration_and_an_equal_flag_agree():
    assert resolve(Flags(load_in_4bit=True), given=NF4).method == "nf4"


@pytest.mark.parametrize(
    ("flags", "existing", "given"),
    [
        (Flags(load_in_8bit=True), None, NF4),
        (Flags(full_finetuning=True), None, NF4),
        (Flags(), INT8, NF4),
        (Flags(load_in_8bit=True), NF4, None),
        (Flags(load_in_4bit=True), INT8, None),
        (Flags(load_in_4bit=False), NF4, None),
        (Flags(load_in_16bit=True), GPTQ, None),
        (Flags(full_finetuning=True), GPTQ, None),
    ],
)
def test_contradictions_with_configurations(flags, existing, given):
    with pytest.raises(ConflictError, match=r"contradict|cannot train"):
        resolve(flags, existing=existing, given=given)


@pytest.mark.parametrize(
    ("flags", "existing", "method"),
    [
        (Flags(), NF4, "nf4"),
        (Flags(load_in_4bit=True), NF4, "nf4"),
        (Flags(), INT8, "int8"),
        (Flags(load_in_4bit=False), INT8, "int8"),
        (Flags(), GPTQ, "gptq"),
        (Flags(load_in_4bit=True), GPTQ, "gptq"),
        (Flags(), MXFP4, "none"),
        (Flags(full_finetuning=True), MXFP4, "none"),
    ],
)
def test_checkpoint_keeps_its_own(flags, existing, method):
    found = resolve(flags, existing=existing)
    assert found.method == method
    assert (found.config is not None) is (existing is MXFP4)


def test_mxfp4_is_unpacked():
    assert resolve(existing=MXFP4).config.dequantize is True


def test_compute_dtype():
    assert compute_dtype_of(None) is None
    assert compute_dtype_of({"load_in_4bit": True}) is None
    assert compute_dtype_of({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}) is torch.bfloat16
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    assert compute_dtype_of(given) is torch.float16
    assert compute_dtype_of(BitsAndBytesConfig(load_in_8bit=True)) is None


def test_without_bitsandbytes_on_the_device():
    assert resolve(device=MPS).method == "none"
    with pytest.raises(UnsupportedError, match="mps"):
        resolve(Flags(load_in_4bit=True), device=MPS)
    with pytest.raises(UnsupportedError, match="mps"):
        resolve(Flags(load_in_8bit=True), device=MPS)


def test_without_bitsandbytes_installed(monkeypatch):
    monkeypatch.setattr("pantheraml.device.is_installed", lambda package: package != "bitsandbytes")
    with pytest.raises(ImportError, match=r"bitsandbytes[^$]*load_in_16bit=True|load_in_16bit=True[^$]*bitsandbytes"):
        resolve()
    assert resolve(Flags(load_in_16bit=True)).method == "none"


@pytest.mark.parametrize("given", [{}, {"quant_method": "none-such"}])
def test_configurations_without_a_method(given):
    with pytest.raises(ConfigError):
        resolve(given=given)

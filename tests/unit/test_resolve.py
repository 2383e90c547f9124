"""dtype, placement and length rules, for devices that this machine does not have."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig

from pantheraml.device import Device
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.models.context import DEFAULT_MAX_SEQ_LENGTH, check_max_seq_length, extend_context
from pantheraml.models.resolve import parse_dtype, resolve_class, resolve_dtype, resolve_placement

GIB = 1024**3
CPU = Device("cpu", "cpu", 0, 1, "x86", None, None, False, False, False)
H100 = Device("cuda", "cuda", 0, 1, "H100", (9, 0), 80 * GIB, True, True, True)
T4 = dataclasses.replace(H100, name="T4", capability=(7, 5), memory=16 * GIB, bfloat16=False, float8=False)
PAIR = dataclasses.replace(H100, count=2)
TPU = Device("xla", "xla", 0, 4, "TPU v5e", None, None, True, False, False)


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("device", "dtype", "options", "expected"),
    [
        (H100, None, {}, torch.bfloat16),
        (T4, None, {}, torch.float16),
        (CPU, None, {}, torch.float32),
        (TPU, None, {}, torch.bfloat16),
        (T4, "bfloat16", {}, torch.float16),
        (CPU, "bfloat16", {}, torch.bfloat16),
        (H100, "float32", {}, torch.float32),
        (H100, torch.float16, {}, torch.float16),
        (T4, None, {"model_type": "gemma3_text"}, torch.float32),
        (H100, "fp16", {"model_type": "gpt_oss"}, torch.float32),
        (H100, None, {"compute_dtype": torch.float16}, torch.float16),
        (H100, "bf16", {"compute_dtype": torch.float16}, torch.bfloat16),
        (H100, None, {"full_finetuning": True}, torch.bfloat16),
        (T4, None, {"full_finetuning": True}, torch.float32),
        (H100, None, {"full_finetuning": True, "float32_mixed_precision": True}, torch.float32),
        (H100, None, {"float32_mixed_precision": True}, torch.bfloat16),
    ],
)
def test_dtype(device, dtype, options, expected):
    assert resolve_dtype(dtype, device=device, **options) is expected


def test_dtype_names():
    assert parse_dtype(None) is parse_dtype("auto") is None
    assert parse_dtype("torch.BFloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        parse_dtype("flaot16")
    with pytest.raises(ConfigError):
        parse_dtype(torch.float64)
    with pytest.raises(ArgumentError):
        parse_dtype(16)


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        (CPU, {}, {"": "cpu"}),
        (CPU, {"device_map": "auto"}, {"": "cpu"}),
        (CPU, {"device_map": None}, {"": "cpu"}),
        (H100, {}, {"": "cuda:0"}),
        (H100, {"device_map": "balanced"}, {"": "cuda:0"}),
        (H100, {"device_map": {"model": 0, "lm_head": "cpu"}}, {"model": 0, "lm_head": "cpu"}),
        (H100, {"device_map": "cuda:0"}, {"": "cuda:0"}),
        (H100, {"max_memory": {0: "10GB"}}, "sequential"),
        (PAIR, {}, {"": "cuda:0"}),
        (PAIR, {"weight_bytes": 140 * GIB}, "balanced"),
        (PAIR, {"weight_bytes": 140 * GIB, "bytes_per_weight": 0.6}, {"": "cuda:0"}),
        (PAIR, {"weight_bytes": 140 * GIB, "auto_device_map": False}, {"": "cuda:0"}),
        (PAIR, {"device_map": "auto"}, "auto"),
        (PAIR, {"use_multi_gpu": True}, "balanced"),
        (PAIR, {"use_multi_gpu": True, "device_map": "auto"}, "auto"),
        (PAIR, {"use_multi_gpu": False}, {"": "cuda:0"}),
        (TPU, {"use_tpu": True, "tpu_cores": 4}, None),
    ],
)
def test_placement(device, options, expected):
    assert resolve_placement(device, **options) == expected


def test_each_process_of_a_launch_takes_its_own_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = dataclasses.replace(PAIR, index=1)
    for options in ({}, {"device_map": "auto"}, {"use_multi_gpu": True}, {"weight_bytes": 900 * GIB}):
        assert resolve_placement(second, **options) == {"": "cuda:1"}
    with pytest.raises(UnsupportedError, match="max_memory"):
        resolve_placement(second, max_memory={0: "10GB"})


@pytest.mark.parametrize(
    ("device", "options", "error"),
    [
        (H100, {"use_multi_gpu": True}, UnsupportedError),
        (CPU, {"use_multi_gpu": True}, UnsupportedError),
        (CPU, {"max_memory": {0: "1GB"}}, UnsupportedError),
        (CPU, {"device_map": "cuda:0"}, UnsupportedError),
        (H100, {"device_map": "clever"}, ConfigError),
        (H100, {"device_map": {"model": "gpu"}}, ConfigError),
        (TPU, {"use_tpu": False}, ConflictError),
        (TPU, {"tpu_cores": 3}, UnsupportedError),
        (CPU, {"tpu_cores": 4}, UnsupportedError),
    ],
)
def test_placements_that_cannot_be(device, options, error):
    with pytest.raises(error):
        resolve_placement(device, **options)


@pytest.mark.parametrize(
    ("family", "wanted", "length", "maximum", "kind"),
    [
        ("llama", 4096, 4096, 4096, "linear"),
        ("llama", 1024, 1024, 2048, "default"),
        ("llama", None, 2048, 2048, "default"),
        ("gpt_oss", 262144, 262144, 262144, "yarn"),
        ("bloom", 4096, 4096, None, None),
        ("bloom", None, 2048, None, None),
    ],
)
def test_length(family, wanted, length, maximum, kind):
    config = AutoConfig.for_model(family)
    assert extend_context(config, wanted) == length
    assert getattr(config, "max_position_embeddings", None) == maximum
    assert (getattr(config, "rope_parameters", None) or {}).get("rope_type") == kind


def test_default_length_is_capped_by_the_model():
    config = AutoConfig.for_model("llama", max_position_embeddings=512)
    assert extend_context(config, DEFAULT_MAX_SEQ_LENGTH) == 512
    assert extend_context(AutoConfig.for_model("mistral"), DEFAULT_MAX_SEQ_LENGTH) == 2048
    assert config.rope_parameters["rope_type"] == "default"


def test_text_part_of_a_multimodal_model_is_extended():
    config = AutoConfig.for_model("gemma3")
    extend_context(config, 262144)
    assert config.text_config.max_position_embeddings == 262144
    assert config.text_config.rope_parameters["full_attention"]["factor"] == 2.0


@pytest.mark.parametrize(
    ("value", "error"), [(0, ConfigError), (-1, ConfigError), ("2048", ArgumentError), (True, ArgumentError)]
)
def test_bad_lengths(value, error):
    with pytest.raises(error, match="max_seq_length"):
        check_max_seq_length(value)


@pytest.mark.parametrize(
    ("family", "classifies", "expected"),
    [
        ("llama", False, "AutoModelForCausalLM"),
        ("llama", True, "AutoModelForSequenceClassification"),
        ("gemma3", False, "AutoModelForImageTextToText"),
        ("t5", False, "AutoModelForSeq2SeqLM"),
        ("whisper", False, "AutoModelForSpeechSeq2Seq"),
        ("bert", True, "AutoModelForSequenceClassification"),
    ],
)
def test_model_class(family, classifies, expected):
    found = resolve_class(
        AutoConfig.for_model(family), sequence_classification=classifies, auto_model=None, trust_remote_code=False
    )
    assert found.__name__ == expected

"""TPU support without a TPU: names, configs, how weights are divided, and the shapes of batches."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import pantheraml
from pantheraml import MultiTPUConfig
from pantheraml.errors import ConfigError, DataError, MissingDependencyError, UnsupportedError
from pantheraml.parallel import xla
from pantheraml.training.tpu import FixedShape

without_torch_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is there")


@without_torch_xla
def test_without_torch_xla_the_names_answer_and_the_setup_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"torch_xla(.*\n)*.*pip install 'pantheraml\[tpu\]'") as raised:
        pantheraml.setup_tpu_training()
    assert isinstance(raised.value, MissingDependencyError)
    assert pantheraml.is_tpu_available() is False
    assert (pantheraml.get_tpu_rank(), pantheraml.get_tpu_world_size()) == (0, 1)
    assert pantheraml.is_tpu_main_process() is True
    assert pantheraml.get_tpu_device() is None
    assert pantheraml.synchronize_tpu() is False
    assert pantheraml.optimize_tpu_memory() is False
    info = pantheraml.get_tpu_memory_info()
    assert (info["available"], info["used"], info["limit"], info["peak"]) == (False, 0, 0, 0)
    pantheraml.cleanup_multi_tpu()
    pantheraml.cleanup_tpu_training()


@without_torch_xla
def test_the_status_has_its_keys_and_counts_failed_setups():
    before = pantheraml.get_tpu_status()
    with pytest.raises(MissingDependencyError):
        pantheraml.setup_tpu_training()
    after = pantheraml.get_tpu_status()
    assert after["error_count"] == before["error_count"] + 1
    assert after["available"] is after["initialized"] is False
    assert "torch_xla" in after["error"]
    keys = ["device", "memory_info", "rank", "world_size", "is_main_process", "compiled_functions", "mesh_shape"]
    assert set(after) == {"available", "initialized", "error_count", "error", *keys}


@pytest.mark.parametrize(
    "options",
    [
        {"num_cores": 0},
        {"num_cores": 8, "mesh_shape": (2, 2)},
        {"mesh_shape": (2, 2, 2)},
        {"mesh_shape": ()},
        {"length_buckets": ()},
        {"length_buckets": (0, 8)},
        {"auto_device_map": "auto"},
        {"min_shard_elements": -1},
    ],
)
def test_a_config_that_cannot_be_honoured_raises(options):
    with pytest.raises(ConfigError):
        MultiTPUConfig(**options)


def test_a_config_keeps_what_it_was_given():
    config = MultiTPUConfig(num_cores=8, mesh_shape=[2, 4], length_buckets=[512, 128])
    assert (config.mesh_shape, config.length_buckets) == ((2, 4), (128, 512))


@pytest.mark.parametrize(
    ("shape", "mesh", "axis", "expected"),
    [
        ((1024, 512), {"fsdp": 8}, None, ("fsdp", None)),
        ((512, 1024), {"fsdp": 8}, None, (None, "fsdp")),
        ((1001, 512), {"fsdp": 8}, None, (None, "fsdp")),
        ((1001, 511), {"fsdp": 8}, None, (None, None)),
        ((16, 16), {"fsdp": 8}, None, (None, None)),
        ((65536,), {"fsdp": 8}, None, (None,)),
        ((1024, 512), {"fsdp": 1}, None, (None, None)),
        ((1024, 512), {"fsdp": 4, "tensor": 2}, 0, ("tensor", "fsdp")),
        ((1024, 512), {"fsdp": 4, "tensor": 2}, 1, ("fsdp", "tensor")),
        ((1024, 512), {"fsdp": 4, "tensor": 2}, None, ("fsdp", None)),
        ((64, 1024, 512), {"fsdp": 8}, None, (None, "fsdp", None)),
        # What is too small for fsdp still follows the features of its layer.
        ((16, 16), {"fsdp": 4, "tensor": 2}, 1, (None, "tensor")),
    ],
)
def test_how_a_weight_is_divided(shape, mesh, axis, expected):
    assert xla.shard_spec(shape, mesh, 4096, axis) == expected


@pytest.mark.parametrize(
    ("shape", "mesh", "expected"),
    [
        ((1024, 512), {"fsdp": 4, "tensor": 2}, (("fsdp", "tensor"), None)),
        ((1004, 512), {"fsdp": 4, "tensor": 2}, ("tensor", "fsdp")),
        ((1001, 512), {"fsdp": 4, "tensor": 2}, (None, "fsdp")),
        ((1024, 512), {"fsdp": 8, "tensor": 1}, ("fsdp", None)),
    ],
)
def test_a_vocabulary_is_divided_over_all_devices(shape, mesh, expected):
    assert xla.vocabulary_spec(shape, mesh, 4096) == expected


def test_tensor_axes_are_those_of_the_architecture():
    plan = {"layers.*.self_attn.q_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    assert xla._tensor_axis("base_model.model.model.layers.3.self_attn.q_proj.base_layer.weight", plan) == 0
    assert xla._tensor_axis("model.layers.0.mlp.down_proj.weight", plan) == 1
    assert xla._tensor_axis("model.layers.0.mlp.gate_proj.weight", plan) is None
    # An adapter is divided where it meets the features that its layer divides.
    assert xla._tensor_axis("model.layers.0.self_attn.q_proj.lora_A.default.weight", plan) is None
    assert xla._tensor_axis("model.layers.0.self_attn.q_proj.lora_B.default.weight", plan) == 0
    assert xla._tensor_axis("base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight", plan) == 1
    assert xla._tensor_axis("model.layers.0.mlp.down_proj.lora_B.default.weight", plan) is None
    assert xla._tensor_axis("model.layers.0.self_attn.q_proj.bias", plan) is None


def collate(rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [9] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def test_batches_have_the_next_of_the_lengths_and_all_rows():
    fixed = FixedShape(collate, (4, 8), rows=3, pad_token_id=7)
    small, large = fixed([[1, 2], [3]]), fixed([[1, 2, 3, 4, 5]])
    assert {tuple(value.shape) for value in small.values()} == {(3, 4)}
    assert {tuple(value.shape) for value in large.values()} == {(3, 8)}
    assert small["input_ids"].tolist() == [[1, 2, 7, 7], [3, 9, 7, 7], [7] * 4]
    assert small["labels"].tolist() == [[1, 2, -100, -100], [3, -100, -100, -100], [-100] * 4]
    assert small["attention_mask"].sum() == 3
    with pytest.raises(DataError, match="9 tokens"):
        fixed([[1] * 9])


def test_the_first_token_of_a_packed_document_has_no_label():
    def packed(rows):
        batch = collate(rows)
        return batch | {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}

    batch = FixedShape(packed, (8,), rows=1, pad_token_id=0)([[1, 2, 3, 4, 5]])
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5, -100, -100, -100]]


def test_a_batch_of_something_else_than_tokens_is_refused():
    fixed = FixedShape(lambda rows: collate(rows) | {"pixel_values": torch.zeros(1, 3, 8, 8)}, (8,), 1, 0)
    with pytest.raises(UnsupportedError, match="pixel_values"):
        fixed([[1, 2]])

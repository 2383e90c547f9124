"""The public names on XLA devices: setup, facts, meshes, loading, and what is refused."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
import torch_xla
from trl import SFTTrainer

import pantheraml
from pantheraml import MultiTPUConfig, PantheraMLTPUTrainer, log, xla_runtime
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, NonFiniteError, UnsupportedError
from pantheraml.parallel import xla

from .support import Recorder, arguments, load, ragged, record_batches, reference, trained

CORES = xla_runtime.device_count()


def test_setup_is_idempotent_and_tells_the_truth():
    pantheraml.cleanup_tpu_training()
    pantheraml.cleanup_tpu_training()
    assert pantheraml.get_tpu_status()["initialized"] is False
    children = psutil.Process().children()
    config = pantheraml.setup_tpu_training(MultiTPUConfig(num_cores=CORES))
    assert pantheraml.setup_tpu_training() is config
    assert pantheraml.setup_multi_tpu(MultiTPUConfig(num_cores=CORES)) is config
    assert (pantheraml.get_tpu_rank(), pantheraml.get_tpu_world_size()) == (0, CORES)
    assert pantheraml.is_tpu_main_process()
    assert pantheraml.synchronize_tpu() is True
    assert pantheraml.optimize_tpu_memory() is True
    status = pantheraml.get_tpu_status()
    assert (status["available"], status["initialized"], status["world_size"]) == (True, True, CORES)
    assert status["mesh_shape"] == {"fsdp": CORES, "tensor": 1}
    torch.ones(3, device=pantheraml.get_tpu_device()).sum().item()
    assert pantheraml.get_tpu_status()["compiled_functions"] > 0
    info = pantheraml.get_tpu_memory_info()
    # torch_xla's CPU backend keeps no count of its memory.
    assert info["available"] is False
    assert "CPU" in info["error"]
    with pantheraml.tpu_context() as inside:
        assert inside is config
    assert pantheraml.get_tpu_status()["initialized"] is False
    assert psutil.Process().children() == children


def test_one_warning_says_that_this_is_experimental(monkeypatch, caplog):
    monkeypatch.setattr(log, "_told", set())
    for _ in range(3):
        pantheraml.cleanup_tpu_training()
        pantheraml.setup_tpu_training()
    assert [record.levelname for record in caplog.records if "experimental" in record.message] == ["WARNING"]


def test_memory_is_told_where_the_backend_counts_it(monkeypatch, tiny_llama_dir, tmp_path, caplog):
    figures = {"bytes_used": 2**30, "bytes_limit": 16 * 2**30, "peak_bytes_used": 3 * 2**30}
    # What torch_xla answers on a TPU.
    monkeypatch.setattr("torch_xla.core.xla_model.get_memory_info", lambda device: dict(figures))
    info = pantheraml.get_tpu_memory_info()
    assert (info["available"], info["rank"], info["world_size"]) == (True, 0, CORES)
    assert (info["used"], info["limit"], info["peak"]) == tuple(figures.values())
    assert pantheraml.get_tpu_status()["memory_info"] == info
    model, tokenizer = load(tiny_llama_dir)
    data = {"train_dataset": ragged(16), "processing_class": tokenizer}
    trainer = PantheraMLTPUTrainer(model=model, args=arguments(tmp_path), **data)
    row = trainer.get_model_memory_usage()["tpu_core"]
    assert (row["used"], row["limit"], row["peak"]) == (1, 16, 3)
    trainer.print_memory_stats()
    assert "1.00 GiB used, 3.00 at most, of 16.00" in caplog.text


def test_a_mesh_has_the_shape_that_was_asked_for_or_raises():
    with pytest.raises(ConfigError, match=f"there are {CORES}"):
        pantheraml.setup_tpu_training(MultiTPUConfig(num_cores=CORES + 1))
    shape = (CORES // 4, 4) if CORES > 1 else (1, 1)
    pantheraml.setup_tpu_training(MultiTPUConfig(num_cores=CORES, mesh_shape=shape, min_shard_elements=1024))
    assert tuple(xla.current_mesh().shape.values()) == shape


def test_loading_divides_weights_and_keeps_the_dtype(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, dtype=None)
    assert {p.device.type for p in model.parameters()} == {"xla"}
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert not {"XLA_USE_BF16", "XLA_DOWNCAST_BF16"} & set(os.environ)
    divided = [p for p in base if xla_runtime.sharding(p)]
    assert len(divided) == (sum(p.numel() >= 1024 for p in base) if CORES > 1 else 0)
    assert {entry.implementation for entry in model.base_model.model.adapt_report.swapped} == {"linear_cross_entropy"}


def test_the_default_of_4_bit_weights_is_16_bit_here_which_is_said(tiny_llama_dir, caplog):
    from pantheraml import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), use_tpu=True)
    assert "4-bit weights are not available on xla: loaded in 16 bit" in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_xla_devices_cannot_do_is_refused(tiny_llama_dir, tmp_path):
    from pantheraml import FastLanguageModel

    quantised = ({"load_in_4bit": True}, {"load_in_8bit": True}, {"quantization_config": {"load_in_4bit": True}})
    for options in (*quantised, {"use_tpu": False}):
        with pytest.raises((UnsupportedError, ConflictError)):
            FastLanguageModel.from_pretrained(str(tiny_llama_dir), **{"load_in_4bit": False, **options})
    model, tokenizer = load(tiny_llama_dir)
    data = {"train_dataset": ragged(16), "processing_class": tokenizer}
    for options in ({"optim": "adamw_8bit"}, {"optim": "adamw_torch_fused"}, {"fp16": True}, {"bf16": True}):
        with pytest.raises((UnsupportedError, ImportError)):
            SFTTrainer(model=model, args=arguments(tmp_path, **options), **data)
    with pytest.raises(ArgumentError, match="MultiTPUConfig"):
        PantheraMLTPUTrainer(model=model, args=arguments(tmp_path), tpu_config={"num_cores": 8}, **data)


def test_a_mesh_with_a_tensor_axis_trains_as_plain_torch(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    pantheraml.cleanup_tpu_training()
    shape = (CORES // 2, 2) if CORES > 1 else (1, 1)
    config = MultiTPUConfig(mesh_shape=shape, min_shard_elements=2048, use_gradient_checkpointing=False)
    pantheraml.setup_tpu_training(config)
    batches = record_batches(monkeypatch)
    model, tokenizer = load(tiny_llama_dir)
    start = dict(zip(model.state_dict(), xla_runtime.read(list(model.state_dict().values())), strict=True))
    start = {name: value.clone() for name, value in start.items()}
    args = arguments(tmp_path, per_device_train_batch_size=8 // shape[0], max_steps=10, gradient_accumulation_steps=2)
    trainer = PantheraMLTPUTrainer(
        model=model, args=args, train_dataset=ragged(), processing_class=tokenizer, tpu_config=config
    )
    recorder = Recorder(trainer)
    trainer.train()
    assert {batch["input_ids"].shape[0] for batch in batches} == {8}
    losses, weights = reference(start, batches, args)
    torch.testing.assert_close(recorder.losses, losses, rtol=0, atol=1e-5)
    for name, weight in trained(model).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4, msg=name)
    if CORES > 1:
        held = shares(model)
        attention, mlp = "self_attn.{}.base_layer.weight", "mlp.{}.base_layer.weight"
        for name in (
            *map(attention.format, ("q_proj", "k_proj", "v_proj")),
            *map(mlp.format, ("gate_proj", "up_proj")),
        ):
            assert held[name] == (1 / 2, 1 / shape[0]), name
        for name in (attention.format("o_proj"), mlp.format("down_proj")):
            assert held[name] == (1 / shape[0], 1 / 2), name
        # Adapters are divided as the features that they meet, and no further.
        assert held["mlp.gate_proj.lora_A.default.weight"] == held["mlp.down_proj.lora_B.default.weight"] == (1, 1)
        assert held["mlp.gate_proj.lora_B.default.weight"] == (1 / 2, 1)
        assert held["mlp.down_proj.lora_A.default.weight"] == (1, 1 / 2)
        assert held["embed_tokens.weight"] == (1 / CORES, 1)
    assert trainer.get_model_memory_usage()["tpu_core"]["world_size"] == CORES
    assert trainer.get_performance_metrics()["executions"] > 10
    trainer.print_memory_stats()
    assert f"core 0 of {CORES}" in capsys.readouterr().err
    trainer.cleanup()


@pytest.mark.skipif("CORES == 1", reason="one device is not divided")
def test_a_tensor_axis_that_divides_heads_is_told(tiny_llama_dir, monkeypatch, caplog):
    monkeypatch.setattr(log, "_told", set())
    pantheraml.setup_tpu_training(MultiTPUConfig(mesh_shape=(CORES // 4, 4)))
    load(tiny_llama_dir)
    assert "divides 2 key and value heads by 4" in caplog.text


def shares(model):
    """Of the first layer's weights, and the embedding's, the part that a device holds along each axis."""
    held = {}
    for name, weight in model.named_parameters():
        if ".layers.0." in name or "embed_tokens" in name:
            part = torch_xla._XLAC._get_local_shards([weight])[0][0][0]
            short = name.rpartition("layers.0.")[2].removeprefix("base_model.model.model.")
            held[short] = tuple(p / whole for p, whole in zip(part.shape, weight.shape, strict=True))
    return held


def test_a_step_that_is_not_finite_changes_nothing(tiny_llama_dir, tmp_path):
    model, tokenizer = load(tiny_llama_dir)
    args = arguments(tmp_path, max_steps=6, logging_steps=6)
    trainer = SFTTrainer(model=model, args=args, train_dataset=ragged(), processing_class=tokenizer)
    step, weights = trainer.training_step, []

    def breaking(*args, **kwargs):
        if trainer.state.global_step == 3:
            weights.append(trained(model))
            with torch.no_grad():
                broken = next(p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad)
                broken.register_hook(lambda grad: grad * float("nan"))
        return step(*args, **kwargs)

    trainer.training_step = breaking
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.train()
    for name, weight in trained(model).items():
        torch.testing.assert_close(weight, weights[0][name], rtol=0, atol=0, msg=name)

"""The public names on XLA devices: setup, facts, meshes, loading, and what is refused."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from trl import SFTTrainer

import pantheraml
from pantheraml import MultiTPUConfig, PantheraMLTPUTrainer, log, xla_runtime
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, NonFiniteError, UnsupportedError
from pantheraml.parallel import xla

from .support import Recorder, arguments, load, ragged, trained

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


def test_a_mesh_with_a_tensor_axis_trains_alike(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "logging_steps": 5}
    results = []
    for shape in ((CORES, 1), (CORES // 4 or 1, 4 if CORES > 1 else 1)):
        pantheraml.cleanup_tpu_training()
        config = MultiTPUConfig(mesh_shape=shape, min_shard_elements=1024, use_gradient_checkpointing=False)
        pantheraml.setup_tpu_training(config)
        model, tokenizer = load(tiny_llama_dir)
        args = arguments(tmp_path, per_device_train_batch_size=8 // shape[0], **options)
        trainer = PantheraMLTPUTrainer(
            model=model, args=args, train_dataset=ragged(), processing_class=tokenizer, tpu_config=config
        )
        recorder = Recorder(trainer)
        trainer.train()
        results.append((recorder.losses, trained(model)))
        spec = xla_runtime.sharding(model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight)
        assert bool(spec) is (CORES > 1)
    assert trainer.get_model_memory_usage()["tpu_core"]["world_size"] == CORES
    assert trainer.get_performance_metrics()["executions"] > 10
    trainer.print_memory_stats()
    assert f"core 0 of {CORES}" in capsys.readouterr().err
    (losses, weights), (others, other_weights) = results
    torch.testing.assert_close(losses, others, rtol=0, atol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=1e-4, msg=name)
    trainer.cleanup()


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

"""Several GPUs as a user meets them: the names, and the example under torchrun. See ``distributed`` for the numbers."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pantheraml
from pantheraml import distributed
from pantheraml.trainer import PantheraMLDistributedTrainer

ROOT = Path(__file__).parents[1]
NAMES = [
    "MultiGPUConfig",
    "all_reduce_scalar",
    "barrier",
    "broadcast_object",
    "cleanup_distributed_training",
    "cleanup_multi_gpu",
    "create_device_map",
    "distributed_context",
    "get_local_rank",
    "get_optimal_device_map",
    "get_rank",
    "get_sampler_for_distributed",
    "get_world_size",
    "is_distributed_available",
    "is_main_process",
    "setup_distributed_training",
    "setup_multi_gpu",
    "wrap_model_for_distributed",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_same_at_both_paths(name):
    assert getattr(pantheraml, name) is getattr(distributed, name)
    assert name in pantheraml.__all__


def test_options_have_the_documented_names_and_defaults():
    config = vars(distributed.MultiGPUConfig())
    assert config == {
        "backend": None,
        "init_method": None,
        "timeout_minutes": 30,
        "auto_device_map": True,
        "tensor_parallel": False,
        "pipeline_parallel": False,
        "use_gradient_checkpointing": True,
        "find_unused_parameters": False,
        "num_gpus": None,
        "strategy": "auto",
        "shard_size": None,
        "context_parallel": 1,
    }
    options = inspect.signature(PantheraMLDistributedTrainer).parameters
    assert options["multi_gpu_config"].default is None
    assert options["auto_setup_distributed"].default is True
    for name in ("use_multi_gpu", "auto_device_map", "max_memory", "device_map"):
        for loader in (pantheraml.FastLanguageModel, pantheraml.FastModel, pantheraml.FastVisionModel):
            assert name in inspect.signature(loader.from_pretrained).parameters


DEVICES = [pytest.param("cpu", id="gloo"), pytest.param("gpu", id="nccl", marks=pytest.mark.gpu)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", DEVICES)
def test_the_example_trains_sharded_over_two_processes_and_saves_once(device, tmp_path):
    if device == "gpu" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and this host has {torch.cuda.device_count()}")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["PANTHERAML_DEVICE"] = "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "examples" / "multi_gpu_training.py"), "--advanced", "--strategy", "fsdp", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("trained on 2 process(es)") == 1
    assert done.stderr.count("the model is sharded over 2 ranks") == 1
    assert done.stderr.count("memory in GiB") == 1
    adapter = load_file(tmp_path / "multi-gpu" / "adapter" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)

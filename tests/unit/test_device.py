"""Device detection, the environment reader and what the package root exports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pantheraml import device, env, errors

FIELDS = {"type", "torch_type", "index", "count", "name", "capability", "memory", "bfloat16", "float16", "float8"}


@pytest.fixture
def fresh(monkeypatch):
    """Detection without the cached record, and without any wish from the environment."""
    for name in ("PANTHERAML_DEVICE", "PANTHERAML_DEVICE_TYPE", "PJRT_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    device.get_device.cache_clear()
    yield monkeypatch
    device.get_device.cache_clear()


def test_a_bare_machine_is_a_cpu(fresh):
    fresh.setattr(device, "_available", lambda: dict.fromkeys(device.TYPES, False) | {"cpu": True})
    fresh.setattr(device, "_xla_hardware_present", lambda: False)
    found = device.get_device()
    assert (found.type, found.torch_type, found.count, found.is_gpu) == ("cpu", "cpu", 1, False)
    assert set(type(found).__slots__) == FIELDS
    assert str(found.torch_device) == "cpu"


def test_a_gpu_host_with_torch_xla_installed_stays_a_gpu_host(fresh):
    fresh.setattr(device, "_available", lambda: dict.fromkeys(device.TYPES, False) | {"cuda": True, "cpu": True})
    fresh.setattr(device, "is_installed", lambda package: True)
    fresh.setattr(device, "_xla_hardware_present", lambda: True)
    fresh.setattr(device, "_describe", lambda kind: kind)
    assert device.get_device() == "cuda"


def test_pjrt_device_asks_for_xla_only_where_torch_xla_is_installed(fresh):
    fresh.setattr(device, "_describe", lambda kind: kind)
    fresh.setenv("PJRT_DEVICE", "CPU")
    fresh.setattr(device, "is_installed", lambda package: package == "torch_xla")
    assert device.get_device() == "xla"
    device.get_device.cache_clear()
    fresh.setattr(device, "is_installed", lambda package: False)
    fresh.setattr(device, "_available", lambda: dict.fromkeys(device.TYPES, False) | {"cpu": True})
    assert device.get_device() == "cpu"


def test_the_environment_forces_a_device(fresh):
    fresh.setenv("PANTHERAML_DEVICE_TYPE", "CPU")
    fresh.setattr(device, "_available", lambda: dict.fromkeys(device.TYPES, True))
    assert device.get_device().type == "cpu"


def test_an_unknown_device_is_refused_with_the_choices(fresh):
    fresh.setenv("PANTHERAML_DEVICE", "quantum")
    with pytest.raises(errors.ConfigError, match="quantum") as caught:
        device.get_device()
    assert "xpu" in str(caught.value)


def test_a_device_that_is_absent_is_refused_not_replaced(fresh):
    fresh.setenv("PANTHERAML_DEVICE", "xpu")
    fresh.setattr(device, "_available", lambda: dict.fromkeys(device.TYPES, False) | {"cpu": True})
    with pytest.raises(errors.UnsupportedError, match="xpu"):
        device.get_device()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (5, 1, 8)),
        # A batch script that did not use srun is one process, whatever the allocation holds.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),
        ({"WORLD_SIZE": "not a number"}, (0, 0, 1)),
    ],
    ids=["alone", "torchrun", "srun", "sbatch", "garbage"],
)
def test_ranks_come_from_the_launcher(monkeypatch, variables, expected):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (env.rank(), env.local_rank(), env.world_size()) == expected


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(device, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"pantheraml\[gpu\]"):
        device.require("bitsandbytes", what="4-bit loading")


def test_errors_say_what_where_why_and_what_next():
    error = errors.ConfigError("no such rank", where="argument r", why="r is -1", hint="give a positive r")
    assert isinstance(error, ValueError)
    assert str(error).splitlines() == [
        "no such rank",
        "  where: argument r",
        "  why:   r is -1",
        "  next:  give a positive r",
    ]
    assert "load_in_4bit" in str(errors.unknown_arguments(["load_in_4bits"], ["load_in_4bit", "dtype"], where="f"))


ROOT_SCRIPT = """
import sys
for blocked in {blocked!r}:
    sys.modules[blocked] = None
import pantheraml
assert not {{"torch", "numpy", "transformers", "peft", "trl", "accelerate", "datasets"}} & set(sys.modules)
assert pantheraml.DEVICE_TYPE in ("cpu", "cuda", "hip", "xpu", "mps", "xla")
assert pantheraml.DEVICE_COUNT >= 1
assert pantheraml.is_bf16_supported() == pantheraml.is_bfloat16_supported()
properties, peak, total = pantheraml.get_gpu_memory_stats()
assert total > 0 and peak >= 0
pantheraml.clear_gpu_memory()
"""


def test_import_is_light_and_needs_no_optional_package():
    script = ROOT_SCRIPT.format(blocked=["triton", "bitsandbytes", "xformers", "torch_xla", "gguf"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_every_public_name_resolves():
    import pantheraml

    for name in pantheraml.__all__:
        assert getattr(pantheraml, name) is not None, name

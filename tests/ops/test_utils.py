"""Launch settings, row layouts, and the memory and cache helpers."""

from __future__ import annotations

import importlib

import psutil
import pytest
import torch

from pantheraml import device as devices
from pantheraml import xla_runtime
from pantheraml.device import Device
from pantheraml.errors import ConfigError, UnsupportedError
from pantheraml.kernels import memory, utils

glu_module = importlib.import_module("pantheraml.kernels.glu")
KEYS = {"device_type", "available", "allocated", "reserved", "max_allocated", "free", "total"}
MIB = 1 << 20


@pytest.mark.parametrize("width", [1, 2, 7, 64, 128, 1000, 2048, 2304, 4096, 16384, 65536])
def test_launch_settings(width):
    settings = utils.launch_settings(width)
    assert width <= settings.block < 2 * width
    assert settings.block & (settings.block - 1) == 0
    assert settings.rows == 1 or settings.rows * settings.block <= utils.SHORT_TILE
    assert settings.num_warps in (1, 2, 4, 8, 16, 32)


def test_launch_settings_fit_warps_of_64_lanes():
    assert utils.launch_settings(65536, lanes=32).num_warps == 32
    assert utils.launch_settings(65536, lanes=64).num_warps == 16


def test_launch_settings_refuse_what_no_program_holds():
    with pytest.raises(UnsupportedError, match="65537 elements are too wide"):
        utils.launch_settings(65537)


ROWS = {
    "contiguous": (torch.empty(2, 3, 8), True),
    "vector": (torch.empty(8), True),
    "packed-heads": (torch.empty(2, 3, 48)[..., 8:32].unflatten(-1, (3, 8)), True),
    "broadcast": (torch.empty(1, 8).expand(5, 8), True),
    "transposed": (torch.empty(2, 3, 4, 8)[:, :2].transpose(1, 2), False),
    "column-major": (torch.empty(8, 6).t(), False),
}


@pytest.mark.parametrize(("x", "in_place"), ROWS.values(), ids=ROWS.keys())
def test_rows_address_every_element(x, in_place):
    x.copy_(torch.arange(x.numel()).reshape(x.shape)) if 0 not in x.stride() else x[0].copy_(torch.arange(8))
    rows = utils.as_rows(x)
    assert (rows.tensor.data_ptr() == x.data_ptr()) == in_place
    starts = [(r // rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride for r in range(rows.count)]
    flat = torch.as_strided(rows.tensor, (max(starts) + x.shape[-1],), (1,), rows.tensor.storage_offset())
    seen = torch.stack([flat[s : s + x.shape[-1]] for s in starts])
    assert torch.equal(seen, x.reshape(-1, x.shape[-1]))


def test_the_packages_allocations_are_poisoned_here():
    buffer, _ = glu_module._buffer(torch.zeros(2, 4), 4, None)
    assert buffer.isnan().all()


def test_cpu_memory_is_real():
    before = memory.get_device_memory_info("cpu")
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    after = memory.get_device_memory_info("cpu")
    assert set(after) == KEYS
    assert after["available"] is True
    assert after["allocated"] - before["allocated"] > 32 * MIB
    assert after["max_allocated"] >= after["allocated"] - MIB
    assert after["total"] == psutil.virtual_memory().total
    assert 0 < after["free"] <= after["total"]
    del held


@pytest.mark.parametrize("kind", ["cuda", "gpu", "hip", "rocm", "xpu", "xla", "tpu", "mps"])
def test_absent_devices_have_the_same_keys_and_do_not_raise(kind, monkeypatch):
    monkeypatch.setattr(memory, "_accelerator", lambda: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "is_installed", lambda package: package != "torch_xla")
    info = memory.get_device_memory_info(kind)
    assert set(info) == KEYS | {"error"}
    assert info["available"] is False
    assert not any(info[name] for name in memory.FIGURES)


def test_unknown_device_type():
    with pytest.raises(ConfigError, match="unknown device type 'npu'"):
        memory.get_device_memory_info("npu")


def test_helpers_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(memory, "_accelerator", lambda: None)
    monkeypatch.setattr(devices, "is_installed", lambda package: False)
    info = memory.get_gpu_memory_info(3)
    assert info["available"] is False
    assert (info["device"], info["allocated"], info["reserved"], info["max_allocated"]) == (3, 0, 0, 0)
    tpu = memory.get_tpu_memory_info()
    assert tpu["available"] is False
    assert "torch_xla" in tpu["error"]
    assert (tpu["used"], tpu["limit"], tpu["peak"]) == (0, 0, 0)
    assert memory.get_current_gpu_index() == 0
    memory.set_gpu_device(1)
    memory.clear_gpu_cache()
    memory.optimize_tpu_memory()


class FakeGpus:
    """Two GPUs with figures of their own, as torch.cuda presents them."""

    def __init__(self):
        self.current, self.emptied = 0, 0

    def device_count(self):
        return 2

    def current_device(self):
        return self.current

    def set_device(self, index):
        self.current = index

    def memory_allocated(self, index):
        return (index + 1) * 10

    def memory_reserved(self, index):
        return (index + 1) * 20

    def max_memory_allocated(self, index):
        return (index + 1) * 15

    def mem_get_info(self, index):
        return (index + 1) * 50, (index + 1) * 100

    def empty_cache(self):
        self.emptied += 1


def test_several_gpus(monkeypatch):
    gpus = FakeGpus()
    monkeypatch.setattr(memory, "_accelerator", lambda: ("cuda", gpus))
    expected = {"allocated": 20, "reserved": 40, "max_allocated": 30, "free": 100, "total": 200}
    assert memory.get_gpu_memory_info(1) == {"device_type": "cuda", "available": True, "device": 1, **expected}
    memory.set_gpu_device(1)
    assert memory.get_current_gpu_index() == 1
    assert memory.get_device_memory_info("cuda") == {"device_type": "cuda", "available": True, **expected}
    memory.clear_gpu_cache()
    assert gpus.emptied == 1
    for call in (memory.get_gpu_memory_info, memory.set_gpu_device):
        with pytest.raises(ConfigError, match="there is no GPU 2"):
            call(2)


def fake_xla(monkeypatch, figures):
    """An XLA device whose backend answers ``figures``."""
    synced = []
    monkeypatch.setattr(xla_runtime, "memory", lambda: figures)
    monkeypatch.setattr(xla_runtime, "kind", lambda: "FAKE")
    monkeypatch.setattr(xla_runtime, "process_index", lambda: 3)
    monkeypatch.setattr(xla_runtime, "process_count", lambda: 4)
    monkeypatch.setattr(xla_runtime, "sync", lambda *, wait=False: synced.append(wait))
    record = Device("xla", "cpu", 0, 4, "fake", None, None, True, False, False)
    monkeypatch.setattr(devices, "get_device", lambda: record)
    monkeypatch.setattr(devices, "is_installed", lambda package: True)
    return synced


def test_tpu_figures(monkeypatch):
    synced = fake_xla(monkeypatch, {"used": 7, "limit": 100, "peak": 9})
    info = memory.get_tpu_memory_info()
    assert (info["used"], info["limit"], info["peak"], info["available"]) == (7, 100, 9, True)
    assert (info["rank"], info["world_size"]) == (3, 4)
    common = memory.get_device_memory_info()
    assert set(common) == KEYS
    assert (common["device_type"], common["allocated"], common["free"], common["max_allocated"]) == ("xla", 7, 93, 9)
    memory.optimize_tpu_memory()
    assert synced == [True]


def test_xla_device_that_keeps_no_count(monkeypatch):
    fake_xla(monkeypatch, None)
    for info in (memory.get_tpu_memory_info(), memory.get_device_memory_info("tpu")):
        assert info["available"] is False
        assert "keeps no count" in info["error"]


@pytest.mark.gpu
def test_gpu_figures_move(gpu):
    before = memory.get_gpu_memory_info()
    held = torch.ones(100 * MIB, dtype=torch.uint8, device=gpu)
    after = memory.get_gpu_memory_info(memory.get_current_gpu_index())
    assert after["allocated"] - before["allocated"] == held.numel()
    assert after["max_allocated"] >= after["allocated"]
    assert memory.get_device_memory_info()["allocated"] == after["allocated"]
    del held
    memory.clear_gpu_cache()
    assert memory.get_gpu_memory_info()["reserved"] < after["reserved"]

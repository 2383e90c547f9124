"""Kernel tests run the same bodies on a GPU, or on a CPU in Triton's interpreter where no GPU is."""

from __future__ import annotations

import sys

import pytest
import torch

from . import support

HAS_GPU = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())

if not HAS_GPU:
    support.interpret_kernels()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], ids=["interpreter", "gpu"])
def device(request) -> torch.device:
    """The device on which the Triton kernels of this test run."""
    if request.param == "gpu":
        if not HAS_GPU:
            pytest.skip("no GPU here")
        return torch.device("cuda" if torch.cuda.is_available() else "xpu")
    if HAS_GPU:
        pytest.skip("kernels are compiled here, not interpreted; run with -m gpu")
    return torch.device("cpu")


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for tests that only make sense there (mark them ``gpu``)."""
    if not HAS_GPU:
        pytest.skip("no GPU here")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("pantheraml.") and tensor.device.type != "meta":
            support.poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poison_allocations(monkeypatch):
    """Memory that the package allocates without filling it holds NaN, so that reading it before writing shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))

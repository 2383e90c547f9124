"""Which implementation serves a tensor, and that requests are honoured or refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pantheraml.kernels as kernels
from pantheraml import log
from pantheraml.errors import ConfigError, MissingDependencyError, UnsupportedError
from pantheraml.kernels import _triton, dispatch


class Somewhere:
    """Stands in for a tensor on a device that is not here."""

    def __init__(self, device="cuda:0", dtype=torch.float16):
        self.device, self.dtype = torch.device(device), dtype


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(log, "info", messages.append)
    monkeypatch.setattr(log, "_told", set())
    return messages


@pytest.fixture
def _compiled(monkeypatch):
    """As on a host with Triton and no interpreter."""
    monkeypatch.setattr(_triton, "AVAILABLE", True)
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_capability", lambda index: (8, 0))


@pytest.mark.usefixtures("_compiled")
def test_auto(told):
    assert dispatch.resolve("op", Somewhere("cuda:0")) == "triton"
    assert dispatch.resolve("op", Somewhere("xpu:0")) == "triton"
    for device in ("cpu", "meta", "mps", "xla"):
        assert dispatch.resolve("op", Somewhere(device)) == "reference"
    assert told == []


@pytest.mark.usefixtures("_compiled")
def test_auto_tells_once_when_a_gpu_tensor_goes_to_the_reference(told, monkeypatch):
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    for _ in range(2):
        assert dispatch.resolve("rms_norm", Somewhere()) == "reference"
    assert told == ["rms_norm runs as eager torch: Triton is not installed"]


UNABLE = {
    "cpu": (Somewhere("cpu"), False, "the tensor is on cpu"),
    "float64": (Somewhere(dtype=torch.float64), False, "float64"),
    "fp8-on-ampere": (Somewhere(), True, "fp8 kernels need compute capability 8.9, and cuda:0 has 8.0"),
}


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("tensor", "fp8", "reason"), UNABLE.values(), ids=UNABLE.keys())
def test_explicit_triton_never_falls_back(tensor, fp8, reason, told):
    with pytest.raises(UnsupportedError, match=reason):
        dispatch.resolve("op", tensor, "triton", fp8=fp8)
    assert dispatch.resolve("op", tensor, "auto", fp8=fp8) == "reference"
    assert len(told) == (tensor.device.type != "cpu")


@pytest.mark.usefixtures("_compiled")
def test_bfloat16_needs_ampere(told, monkeypatch):
    monkeypatch.setattr(dispatch, "_capability", lambda index: (7, 5))
    assert dispatch.resolve("op", Somewhere(dtype=torch.float16)) == "triton"
    assert dispatch.resolve("op", Somewhere(dtype=torch.bfloat16)) == "reference"
    assert "bfloat16 kernels need compute capability 8.0" in told[0]
    monkeypatch.setattr(dispatch, "_capability", lambda index: None)  # ROCm
    assert dispatch.resolve("op", Somewhere(dtype=torch.bfloat16)) == "triton"


@pytest.mark.usefixtures("_compiled")
def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    with pytest.raises(MissingDependencyError, match=r"pantheraml\[gpu\]"):
        dispatch.resolve("op", Somewhere(), "triton")


def test_interpreted_kernels_serve_cpu_tensors(monkeypatch):
    monkeypatch.setattr(_triton, "AVAILABLE", True)
    monkeypatch.setattr(_triton, "interpreted", lambda: True)
    assert dispatch.resolve("op", Somewhere("cpu"), "triton") == "triton"
    assert dispatch.resolve("op", Somewhere("cpu"), "auto") == "reference"


@pytest.mark.usefixtures("_compiled")
def test_reference_on_request(monkeypatch):
    assert dispatch.resolve("op", Somewhere(), "reference") == "reference"
    monkeypatch.setenv("PANTHERAML_KERNELS", "reference")
    assert dispatch.resolve("op", Somewhere()) == "reference"
    assert dispatch.resolve("op", Somewhere(), "triton") == "triton"


@pytest.mark.usefixtures("_compiled")
def test_environment_may_insist_on_triton(monkeypatch):
    monkeypatch.setenv("PANTHERAML_KERNELS", "triton")
    assert dispatch.resolve("op", Somewhere("cpu")) == "reference"
    with pytest.raises(UnsupportedError, match="PANTHERAML_KERNELS"):
        dispatch.resolve("op", Somewhere(dtype=torch.float64))
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    with pytest.raises(MissingDependencyError, match="PANTHERAML_KERNELS"):
        dispatch.resolve("op", Somewhere("cpu"))


def test_unknown_backends(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown kernel backend 'cuda'(.|\n)*argument backend of op"):
        dispatch.resolve("op", Somewhere(), "cuda")
    monkeypatch.setenv("PANTHERAML_KERNELS", "fast")
    with pytest.raises(ConfigError, match="environment variable PANTHERAML_KERNELS"):
        dispatch.resolve("op", Somewhere())


@pytest.mark.parametrize("name", sorted(kernels._EXPORTS))
def test_exports(name):
    value = getattr(kernels, name)
    assert callable(value)
    assert value.__name__ == name
    assert name in dir(kernels)


def test_an_op_is_not_hidden_by_its_module():
    # In a child: a module that is loaded again here has compiled kernels, where other tests want interpreted ones.
    code = "from pantheraml import kernels\nimport pantheraml.kernels.layer_norm\nassert callable(kernels.layer_norm)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = kernels.softmax


IN_A_CHILD = """
import sys
sys.modules["triton"] = None
import torch
from pantheraml import kernels
from pantheraml.kernels.reference.rms_norm import rms_norm as specification
import pantheraml.kernels.rotary, pantheraml.kernels.glu, pantheraml.kernels.layer_norm
x = torch.arange(8.0).reshape(2, 4)
assert torch.equal(kernels.rms_norm(x), specification(x))
assert torch.equal(kernels.glu(x, x, backend="reference"), torch.nn.functional.silu(x) * x)
try:
    kernels.glu(x, x, backend="triton")
except ImportError as error:
    print(error)
"""


def test_everything_but_triton_works_without_triton():
    child = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    assert "Triton is not installed" in child.stdout

"""Which device this process computes on. One record, made once, read by every later choice."""

from __future__ import annotations

import functools
import gc
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import env, xla_runtime
from .errors import ConfigError, MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    import torch

_ALIASES = {"tpu": "xla", "rocm": "hip", "amd": "hip", "gpu": "cuda"}
TYPES = ("cuda", "hip", "xpu", "xla", "mps", "cpu")

INSTALL = {
    "torch_xla": xla_runtime.INSTALL,
    "bitsandbytes": "pip install 'pantheraml[gpu]'",
    "triton": "pip install 'pantheraml[gpu]'",
    "xformers": "pip install 'pantheraml[xformers]'",
    "gguf": "pip install 'pantheraml[gguf]'",
    "torchao": "pip install 'pantheraml[torchao]'",
    "compressed_tensors": "pip install 'pantheraml[compressed-tensors]'",
    "lm_eval": "pip install 'pantheraml[eval]'",
}


@dataclass(frozen=True, slots=True)
class Device:
    """The accelerator of this process.

    Attributes:
        type: ``cuda``, ``hip`` (ROCm), ``xpu``, ``xla`` (TPU), ``mps`` or ``cpu``.
        torch_type: The device type as torch spells it; ``cuda`` for ROCm too.
        index: Index of this process's device on its host (the local rank under a launcher).
        count: Devices of this type that are visible to the process; 1 on a CPU.
        name: Marketing name, or the processor.
        capability: Compute capability as ``(major, minor)`` on NVIDIA, else None.
        memory: Bytes of device memory, or None when unknown.
        bfloat16: Whether bf16 arithmetic is native.
        float16: Whether fp16 training is usable.
        float8: Whether the matrix units take fp8.
    """

    type: str
    torch_type: str
    index: int
    count: int
    name: str
    capability: tuple[int, int] | None
    memory: int | None
    bfloat16: bool
    float16: bool
    float8: bool

    @property
    def is_gpu(self) -> bool:
        """Whether Triton kernels and bitsandbytes' GPU code can run here."""
        return self.type in ("cuda", "hip", "xpu")

    @property
    def torch_device(self) -> torch.device:
        """The ``torch.device`` on which this process places its model."""
        import torch

        return torch.device(self.torch_type, self.index) if self.type != "cpu" else torch.device("cpu")


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, *, what: str) -> Any:
    """Import an optional package, or raise naming what needs it and how to install it."""
    if not is_installed(package):
        raise MissingDependencyError(
            f"{what} needs the package {package!r}, which is not installed",
            hint=INSTALL.get(package, f"pip install {package}"),
        )
    return importlib.import_module(package)


def _requested() -> str | None:
    value = env.device()
    if value is not None:
        value = _ALIASES.get(value, value)
        if value not in TYPES:
            raise ConfigError(
                f"unknown device {value!r}",
                where="environment variable PANTHERAML_DEVICE",
                hint=f"use one of {', '.join(TYPES)} (or tpu, rocm)",
            )
        return value
    # A GPU host that happens to have torch_xla installed stays a GPU host, so only an explicit wish counts.
    if env.pjrt_device() is not None and is_installed("torch_xla"):
        return "xla"
    return None


def _available() -> dict[str, bool]:
    import torch

    cuda = torch.cuda.is_available()
    hip = cuda and torch.version.hip is not None
    return {
        "cuda": cuda and not hip,
        "hip": hip,
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }


def _xla_hardware_present() -> bool:
    return is_installed("torch_xla") and xla_runtime.chips() > 0


def _describe(kind: str) -> Device:
    import torch

    index = env.local_rank()
    if kind in ("cuda", "hip"):
        count = torch.cuda.device_count()
        index = index % max(count, 1)
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor) if kind == "cuda" else None
        return Device(
            type=kind,
            torch_type="cuda",
            index=index,
            count=count,
            name=properties.name,
            capability=capability,
            memory=properties.total_memory,
            bfloat16=capability is None or capability >= (8, 0),
            float16=True,
            float8=capability is not None and capability >= (8, 9),
        )
    if kind == "xpu":
        count = torch.xpu.device_count()
        index = index % max(count, 1)
        properties = torch.xpu.get_device_properties(index)
        return Device("xpu", "xpu", index, count, properties.name, None, properties.total_memory, True, True, False)
    if kind == "xla":
        require("torch_xla", what="the device 'xla'")
        figures = xla_runtime.memory()
        return Device(
            type="xla",
            torch_type="xla",
            index=xla_runtime.device().index or 0,
            count=xla_runtime.device_count(),
            name=f"XLA {xla_runtime.kind()}",
            capability=None,
            memory=None if figures is None else figures["limit"],
            bfloat16=True,
            float16=False,
            float8=False,
        )
    if kind == "mps":
        return Device("mps", "mps", 0, 1, "Apple GPU", None, None, True, True, False)
    import platform

    # bf16 matrix products on a CPU are correct but slower than fp32 on most parts, so fp32 is the CPU's own dtype.
    return Device("cpu", "cpu", 0, 1, platform.processor() or platform.machine(), None, None, False, False, False)


@functools.cache
def get_device() -> Device:
    """Detect the device, once.

    Order: what ``PANTHERAML_DEVICE`` asks for; XLA when ``PJRT_DEVICE`` is set and torch_xla installed; CUDA or ROCm;
    XPU; XLA when a TPU is attached; MPS; CPU.

    Raises:
        ConfigError: ``PANTHERAML_DEVICE`` names no known device.
        UnsupportedError: the device asked for is not there.
    """
    requested = _requested()
    available = _available()
    if requested is not None:
        if requested != "xla" and not available[requested]:
            raise UnsupportedError(
                f"the device {requested!r} was asked for and is not available",
                where="environment variable PANTHERAML_DEVICE",
                hint="unset it to use what is there, or see `pantheraml doctor`",
            )
        return _describe(requested)
    for kind in ("cuda", "hip", "xpu"):
        if available[kind]:
            return _describe(kind)
    if _xla_hardware_present():
        return _describe("xla")
    return _describe("mps" if available["mps"] else "cpu")


def is_bfloat16_supported() -> bool:
    """Whether this process's device computes natively in bfloat16."""
    return get_device().bfloat16


def get_gpu_memory_stats() -> tuple[Any, float, float]:
    """Return ``(properties, peak GiB reserved, total GiB)`` of the current device.

    On a CPU the properties are the ``Device`` record, and the figures are the peak resident set and the machine's RAM;
    so they are on an XLA device that does not count its memory.
    """
    import torch

    device = get_device()
    gib = 1024**3
    if device.type in ("cuda", "hip"):
        properties = torch.cuda.get_device_properties(device.index)
        return properties, torch.cuda.max_memory_reserved(device.index) / gib, properties.total_memory / gib
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device.index)
        return properties, torch.xpu.max_memory_reserved(device.index) / gib, properties.total_memory / gib
    if device.type == "xla" and (figures := xla_runtime.memory()) is not None:
        return device, figures["peak"] / gib, figures["limit"] / gib
    import psutil

    import resource  # isort: skip

    # ru_maxrss is in KiB on Linux.
    return device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / gib, psutil.virtual_memory().total / gib


def clear_gpu_memory() -> None:
    """Collect garbage and give cached device memory back to the driver."""
    import torch

    gc.collect()
    device = get_device()
    if device.type in ("cuda", "hip"):
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()

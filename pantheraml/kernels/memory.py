"""Memory figures, caches and the current index of devices of every type. The public path is ``kernels.utils``."""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import device as devices
from .. import env, log, xla_runtime
from ..errors import ConfigError

# What every memory dictionary holds beside "device_type" and "available".
FIGURES = ("allocated", "reserved", "max_allocated", "free", "total")
_SYNONYMS = {"gpu": "cuda", "tpu": "xla", "rocm": "hip"}


def _accelerator() -> tuple[str, Any] | None:
    """Type and torch module of the GPUs that torch sees, or None."""
    if torch.cuda.is_available():
        return ("hip" if torch.version.hip is not None else "cuda"), torch.cuda
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu", torch.xpu
    return None


def _info(device_type: str, figures: dict[str, int] | None, error: str | None = None) -> dict[str, Any]:
    info = {"device_type": device_type, "available": figures is not None}
    info |= figures if figures is not None else dict.fromkeys(FIGURES, 0)
    return info | ({"error": error} if error is not None else {})


def _gpu_index(device_id: int | None, module: Any) -> int:
    count = module.device_count()
    index = module.current_device() if device_id is None else device_id
    if not 0 <= index < count:
        raise ConfigError(
            f"there is no GPU {index}", where="argument device_id", hint=f"{count} visible, numbered from 0"
        )
    return index


def get_gpu_memory_info(device_id: int | None = None) -> dict[str, Any]:
    """Memory of one GPU.

    Args:
        device_id: Index among the visible GPUs; None for the current one.

    Returns:
        ``device_type``, ``available``, ``device`` (the index) and, in bytes: ``allocated`` (by tensors of this
        process), ``reserved`` (by its allocator), ``max_allocated`` (peak of the first), ``free`` and ``total`` (of the
        whole GPU, other processes counted). Without a GPU, ``available`` is False and the figures are 0.

    Raises:
        ConfigError: There are GPUs, but none of that index.
    """
    found = _accelerator()
    if found is None:
        return _info("cuda", None, "torch sees no GPU") | {"device": device_id or 0}
    kind, module = found
    index = _gpu_index(device_id, module)
    free, total = module.mem_get_info(index)
    figures = {
        "allocated": module.memory_allocated(index),
        "reserved": module.memory_reserved(index),
        "max_allocated": module.max_memory_allocated(index),
        "free": free,
        "total": total,
    }
    return _info(kind, figures) | {"device": index}


def _xla_memory() -> tuple[dict[str, int] | None, str | None]:
    """Figures of this process's XLA device as torch_xla gives them, or the reason why there are none."""
    if not devices.is_installed("torch_xla"):
        return None, "torch_xla is not installed"
    if devices.get_device().type != "xla":
        return None, f"this process computes on {devices.get_device().type}"
    figures = xla_runtime.memory()
    return figures, None if figures is not None else f"the backend {xla_runtime.kind()} keeps no count of its memory"


def get_tpu_memory_info() -> dict[str, Any]:
    """Memory of this process's first TPU core, or other XLA device.

    Returns:
        ``device``, ``rank``, ``world_size``, ``available`` and, in bytes, ``used``, ``limit`` and ``peak``. Where there
        is no such device or it keeps no count, ``available`` is False, the figures are 0 and ``error`` says why. Never
        raises off a TPU.
    """
    figures, error = _xla_memory()
    on_xla = devices.is_installed("torch_xla") and devices.get_device().type == "xla"
    info: dict[str, Any] = {
        "device": str(devices.get_device().torch_device) if on_xla else None,
        "rank": env.rank(),
        "world_size": env.world_size(),
        "available": figures is not None,
        "used": (figures or {}).get("used", 0),
        "limit": (figures or {}).get("limit", 0),
        "peak": (figures or {}).get("peak", 0),
    }
    if on_xla:
        info |= {"rank": xla_runtime.process_index(), "world_size": xla_runtime.process_count()}
    return info if error is None else info | {"error": error}


def _xla_info() -> dict[str, Any]:
    tpu = get_tpu_memory_info()
    figures = {"allocated": tpu["used"], "reserved": tpu["used"], "max_allocated": tpu["peak"]}
    figures |= {"free": tpu["limit"] - tpu["used"], "total": tpu["limit"]}
    return _info("xla", figures if tpu["available"] else None, tpu.get("error"))


def _gpu_info(kind: str) -> dict[str, Any]:
    found = _accelerator()
    if found is None or found[0] != kind:
        return _info(kind, None, f"torch sees no {kind} device")
    info = get_gpu_memory_info()
    return {name: info[name] for name in ("device_type", "available", *FIGURES)}


def _mps_info() -> dict[str, Any]:
    if not torch.backends.mps.is_available():
        return _info("mps", None, "torch sees no mps device")
    allocated, total = torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
    reserved = torch.mps.driver_allocated_memory()
    # Metal keeps no peak: what the driver holds is the most that tensors have taken since the cache was emptied.
    return _info(
        "mps",
        {
            "allocated": allocated,
            "reserved": reserved,
            "max_allocated": reserved,
            "free": total - reserved,
            "total": total,
        },
    )


def _cpu_info() -> dict[str, Any]:
    if not devices.is_installed("psutil"):
        return _info("cpu", None, "psutil is not installed")
    psutil = importlib.import_module("psutil")
    resident, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    peak = resident
    if devices.is_installed("resource"):
        resource = importlib.import_module("resource")
        # ru_maxrss is in KiB on Linux.
        peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return _info(
        "cpu",
        {
            "allocated": resident,
            "reserved": resident,
            "max_allocated": peak,
            "free": machine.available,
            "total": machine.total,
        },
    )


_READERS: dict[str, Callable[[], dict[str, Any]]] = {
    "cuda": functools.partial(_gpu_info, "cuda"),
    "hip": functools.partial(_gpu_info, "hip"),
    "xpu": functools.partial(_gpu_info, "xpu"),
    "xla": _xla_info,
    "mps": _mps_info,
    "cpu": _cpu_info,
}


def get_device_memory_info(device_type: str | None = None) -> dict[str, Any]:
    """Memory of the device, with the same keys for every type.

    Args:
        device_type: ``cuda``, ``hip``, ``xpu``, ``xla``, ``mps``, ``cpu`` (or ``gpu``, ``rocm``, ``tpu``); None for the
            device of this process.

    Returns:
        ``device_type``, ``available`` and, in bytes, ``allocated``, ``reserved``, ``max_allocated``, ``free`` and
        ``total``. On a CPU the first two are the resident set, the third its peak, and the others the machine's RAM.
        For a device that is not there, ``available`` is False, the figures are 0 and ``error`` says why.

    Raises:
        ConfigError: ``device_type`` is none of these.
    """
    kind = devices.get_device().type if device_type is None else device_type.lower()
    kind = _SYNONYMS.get(kind, kind)
    if kind == "cuda" and torch.version.hip is not None:
        kind = "hip"
    if kind not in _READERS:
        raise ConfigError(
            f"unknown device type {device_type!r}",
            where="argument device_type of get_device_memory_info",
            hint=f"use one of {', '.join((*_READERS, *_SYNONYMS))}",
        )
    return _READERS[kind]()


def clear_gpu_cache() -> None:
    """Collect garbage and give cached memory of all visible GPUs back to the driver. Without a GPU, only the first.

    torch empties the caches of all devices that this process has used, whichever is current; the others have none.
    """
    gc.collect()
    found = _accelerator()
    if found is not None:
        found[1].empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def get_current_gpu_index() -> int:
    """Index of the GPU that torch computes on by default; 0 without a GPU."""
    found = _accelerator()
    return 0 if found is None else found[1].current_device()


def set_gpu_device(device_id: int) -> None:
    """Make a GPU the one that torch computes on by default. Without a GPU, tells once that it has no effect.

    Raises:
        ConfigError: There are GPUs, but none of that index.
    """
    found = _accelerator()
    if found is None:
        log.once(f"set_gpu_device({device_id}) has no effect: torch sees no GPU", key="kernels.set_gpu_device")
        return
    found[1].set_device(_gpu_index(device_id, found[1]))


def optimize_tpu_memory() -> None:
    """Free what a TPU core holds without need: collect garbage, then run pending work, whose inputs are released by it.

    Without an XLA device it only collects garbage.
    """
    gc.collect()
    if devices.is_installed("torch_xla") and devices.get_device().type == "xla":
        xla_runtime.sync(wait=True)

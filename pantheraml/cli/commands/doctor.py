"""``pantheraml doctor``: versions, device, memory, what is missing and what that costs."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from ... import __version__
from ...device import INSTALL, Device, get_device, get_gpu_memory_stats
from ...errors import PantheraMLError
from ..output import Output

_GPU = ("cuda", "hip", "xpu")
_GIB = 1024**3
_PROBLEM_CODE = 2


@dataclass(frozen=True)
class Component:
    """A package that PantheraML uses.

    Attributes:
        package: Its name in the package index.
        cost: What is lost without it.
        devices: Device types on which that matters; empty for all.
        required: Whether nothing works without it.
        extra: Key of ``device.INSTALL``; empty when the package comes with PantheraML itself.
    """

    package: str
    cost: str
    devices: tuple[str, ...] = ()
    required: bool = False
    extra: str = ""


COMPONENTS: tuple[Component, ...] = (
    Component("torch", "nothing runs", required=True),
    Component("transformers", "no model loads", required=True),
    Component("trl", "no training", required=True),
    Component("peft", "no LoRA", required=True),
    Component("accelerate", "no training", required=True),
    Component("datasets", "no data", required=True),
    Component("bitsandbytes", "no 4-bit or 8-bit weights, no 8-bit optimizers", extra="bitsandbytes"),
    Component("triton", "the fused kernels are replaced by slower eager ones", _GPU, extra="triton"),
    Component("xformers", "one attention backend less; torch's own serves", _GPU, extra="xformers"),
    Component("torch_xla", "no TPU", ("xla",), extra="torch_xla"),
    Component("gguf", "no GGUF export", extra="gguf"),
    Component("compressed-tensors", "no export in fp8, int8 and int4 for vLLM", extra="compressed_tensors"),
    Component("torchao", "no export in torchao's formats", extra="torchao"),
    Component("tensorboard", "no TensorBoard logs; metrics.jsonl and report.html are written all the same"),
)


@dataclass(frozen=True)
class Floor:
    """The first version of a package without a known vulnerability."""

    package: str
    version: str
    advisory: str


FLOORS: tuple[Floor, ...] = (
    Floor("transformers", "5.3", "CVE-2026-4372"),
    Floor("torch", "2.10", "CVE-2026-24747"),
)


def installed_version(package: str) -> str | None:
    """Return the installed version of ``package``, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_line(component: Component) -> str:
    """Return the command that installs ``component``."""
    if component.required:
        return "pip install pantheraml"
    return INSTALL.get(component.extra, f"pip install {component.package}")


def vulnerable(versions: dict[str, str | None]) -> list[str]:
    """Return one line for each installed package that is older than its floor."""
    found = []
    for floor in FLOORS:
        version = versions.get(floor.package)
        if version is not None and Version(version).release < Version(floor.version).release:
            found.append(
                f"{floor.package} {version} has a known vulnerability ({floor.advisory}): "
                f"pip install --upgrade '{floor.package}>={floor.version}'"
            )
    return found


def _device_record(device: Device) -> dict[str, Any]:
    names = ("type", "name", "count", "capability", "bfloat16", "float16", "float8")
    return {name: getattr(device, name) for name in names}


def _memory() -> dict[str, float]:
    import psutil

    ram = psutil.virtual_memory()
    memory = {"ram_gib": ram.total / _GIB, "ram_free_gib": ram.available / _GIB}
    device = get_device()
    if device.type != "cpu" and device.type != "mps":
        memory["device_gib"] = get_gpu_memory_stats()[2]
    return {name: round(value, 1) for name, value in memory.items()}


def _missing(versions: dict[str, str | None], device: Device | None) -> list[dict[str, Any]]:
    missing = []
    for component in COMPONENTS:
        if versions[component.package] is not None:
            continue
        matters = component.required or not component.devices or (device is None or device.type in component.devices)
        if matters:
            entry = {"package": component.package, "cost": component.cost, "install": install_line(component)}
            missing.append(entry | {"required": component.required})
    return missing


def run(args: argparse.Namespace) -> int:
    """Print the report; with ``--strict`` return 2 when something required is missing, vulnerable or broken."""
    output = Output(json=args.json)
    versions = {component.package: installed_version(component.package) for component in COMPONENTS}
    device, problem = None, None
    if versions["torch"] is not None:
        try:
            device = get_device()
        except PantheraMLError as error:
            problem = str(error)
    memory = _memory() if device is not None else {}
    missing, warnings = _missing(versions, device), vulnerable(versions)

    output.say(f"PantheraML {__version__}, Python {platform.python_version()}, {platform.platform()}")
    output.say("\nDevice")
    if device is not None:
        output.table([(name, str(value)) for name, value in (_device_record(device) | memory).items()])
    else:
        output.say(f"  {problem or 'unknown without torch'}")
    output.say("\nPackages")
    output.table([(name, version or "-") for name, version in versions.items()])
    if missing:
        output.say("\nMissing")
        output.table([(entry["package"], entry["cost"], entry["install"]) for entry in missing])
    if warnings:
        output.say("\nWarnings")
        for line in warnings:
            output.say(f"  {line}")
    bad = bool(warnings or problem or any(entry["required"] for entry in missing))
    output.say("\nEverything needed is here." if not bad else "\nSomething above needs attention.")
    output.note(
        pantheraml=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        device=_device_record(device) if device is not None else None,
        memory=memory,
        versions=versions,
        missing=missing,
        warnings=[*warnings, *([problem] if problem else [])],
    )
    output.finish()
    return _PROBLEM_CODE if args.strict and bad else 0

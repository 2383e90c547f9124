"""Which implementation serves an op on a tensor. Explicit requests never fall back."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from .. import env, log
from ..errors import ConfigError, MissingDependencyError, UnsupportedError
from . import _triton

Backend = Literal["auto", "triton", "reference"]
BACKENDS = ("auto", "triton", "reference")
GPU_TYPES = ("cuda", "xpu")
# Compilers for chips before Ampere have no bfloat16 conversions.
BFLOAT16_CAPABILITY = (8, 0)
# Ada and Hopper brought conversions to e4m3.
FLOAT8_CAPABILITY = (8, 9)


@functools.cache
def _capability(index: int) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None on ROCm, whose numbers mean something else."""
    return None if torch.version.hip is not None else torch.cuda.get_device_capability(index)


def obstacle(tensor: torch.Tensor, *, fp8: bool = False) -> str | None:
    """Why Triton cannot serve this tensor, or None when it can. Looks at device and dtype only."""
    if not _triton.AVAILABLE:
        return "Triton is not installed"
    kind = tensor.device.type
    if kind not in GPU_TYPES and not (kind == "cpu" and _triton.interpreted()):
        return f"the tensor is on {tensor.device}, and Triton compiles for GPUs"
    if tensor.dtype in (torch.float64, torch.complex64, torch.complex128):
        return f"the kernels compute in float32, and the tensor is {tensor.dtype}"
    capability = _capability(tensor.device.index) if kind == "cuda" else None
    if capability is not None:
        needs = {"bfloat16": tensor.dtype == torch.bfloat16, "fp8": fp8}
        for what, least in (("bfloat16", BFLOAT16_CAPABILITY), ("fp8", FLOAT8_CAPABILITY)):
            if needs[what] and capability < least:
                has, least_text = (".".join(map(str, c)) for c in (capability, least))
                return f"{what} kernels need compute capability {least_text}, and {tensor.device} has {has}"
    return None


def resolve(
    op: str, tensor: torch.Tensor, backend: str = "auto", *, fp8: bool = False
) -> Literal["triton", "reference"]:
    """Choose the implementation of ``op`` for ``tensor``.

    Args:
        op: The op's name, for messages.
        tensor: The op's main input; its device and dtype decide.
        backend: ``"auto"`` takes Triton for a GPU tensor where Triton can serve it and the eager reference otherwise
            (told once when a GPU tensor goes to the reference). ``"triton"`` and ``"reference"`` are requests.
            ``PANTHERAML_KERNELS`` replaces ``"auto"``: ``reference`` forces the eager ops; ``triton`` makes it an
            error when a GPU tensor would go to the reference.
        fp8: The kernel converts to or from fp8.

    Returns:
        ``"triton"`` or ``"reference"``.

    Raises:
        ConfigError: ``backend`` or ``PANTHERAML_KERNELS`` has another value.
        MissingDependencyError: Triton was asked for and is not installed.
        UnsupportedError: Triton was asked for and cannot serve this device or dtype.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"unknown kernel backend {backend!r}",
            where=f"argument backend of {op}",
            hint=f"use one of {', '.join(BACKENDS)}",
        )
    where = f"argument backend of {op}"
    on_gpu = tensor.device.type in GPU_TYPES
    required = backend == "triton"
    if backend == "auto":
        backend = env.kernels()
        if backend not in BACKENDS:
            raise ConfigError(
                f"unknown kernel backend {backend!r}",
                where="environment variable PANTHERAML_KERNELS",
                hint=f"use one of {', '.join(BACKENDS)}",
            )
        if backend == "triton":
            where, required = "environment variable PANTHERAML_KERNELS", on_gpu or not _triton.AVAILABLE
    if backend == "reference" or (not on_gpu and not required):
        return "reference"
    reason = obstacle(tensor, fp8=fp8)
    if reason is None:
        return "triton"
    if not required:
        log.once(f"{op} runs as eager torch: {reason}", key=f"kernels.{op}.reference")
        return "reference"
    hint = "use backend='reference' or 'auto'"
    if not _triton.AVAILABLE:
        raise MissingDependencyError(
            f"the Triton kernel of {op} was asked for", where=where, why=reason, hint="pip install 'pantheraml[gpu]'"
        )
    raise UnsupportedError(f"the Triton kernel of {op} was asked for", where=where, why=reason, hint=hint)

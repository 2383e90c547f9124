"""Which kernel serves which attention: one table, filled from measurements, and what each kernel cannot do."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...device import Device, get_device, is_installed
from ..probe import FOREIGN_ERRORS

HALF = (torch.float16, torch.bfloat16)
ANY = 1 << 30


@dataclass(frozen=True)
class Call:
    """What an attention asks of a kernel.

    Attributes:
        kind: ``"causal"`` (all before the token), ``"documents"`` (packed rows or a window), ``"dense"`` (a mask of
            T x T), ``"full"`` (everything: an encoder), or ``"step"`` (one query a row, a decoding step).
        head_dim: Size of a head of queries and keys.
        dtype: Of queries, keys and values.
        length: Tokens of the longest document.
        value_dim: Size of a head of values; None when it is ``head_dim``.
        softcap: Whether scores are capped.
        sinks: Whether each head has a sink.
        dropout: Whether probabilities are dropped.
    """

    kind: str
    head_dim: int
    dtype: torch.dtype
    length: int = ANY
    value_dim: int | None = None
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. The first that applies is used.

    Attributes:
        kind: Kind of mask, as in :class:`Call`.
        device: Type of device.
        order: Kernels, best first. The first that can do what is asked serves.
        capability: Least compute capability.
        head_dim: Largest size of a head.
        length: Least length of the longest document.
    """

    kind: str
    device: str
    order: tuple[str, ...]
    capability: tuple[int, int] = (0, 0)
    head_dim: int = ANY
    length: int = 0


# One H100, bf16, causal, forward/backward in ms, cuDNN against flash: 4 x 2,048 with GQA 32/8 at head_dim 128
# 0.26/0.93 against 0.48/1.52, at head_dim 64 0.19/0.61 against 0.28/0.87; GQA 8/4 at head_dim 256 0.15/0.63 against
# 0.28/0.98; 1 x 32,768 at head_dim 128 14.6/39.8 against 26.4/67.6. Orders without figures follow what the kernels
# were written for; benchmarks/kernels/attention.py measures all of them.
TABLE = (
    Row("causal", "cuda", ("cudnn", "flash", "efficient", "math"), capability=(9, 0), head_dim=256),
    Row("causal", "cuda", ("flash", "efficient", "math"), capability=(8, 0)),
    Row("causal", "cuda", ("efficient", "math")),
    Row("causal", "hip", ("flash", "efficient", "math")),
    Row("full", "cuda", ("cudnn", "flash", "efficient", "math"), capability=(9, 0), head_dim=256),
    Row("full", "cuda", ("flash", "efficient", "math"), capability=(8, 0)),
    Row("full", "cuda", ("efficient", "math")),
    Row("full", "hip", ("flash", "efficient", "math")),
    Row("dense", "cuda", ("cudnn", "efficient", "math"), capability=(9, 0), head_dim=256),
    Row("dense", "cuda", ("efficient", "math")),
    Row("dense", "hip", ("efficient", "math")),
    # No cuDNN: it plans anew for each length of the keys, which grow by one at every step.
    Row("step", "cuda", ("flash", "efficient", "math"), capability=(8, 0)),
    Row("step", "cuda", ("efficient", "math")),
    Row("step", "hip", ("flash", "efficient", "math")),
    Row("documents", "cuda", ("varlen", "flex", "efficient", "exact"), capability=(8, 0)),
    # xformers is there only where it was asked for (the extra of that name).
    Row("documents", "cuda", ("xformers", "efficient", "flex", "exact")),
    Row("documents", "hip", ("flex", "exact")),
    Row("documents", "xpu", ("flex", "exact")),
    Row("documents", "cpu", ("exact",)),
    Row("documents", "mps", ("exact",)),
)

Refusal = Callable[[Call, Device], str | None]


def _cudnn(call: Call, device: Device) -> str | None:
    return None if call.dtype in HALF else "takes half precision only"


def _flash(call: Call, device: Device) -> str | None:
    return None if call.dtype in HALF else "takes half precision only"


def _varlen(call: Call, device: Device) -> str | None:
    if call.dtype not in HALF:
        return "takes half precision only"
    if (device.capability or (0, 0)) < (8, 0):
        return "needs compute capability 8.0"
    if call.head_dim > 256:
        return "takes heads of up to 256"
    if call.value_dim not in (None, call.head_dim):
        return "takes values of the size of the keys only"
    return _plain(call, softcap=False, sinks=True)


def _flex(call: Call, device: Device) -> str | None:
    if not is_installed("triton"):
        return "needs Triton"
    return "has no dropout" if call.dropout else None


def _efficient(call: Call, device: Device) -> str | None:
    return _plain(call, softcap=False, sinks=False) if call.kind == "documents" else None


def _xformers(call: Call, device: Device) -> str | None:
    if not is_installed("xformers"):
        return "is not installed"
    if not _xformers_is_built():
        return "was built for another torch or without CUDA"
    return _plain(call, softcap=False, sinks=False)


@functools.cache
def _xformers_is_built() -> bool:
    # Asked by a call: a build without CUDA names its kernels as there.
    try:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        attention(*(torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda") for _ in range(3)))
    except (ImportError, *FOREIGN_ERRORS):
        return False
    return True


def _plain(call: Call, *, softcap: bool, sinks: bool) -> str | None:
    if call.softcap and not softcap:
        return "has no soft cap"
    if call.sinks and not sinks:
        return "has no sinks"
    return "has no dropout" if call.dropout else None


REFUSALS: dict[str, Refusal] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "varlen": _varlen,
    "flex": _flex,
    "efficient": _efficient,
    "xformers": _xformers,
}


def order(call: Call, device: Device | None = None) -> tuple[str, ...]:
    """Kernels that can serve ``call`` on ``device`` (this process's when None), best first.

    Empty where the table says nothing, such as for plain attention on a CPU: torch chooses there.
    """
    device = device or get_device()
    return _order(call, device)


@functools.lru_cache(maxsize=256)
def _order(call: Call, device: Device) -> tuple[str, ...]:
    capability = device.capability or (0, 0)
    for row in TABLE:
        if (
            row.kind == call.kind
            and row.device == device.type
            and capability >= row.capability
            and call.head_dim <= row.head_dim
            and call.length >= row.length
        ):
            return tuple(name for name in row.order if name not in REFUSALS or not REFUSALS[name](call, device))
    return ("exact",) if call.kind == "documents" else ()

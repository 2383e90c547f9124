"""Launch settings, row layouts and argument checks of the kernels; memory and cache helpers for every device type."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, ConfigError, UnsupportedError
from .memory import (  # noqa: F401 - this module is their public path
    clear_gpu_cache,
    get_current_gpu_index,
    get_device_memory_info,
    get_gpu_memory_info,
    get_tpu_memory_info,
    optimize_tpu_memory,
    set_gpu_device,
)

# A row is held in registers by one program; 65,536 float32 values over 1,024 threads are 64 registers each.
MAX_WIDTH = 65536
# Elements of a program's tile when rows are short: four warps with two 16-byte loads of a 2-byte dtype each.
SHORT_TILE = 2048
ELEMENTS_PER_WARP = 512
# Threads of a program on every chip, and lanes of a warp on this host's (AMD's data-centre chips have 64).
MAX_THREADS = 1024
LANES = 64 if torch.version.hip is not None else 32
# Bytes of shared memory that a program may take on every chip.
LEAST_SHARED = 64 * 1024

_HERE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one for a launch; Triton launches on the current device."""
    if tensor.is_cuda:
        return _HERE if tensor.get_device() == torch.cuda.current_device() else torch.cuda.device(tensor.device)
    if tensor.is_xpu:
        return _HERE if tensor.get_device() == torch.xpu.current_device() else torch.xpu.device(tensor.device)
    return _HERE


class LaunchSettings(NamedTuple):
    """How a row-wise kernel is launched.

    Attributes:
        block: Width of the tile, a power of two at least as large as the row.
        rows: Rows a program holds at once.
        num_warps: Warps a program.
    """

    block: int
    rows: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n`` (1 for ``n <= 1``)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def require_width(width: int, where: str) -> None:
    """Raise unless the registers of one program hold a row of ``width`` elements."""
    if width > MAX_WIDTH:
        raise UnsupportedError(
            f"rows of {width} elements are too wide",
            where=where,
            why=f"a program holds one row of at most {MAX_WIDTH} elements",
            hint="use backend='reference'",
        )


@functools.cache
def launch_settings(width: int, *, where: str = "a row-wise kernel", lanes: int = LANES) -> LaunchSettings:
    """Tile shape and warps for rows of ``width`` elements.

    Short rows (attention heads) share a program, so that every thread still has wide loads in flight.

    Raises:
        UnsupportedError: the row does not fit into the registers of one program.
    """
    require_width(width, where)
    block = next_power_of_2(width)
    rows = max(SHORT_TILE // block, 1)
    return LaunchSettings(block, rows, min(max(block * rows // ELEMENTS_PER_WARP, 1), MAX_THREADS // lanes))


@functools.cache
def _processors(kind: str, index: int) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).multi_processor_count
    if kind == "xpu":
        return torch.xpu.get_device_properties(index).gpu_subslice_count
    return 2  # the interpreter runs programs one after another; two still exercise the summation of partial results


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    return processors_of(tensor.device)


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return _processors(device.type, device.index or 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return LEAST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED) or LEAST_SHARED


def persistent_programs(tensor: torch.Tensor, resident: int) -> int:
    """Programs that fill the tensor's GPU once, ``resident`` on each multiprocessor.

    Fixed by the chip, so sums over them are the same in every run.
    """
    count = processors(tensor)
    return count * resident if tensor.device.type != "cpu" else count


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor seen as rows of its last dimension: row ``r`` starts at ``(r // inner) * outer_stride + (r % inner) *
    inner_stride``.

    Attributes:
        tensor: The tensor, or a contiguous copy where its strides do not fit the form above.
        count: Number of rows.
        inner: Rows before the outer stride applies.
        outer_stride: In elements.
        inner_stride: In elements.
    """

    tensor: torch.Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def as_rows(x: torch.Tensor) -> Rows:
    """View a tensor ``[..., D]`` as rows with at most two strides; copies only what no two strides describe."""
    width = x.shape[-1]
    if not x.is_contiguous():
        levels: list[tuple[int, int]] = []
        for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
            if size == 1:
                continue
            if levels and levels[-1][1] == size * stride:
                levels[-1] = (levels[-1][0] * size, stride)
            else:
                levels.append((size, stride))
        if x.stride(-1) == 1 and 1 <= len(levels) <= 2:
            if len(levels) == 1:
                return Rows(x, levels[0][0], 1, levels[0][1], 0)
            (outer, outer_stride), (inner, inner_stride) = levels
            return Rows(x, outer * inner, inner, outer_stride, inner_stride)
        x = x.contiguous()
    return Rows(x, x.numel() // width if width else 0, 1, width, 0)


def require_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless all given tensors are on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        first = tensor.device if first is None else first
        if tensor.device != first:
            raise ArgumentError(
                f"the arguments of {op} are on different devices",
                where=", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None),
                hint="move them to one device",
            )


def require_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ConfigError(
            f"{op} needs {name} of shape {expected} and got {tuple(tensor.shape)}", where=f"argument {name} of {op}"
        )


def require_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless all given tensors hold floating-point numbers of at least 16 bits."""
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2):
            raise ArgumentError(
                f"{op} needs floating-point numbers and got {tensor.dtype}", where=f"argument {name} of {op}"
            )


@functools.cache
def fp8_dtype(device: torch.device) -> torch.dtype:
    """The fp8 dtype with three mantissa bits that the device's matrix units take."""
    hip = device.type == "cuda" and torch.version.hip is not None
    gfx94 = hip and torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")
    return torch.float8_e4m3fnuz if gfx94 else torch.float8_e4m3fn


def single_stride(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """View ``[..., D]`` as rows with one stride; returns the tensor (a contiguous copy if need be), rows and stride."""
    rows = as_rows(x)
    if rows.inner != 1:
        rows = as_rows(x.contiguous())
    return rows.tensor, rows.count, rows.outer_stride

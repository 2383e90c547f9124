"""What a benchmark workload is: one op at one shape, its inputs, and how each contender is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
Contender = Callable[[], Callable[..., Any]]
DTYPE = torch.bfloat16
RANK, SCALING = 16, 2.0
# Products without which an op cannot do; they are yardsticks and no peers.
BARE, BARE_ADAPTERS = "bare GEMMs", "dA and dB"
YARDSTICKS = (BARE, BARE_ADAPTERS)


@dataclass(frozen=True)
class Model:
    """Sizes of a model whose shapes are timed."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


LLAMA = Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128_256)
MODELS = (
    LLAMA,
    Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128_256),
    Model("Qwen3-4B", 2560, 9728, 32, 8, 128, 151_936),
    Model("Gemma-2-2B", 2304, 9216, 8, 4, 256, 256_000),
)
TOKENS = (8192, 32768, 2048)
# For a run that only shows that everything is called rightly.
TINY_MODELS = (Model("tiny", 64, 128, 4, 2, 16, 96),)
TINY_TOKENS = (8,)


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    Attributes:
        shape: What is printed beside the op.
        make: Makes the inputs on a device.
        leaves: Inputs that require a gradient.
        contenders: Name to a function that imports what it needs (ImportError means "not installed") and returns a
            differentiable ``f(**inputs) -> tensor or tuple``. ``ours`` and ``eager`` are expected. A contender called
            ``torch.compile`` is made from ``eager``.
        forward_bytes: Bytes that the forward must read and write at least; None for a compute-bound op.
        backward_bytes: The same of the backward.
        forward_flops: Floating-point operations of the forward, for compute-bound ops.
        backward_flops: The same of the backward.
        tolerance: Largest accepted difference between ours and eager, relative to eager's largest value.
        compared: Whether ours can be compared with eager; not where both are right and rounding decides.
    """

    shape: str
    make: Callable[[torch.device], Inputs]
    leaves: tuple[str, ...]
    contenders: Mapping[str, Contender]
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    forward_flops: float | None = None
    backward_flops: float | None = None
    tolerance: float = field(default=2e-2)


@dataclass(frozen=True)
class Case:
    """A workload with its place in the table.

    Attributes:
        op: Name for ``--ops``.
        model: Whose widths.
        tokens: T.
        workload: The workload.
        rank: Smaller is timed earlier.
        compiled: Whether ``torch.compile`` is timed, which takes its time to compile.
    """

    op: str
    model: str
    tokens: int
    workload: Workload
    rank: int
    compiled: bool

    @property
    def label(self) -> str:
        return f"{self.op}, {self.model}, T={self.tokens}"


def randn(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(*shape, device=device, dtype=DTYPE)
    return values if scale == 1.0 else values.mul_(scale)

"""The table of compiled forms of every kernel, so that they can be compiled ahead of time for chips that are not here.

A kernel file lists its forms in a function ``variants()``. Arguments that are always compile-time constants, and
pointers that a form leaves out (None), go into ``constants``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Modules of this package that hold kernels; those with kernels of their own define ``variants()``.
MODULES = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "qk_norm_rotary",
    "glu",
    "cross_entropy",
    "linear_cross_entropy",
    "low_rank",
    "lora_glu",
    "lora",
    "nf4",
    "nf4_product",
    "fp8",
    "fp8_operands",
    "routing",
    "grouped_products",
    "experts",
    "adamw_8bit",
    "_row_pieces",
)


@dataclass(frozen=True)
class Variant:
    """One form of a kernel.

    Attributes:
        name: Readable id, unique in the table, such as ``"rms_norm_forward-bf16-llama"``.
        kernel: The jitted function.
        arguments: Run-time arguments to Triton types (``"*bf16"``, ``"i64"``, ``"fp32"``).
        constants: Compile-time constants, and None for pointers that are left out.
        num_warps: Warps a program.
        num_stages: Software pipeline stages.
        minimum: Least NVIDIA compute capability as ``major * 10 + minor`` that can run it; None means none does.
        amd: AMD architectures that can run it.
        representative: Compiled for every chip in the tests; the others for the oldest chip of their dtype. One form of
            each structure in one dtype is enough.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    minimum: int | None = 75
    amd: tuple[str, ...] = ("gfx90a", "gfx942")
    representative: bool = False


def bfloat16_minimum(dtype: str) -> int:
    """Least capability for a Triton dtype name: bf16 kernels need Ampere (80), fp8 e4m3 Ada (89)."""
    return {"bf16": 80, "fp8e4nv": 89}.get(dtype, 75)


def collect(modules: Iterable[str] = MODULES) -> Iterator[Variant]:
    """The registered variants of the given kernel files."""
    for module in modules:
        variants = getattr(importlib.import_module(f"{__package__}.{module}"), "variants", None)
        if variants is not None:
            yield from variants()

"""Calls with few tokens and no gradient, such as a decoding step.

What bounds them is the host's time to enqueue the work and the device's to read the weights. So modules outside a
recorded graph run their stock forwards, which take less of the host's time than the fused ones, LoRA layers make one
product for the base and two thin ones, and 4-bit weights are multiplied with few rows without being written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from ... import kernels
from ...kernels.fp8_linear import Fp8Weight, Nf4Fp8Weight
from ...kernels.projections import Projection
from ...kernels.reference.nf4 import Quantized4Bit

# With more tokens the device is what a call waits for, and the fused forwards are the faster.
TOKENS = 64


@dataclass(slots=True)
class Known:
    """What was found out while nobody changes a weight; each entry with its key's object, so that the id stays its own.

    Attributes:
        copies: Adapters and biases in another dtype.
        projections: What LoRA layers compute, with what they were then told about their adapters.
    """

    copies: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    projections: dict[int, tuple[Any, Any, Projection]] = field(default_factory=dict)


_known: ContextVar[Known | None] = ContextVar("pantheraml_known", default=None)


def known() -> Known | None:
    """What has been found out so far, while ``weights_unchanged`` lasts; None otherwise, and while code is compiled."""
    return None if torch.compiler.is_compiling() else _known.get()


def is_step(x: torch.Tensor) -> bool:
    """Whether a call on ``x`` [..., H] is a small one that records no gradient."""
    return not torch.is_grad_enabled() and x.numel() <= TOKENS * x.shape[-1]


def is_bound_by_host(x: torch.Tensor) -> bool:
    """Whether such a call waits for the host: while a graph is recorded, what the host does costs nothing later."""
    return is_step(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """While it lasts, no weight is changed or replaced: what layers find out about theirs is found out once."""
    token = _known.set(Known())
    try:
        yield
    finally:
        _known.reset(token)


def _in_dtype(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A small parameter in a dtype, converted once. Copies of the bases would take half a model."""
    if parameter.dtype == dtype:
        return parameter
    kept = known()
    if kept is None:
        return parameter.to(dtype)
    key = id(parameter), dtype
    if key not in kept.copies:
        kept.copies[key] = parameter, parameter.to(dtype)
    return kept.copies[key][1]


def project(x: torch.Tensor, projection: Projection) -> torch.Tensor | None:
    """Output of a projection for a small ``x``: ``x @ W.T + bias + s * (x @ A.T) @ B.T`` of all its adapters.

    Args:
        x: [..., in_features] in the compute dtype.
        projection: The layer.

    Returns:
        [..., out_features]; None when the base is of a kind that has no short path.
    """
    weight, bias, dtype = projection.weight, projection.bias, x.dtype
    if isinstance(weight, Fp8Weight | Nf4Fp8Weight) or projection.magnitude is not None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else _in_dtype(bias, dtype)
    if isinstance(weight, Quantized4Bit):
        y = kernels.nf4_matvec(rows, weight)
        y = y if bias is None else y.add_(bias)
    else:
        y = functional.linear(rows, projection.dense(dtype), bias)
    for A, B, scaling in projection.adapters:
        thin = torch.mm(rows, _in_dtype(A, dtype).t())
        y.addmm_(thin, _in_dtype(B, dtype).t(), alpha=scaling)
    return y.view(*x.shape[:-1], y.shape[-1])

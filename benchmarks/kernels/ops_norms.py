"""Workloads of the normalisations."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from workload import DTYPE, Contender, Inputs, Model, Workload, randn

EPS = 1e-6


def _rms_norm(
    width: int, rows: int, shape: str, *, trained: bool = False, residual: bool = False, gemma: bool = False
) -> Workload:
    from pantheraml.kernels import rms_norm
    from pantheraml.kernels.reference.rms_norm import rms_norm as reference

    options = {"eps": EPS, "offset": 1.0, "casting": "float32"} if gemma else {"eps": EPS}
    casting, offset = ("gemma", 1.0) if gemma else ("llama", 0.0)

    def liger() -> Callable[..., Any]:
        if residual:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused

            return lambda x, weight, residual: Fused.apply(x, residual, weight, EPS, offset, casting, False)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

        return lambda x, weight: Norm.apply(x, weight, EPS, offset, casting, False)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import fast_rms_layernorm

        return lambda x, weight: fast_rms_layernorm(
            SimpleNamespace(weight=weight, variance_epsilon=EPS, eps=EPS), x[None], gemma
        )

    contenders: dict[str, Contender] = {
        "ours": lambda: lambda **t: rms_norm(**t, **options),
        "eager": lambda: lambda **t: reference(**t, **options),
        "liger": liger,
    }
    if not residual:
        contenders["unsloth"] = unsloth

    def make(device: torch.device) -> Inputs:
        inputs = {"x": randn(rows, width, device=device), "weight": randn(width, device=device)}
        return inputs | ({"residual": randn(rows, width, device=device)} if residual else {})

    leaves = ("x", *(("weight",) if trained else ()), *(("residual",) if residual else ()))
    once = rows * width * DTYPE.itemsize
    # With a residual: x, residual, total, y; backward dy, dtotal, total, dx.
    forward, backward = (4, 4) if residual else (2, 3)
    return Workload(shape, make, leaves, contenders, forward * once, backward * once)


def rms_norm(model: Model, tokens: int) -> Workload:
    """Frozen weight, as under LoRA; Gemma's own casting at Gemma's width."""
    gemma = model.name.startswith("Gemma")
    shape = f"D={model.hidden}{' gemma' if gemma else ''}"
    return _rms_norm(model.hidden, tokens, shape, gemma=gemma)


def rms_norm_trained(model: Model, tokens: int) -> Workload:
    """With the weight's gradient."""
    return _rms_norm(model.hidden, tokens, f"D={model.hidden}", trained=True)


def rms_norm_residual(model: Model, tokens: int) -> Workload:
    """With the residual addition."""
    return _rms_norm(model.hidden, tokens, f"D={model.hidden}", residual=True)


def head_norm(model: Model, tokens: int) -> Workload:
    """Over the heads of q."""
    return _rms_norm(model.head_dim, tokens * model.heads, f"H={model.heads} D={model.head_dim}")


def layer_norm(model: Model, tokens: int) -> Workload:
    """Trained weight and bias."""
    import torch.nn.functional as F

    from pantheraml.kernels import layer_norm as ours

    width = model.hidden

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Norm

        return lambda x, weight, bias: Norm.apply(x, weight, bias, 1e-5)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import fast_layernorm

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            module = SimpleNamespace(weight=weight, bias=bias, eps=1e-5, variance_epsilon=1e-5, elementwise_affine=True)
            return fast_layernorm(module, x[None])

        return call

    def make(device: torch.device) -> Inputs:
        parameters = {name: randn(width, device=device) for name in ("weight", "bias")}
        return {"x": randn(tokens, width, device=device)} | parameters

    once = tokens * width * DTYPE.itemsize
    return Workload(
        f"D={width}",
        make,
        ("x", "weight", "bias"),
        {
            "ours": lambda: ours,
            "eager": lambda: lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias),
            "liger": liger,
            "unsloth": unsloth,
        },
        2 * once,
        3 * once,
    )


OPS = {
    "rms_norm": rms_norm,
    "rms_norm_residual": rms_norm_residual,
    "rms_norm_trained": rms_norm_trained,
    "head_norm": head_norm,
    "layer_norm": layer_norm,
}

"""What the kernel benchmark times: workloads of the memory-bound ops, and how each contender is called.

A contender is a function that imports what it needs (ImportError means "not installed") and returns a differentiable
``f(**inputs) -> tensor or tuple``. Contenders called ``torch.compile`` are made from ``eager`` by the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
Contender = Callable[[], Callable[..., Any]]
TOKENS = (2048, 8192, 32768)
QUICK_TOKENS = (8192,)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of a model whose shapes are timed."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (
    Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64),
    Model("Gemma-2-2B", 2304, 9216, 8, 4, 256),
    Model("Qwen3-4B", 2560, 9728, 32, 8, 128),
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128),
)
QUICK_MODELS = (MODELS[1], MODELS[3])


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    Attributes:
        op: Name for ``--ops``.
        shape: What is printed beside it.
        tokens: T.
        make: Makes the inputs on a device.
        leaves: Inputs that require a gradient.
        contenders: Name to contender; ``ours`` and ``eager`` are expected.
        forward_bytes: Bytes that the forward must read and write at least; None for a compute-bound op.
        backward_bytes: The same of the backward.
        forward_flops: Floating-point operations of the forward, for compute-bound ops.
        backward_flops: The same of the backward.
        tolerance: Largest accepted difference between ours and eager, relative to eager's largest value.
    """

    op: str
    shape: str
    tokens: int
    make: Callable[[torch.device], Inputs]
    leaves: tuple[str, ...]
    contenders: Mapping[str, Contender]
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    forward_flops: float | None = None
    backward_flops: float | None = None
    tolerance: float = field(default=2e-2)


def randn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPE)


def _rms_norm(
    op: str, width: int, tokens: int, *, shape: str, residual: bool, trained: bool, heads: int = 1
) -> Workload:
    from pantheraml.kernels import rms_norm
    from pantheraml.kernels.reference.rms_norm import rms_norm as reference

    def liger() -> Callable[..., Any]:
        if residual:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused

            return lambda x, weight, residual: Fused.apply(x, residual, weight, 1e-6, 0.0, "llama", False)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

        return lambda x, weight: Norm.apply(x, weight, 1e-6, 0.0, "llama", False)

    def unsloth() -> Callable[..., Any]:
        import unsloth  # noqa: F401
        from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

        return lambda x, weight: Fast_RMS_Layernorm.apply(x, weight, 1e-6, False)

    contenders: dict[str, Contender] = {"ours": lambda: rms_norm, "eager": lambda: reference, "liger": liger}
    if not (residual or trained):
        contenders["unsloth"] = unsloth

    def make(device: torch.device) -> Inputs:
        inputs = {"x": randn(tokens * heads, width, device=device), "weight": randn(width, device=device)}
        return inputs | ({"residual": randn(tokens, width, device=device)} if residual else {})

    leaves = ("x", *(("weight",) if trained else ()), *(("residual",) if residual else ()))
    pass_bytes = tokens * heads * width * DTYPE.itemsize
    forward, backward = (4, 4) if residual else (2, 3)
    return Workload(op, shape, tokens, make, leaves, contenders, forward * pass_bytes, backward * pass_bytes)


def rms_norm(model: Model, tokens: int) -> Workload:
    """Frozen weight, as under LoRA."""
    return _rms_norm("rms_norm", model.hidden, tokens, shape=f"D={model.hidden}", residual=False, trained=False)


def rms_norm_trained(model: Model, tokens: int) -> Workload:
    """With the weight's gradient."""
    return _rms_norm("rms_norm_trained", model.hidden, tokens, shape=f"D={model.hidden}", residual=False, trained=True)


def rms_norm_residual(model: Model, tokens: int) -> Workload:
    """With the residual addition."""
    return _rms_norm("rms_norm_residual", model.hidden, tokens, shape=f"D={model.hidden}", residual=True, trained=False)


def head_norm(model: Model, tokens: int) -> Workload:
    """Over the heads of q."""
    shape = f"H={model.heads} D={model.head_dim}"
    return _rms_norm("head_norm", model.head_dim, tokens, shape=shape, residual=False, trained=False, heads=model.heads)


def layer_norm(model: Model, tokens: int) -> Workload:
    """Trained weight and bias."""
    import torch.nn.functional as F

    from pantheraml.kernels import layer_norm as ours

    width = model.hidden

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Norm

        return lambda x, weight, bias: Norm.apply(x, weight, bias, 1e-5)

    def make(device: torch.device) -> Inputs:
        parameters = {name: randn(width, device=device) for name in ("weight", "bias")}
        return {"x": randn(tokens, width, device=device)} | parameters

    return Workload(
        "layer_norm",
        f"D={width}",
        tokens,
        make,
        ("x", "weight", "bias"),
        {
            "ours": lambda: ours,
            "eager": lambda: lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias),
            "liger": liger,
        },
        2 * tokens * width * DTYPE.itemsize,
        3 * tokens * width * DTYPE.itemsize,
    )


def rotary(model: Model, tokens: int) -> Workload:
    """q and k as views of their projections, [1, H, T, D] with T and H swapped in memory."""
    from pantheraml.kernels import rotary as ours
    from pantheraml.kernels.reference.rotary import rotary as reference

    def views(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, cos, sin: f(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.rope import LigerRopeFunction

        return views(LigerRopeFunction.apply)

    def unsloth() -> Callable[..., Any]:
        import unsloth  # noqa: F401
        from unsloth.kernels.rope_embedding import fast_rope_embedding

        return views(fast_rope_embedding)

    def make(device: torch.device) -> Inputs:
        angle = torch.randn(1, tokens, model.head_dim // 2, device=device).repeat(1, 1, 2)
        return {
            # scaled so that peers that overwrite their inputs time after time stay finite (a rotation keeps the norm)
            "q": randn(1, tokens, model.heads, model.head_dim, device=device),
            "k": randn(1, tokens, model.kv_heads, model.head_dim, device=device),
            "cos": angle.cos().to(DTYPE),
            "sin": angle.sin().to(DTYPE),
        }

    moved = 2 * tokens * (model.heads + model.kv_heads + 1) * model.head_dim * DTYPE.itemsize
    return Workload(
        "rotary",
        f"H={model.heads}/{model.kv_heads} D={model.head_dim}",
        tokens,
        make,
        ("q", "k"),
        {"ours": lambda: views(ours), "eager": lambda: views(reference), "liger": liger, "unsloth": unsloth},
        moved,
        moved,
    )


def _with_kernels(forward: Callable[..., torch.Tensor], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A peer's bare kernels as one op. Its backward overwrites what was saved: good for timing only."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate, up):
            ctx.save_for_backward(gate, up)
            return forward(gate[None], up[None])[0]

        @staticmethod
        def backward(ctx: Any, dout):
            gate, up = ctx.saved_tensors
            _, dgate, dup = backward(dout, gate, up)
            return dgate, dup

    return lambda gate, up: Op.apply(gate, up)


def _glu(op: str, activation: str, model: Model, tokens: int, peers: dict[str, Contender]) -> Workload:
    from pantheraml.kernels import glu as ours
    from pantheraml.kernels.reference.glu import glu as reference

    width = model.intermediate

    def make(device: torch.device) -> Inputs:
        return {name: randn(tokens, width, device=device) for name in ("gate", "up")}

    return Workload(
        op,
        f"I={width}",
        tokens,
        make,
        ("gate", "up"),
        {
            "ours": lambda: lambda gate, up: ours(gate, up, activation),
            "eager": lambda: lambda gate, up: reference(gate, up, activation),
            **peers,
        },
        3 * tokens * width * DTYPE.itemsize,
        5 * tokens * width * DTYPE.itemsize,
    )


def glu(model: Model, tokens: int) -> Workload:
    """SwiGLU."""

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    def unsloth() -> Callable[..., Any]:
        import unsloth  # noqa: F401
        from unsloth.kernels import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

        return _with_kernels(swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel)

    return _glu("glu", "silu", model, tokens, {"liger": liger, "unsloth": unsloth})


def geglu(model: Model, tokens: int) -> Workload:
    """GeGLU, tanh form."""

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return LigerGELUMulFunction.apply

    def unsloth() -> Callable[..., Any]:
        import unsloth  # noqa: F401
        from unsloth.kernels import geglu_approx_backward_kernel, geglu_approx_forward_kernel

        return _with_kernels(geglu_approx_forward_kernel, geglu_approx_backward_kernel)

    return _glu("geglu", "gelu_tanh", model, tokens, {"liger": liger, "unsloth": unsloth})


def packed_glu(model: Model, tokens: int) -> Workload:
    """SwiGLU of one packed projection."""
    from pantheraml.kernels import packed_glu as ours
    from pantheraml.kernels.reference.glu import packed_glu as reference

    width = model.intermediate
    return Workload(
        "packed_glu",
        f"I={width}",
        tokens,
        lambda device: {"gate_up": randn(tokens, 2 * width, device=device)},
        ("gate_up",),
        {"ours": lambda: ours, "eager": lambda: reference},
        3 * tokens * width * DTYPE.itemsize,
        5 * tokens * width * DTYPE.itemsize,
    )


OPS: dict[str, Callable[[Model, int], Workload]] = {
    "rms_norm": rms_norm,
    "rms_norm_trained": rms_norm_trained,
    "rms_norm_residual": rms_norm_residual,
    "head_norm": head_norm,
    "layer_norm": layer_norm,
    "rotary": rotary,
    "glu": glu,
    "geglu": geglu,
    "packed_glu": packed_glu,
}


def workloads(op: str, *, quick: bool) -> Iterator[tuple[str, Workload]]:
    """Model name and workload of ``op`` for every listed model and number of tokens.

    Another registry module offers the same two names: ``OPS`` (a mapping whose keys are op names) and ``workloads``.
    """
    for model in QUICK_MODELS if quick else MODELS:
        for tokens in QUICK_TOKENS if quick else TOKENS:
            yield model.name, OPS[op](model, tokens)

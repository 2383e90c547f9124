"""Workloads of rotary position embedding and of gated linear units."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from workload import DTYPE, Contender, Inputs, Model, Workload, randn

EPS = 1e-6


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
        from unsloth.kernels import fast_rope_embedding

        return views(lambda q, k, cos, sin: fast_rope_embedding(q, k, cos[0], sin[0]))

    def make(device: torch.device) -> Inputs:
        angle = torch.randn(1, tokens, model.head_dim // 2, device=device).repeat(1, 1, 2)
        return {
            "q": randn(1, tokens, model.heads, model.head_dim, device=device),
            "k": randn(1, tokens, model.kv_heads, model.head_dim, device=device),
            "cos": angle.cos().to(DTYPE),
            "sin": angle.sin().to(DTYPE),
        }

    # q and k read and written, cos and sin read.
    moved = 2 * tokens * (model.heads + model.kv_heads + 1) * model.head_dim * DTYPE.itemsize
    return Workload(
        f"H={model.heads}/{model.kv_heads} D={model.head_dim}",
        make,
        ("q", "k"),
        {"ours": lambda: views(ours), "eager": lambda: views(reference), "liger": liger, "unsloth": unsloth},
        moved,
        moved,
    )


def qk_norm_rotary(model: Model, tokens: int) -> Workload:
    """The same after a norm of every head, with frozen weights."""
    from pantheraml.kernels import qk_norm_rotary as ours
    from pantheraml.kernels.reference.rotary import qk_norm_rotary as reference

    base = rotary(model, tokens)

    def views(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, **t: f(q.transpose(1, 2), k.transpose(1, 2), **t)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels.qk_norm_rope import fast_qk_norm_rope

        def call(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
            norms = [SimpleNamespace(weight=weight, variance_epsilon=EPS, eps=EPS) for weight in (q_weight, k_weight)]
            return fast_qk_norm_rope(*norms, q, k, cos[0], sin[0])

        return views(call)

    def make(device: torch.device) -> Inputs:
        weights = {name: randn(model.head_dim, device=device) for name in ("q_weight", "k_weight")}
        return base.make(device) | weights

    heads = tokens * (model.heads + model.kv_heads) * model.head_dim * DTYPE.itemsize
    angles = 2 * tokens * model.head_dim * DTYPE.itemsize
    return Workload(
        base.shape,
        make,
        ("q", "k"),
        {"ours": lambda: views(ours), "eager": lambda: views(reference), "unsloth": unsloth},
        2 * heads + angles,
        3 * heads + angles,
    )


def _with_kernels(forward: Callable[..., torch.Tensor], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A peer's bare kernels as one op. Its backward may overwrite what was saved: good for timing only."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate, up):
            ctx.kept = gate, up
            return forward(gate[None], up[None])[0]

        @staticmethod
        def backward(ctx: Any, dout):
            gate, up = ctx.kept
            _, dgate, dup = backward(dout, gate, up)
            return dgate, dup

    return lambda gate, up: Op.apply(gate, up)


def _glu(activation: str, model: Model, tokens: int, peers: dict[str, Contender]) -> Workload:
    from pantheraml.kernels import glu as ours
    from pantheraml.kernels.reference.glu import glu as reference

    width = model.intermediate

    def make(device: torch.device) -> Inputs:
        return {name: randn(tokens, width, device=device) for name in ("gate", "up")}

    once = tokens * width * DTYPE.itemsize
    return Workload(
        f"I={width}",
        make,
        ("gate", "up"),
        {
            "ours": lambda: lambda gate, up: ours(gate, up, activation),
            "eager": lambda: lambda gate, up: reference(gate, up, activation),
            **peers,
        },
        3 * once,
        5 * once,
    )


def swiglu(model: Model, tokens: int) -> Workload:
    """SwiGLU."""

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

        return _with_kernels(swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel)

    return _glu("silu", model, tokens, {"liger": liger, "unsloth": unsloth})


def geglu_tanh(model: Model, tokens: int) -> Workload:
    """GeGLU, tanh form."""

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return lambda gate, up: LigerGELUMulFunction.apply(gate, up)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import geglu_approx_backward_kernel, geglu_approx_forward_kernel

        return _with_kernels(geglu_approx_forward_kernel, geglu_approx_backward_kernel)

    return _glu("gelu_tanh", model, tokens, {"liger": liger, "unsloth": unsloth})


def geglu_exact(model: Model, tokens: int) -> Workload:
    """GeGLU, with the error function."""

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import geglu_exact_backward_kernel, geglu_exact_forward_kernel

        return _with_kernels(geglu_exact_forward_kernel, geglu_exact_backward_kernel)

    return _glu("gelu", model, tokens, {"unsloth": unsloth})


def packed_swiglu(model: Model, tokens: int) -> Workload:
    """SwiGLU of one packed projection."""
    from pantheraml.kernels import packed_glu as ours
    from pantheraml.kernels.reference.glu import packed_glu as reference

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

        return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up)

    width = model.intermediate
    once = tokens * width * DTYPE.itemsize
    return Workload(
        f"I={width}",
        lambda device: {"gate_up": randn(tokens, 2 * width, device=device)},
        ("gate_up",),
        {"ours": lambda: ours, "eager": lambda: reference, "liger": liger},
        3 * once,
        5 * once,
    )


OPS = {
    "rotary": rotary,
    "qk_norm_rotary": qk_norm_rotary,
    "swiglu": swiglu,
    "geglu_tanh": geglu_tanh,
    "geglu_exact": geglu_exact,
    "packed_swiglu": packed_swiglu,
}

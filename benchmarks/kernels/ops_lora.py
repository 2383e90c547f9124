"""Workloads of the layers with low-rank adapters, and of grouped products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from workload import BARE, BARE_ADAPTERS, DTYPE, RANK, SCALING, Contender, Inputs, Model, Workload, randn

EXPERTS, CHOICES = 32, 2


class _Bare(torch.autograd.Function):
    """The frozen products alone, of one input; the adapters get no gradient."""

    @staticmethod
    def forward(ctx: Any, x, *weights):
        ctx.save_for_backward(*weights)
        return tuple(torch.mm(x, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads):
        gradient = None
        for grad, weight in zip(grads, ctx.saved_tensors):
            gradient = torch.mm(grad, weight) if gradient is None else gradient.addmm_(grad, weight)
        return gradient, *(None for _ in grads)


class _AdapterGradients(torch.autograd.Function):
    """The two products dA and dB alone, from a thin dy @ B and x @ A.T that are there already."""

    @staticmethod
    def forward(ctx: Any, x, weight, A, B):
        ctx.save_for_backward(x, x.new_ones((x.shape[0], RANK)))
        ctx.factors = A, B
        return x.new_empty((x.shape[0], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad):
        x, thin = ctx.saved_tensors
        A, B = ctx.factors
        dA = torch.mm(thin.t(), x, out_dtype=A.dtype) if x.is_cuda else torch.mm(thin.t(), x).to(A.dtype)
        dB = torch.mm(grad.t(), thin, out_dtype=B.dtype) if x.is_cuda else torch.mm(grad.t(), thin).to(B.dtype)
        return torch.empty_like(x), None, dA, dB


def _parameters(shapes: Mapping[str, tuple[int, int]], tokens: int, width: int, device: torch.device) -> Inputs:
    inputs = {"x": randn(tokens, width, device=device)}
    for name, (out, inner) in shapes.items():
        inputs[f"{name}W"] = randn(out, inner, device=device, scale=0.02)
        inputs[f"{name}A"] = torch.randn(RANK, inner, device=device) * 0.02
        inputs[f"{name}B"] = torch.randn(out, RANK, device=device) * 0.02
    return inputs


def _layers(t: Inputs, names: str) -> list[Any]:
    from pantheraml.kernels.lora import Adapter, Projection

    return [Projection(t[f"{n}W"], [Adapter(t[f"{n}A"], t[f"{n}B"], SCALING)]) for n in names]


def _peer_arguments(t: Inputs, names: str) -> list[Any]:
    return [value for n in names for value in (t[f"{n}W"], None, t[f"{n}A"], t[f"{n}B"], SCALING)]


def _autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the peer's trainer calls it."""

    def call(**t: torch.Tensor) -> Any:
        with torch.autocast(t["x"].device.type, dtype=torch.bfloat16):
            return function(t)

    return call


def _lora(
    shape: str,
    shapes: Mapping[str, tuple[int, int]],
    width: int,
    tokens: int,
    call: Callable[[Inputs, str], Any],
    others: Mapping[str, Contender],
) -> Workload:
    flops = 2.0 * tokens * sum(out * inner for out, inner in shapes.values())
    return Workload(
        shape,
        lambda device: _parameters(shapes, tokens, width, device),
        ("x", *(f"{n}{p}" for n in shapes for p in "AB")),
        {
            "ours": lambda: lambda **t: call(t, "auto"),
            "eager": lambda: lambda **t: call(t, "reference"),
            **others,
        },
        forward_flops=flops,
        backward_flops=flops,
    )


def _lora_linear(name: str, out: int, width: int, tokens: int) -> Workload:
    from pantheraml.kernels import lora_linear as ours

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels.fast_lora import LoRA_W

        return _autocast(lambda t: LoRA_W.apply(t["x"][None], *_peer_arguments(t, "w")))

    return _lora(
        f"{name} {width}→{out} r={RANK}",
        {"w": (out, width)},
        width,
        tokens,
        lambda t, backend: ours(t["x"], t["wW"], t["wA"], t["wB"], SCALING, backend=backend),
        {
            "unsloth": unsloth,
            BARE: lambda: lambda **t: _Bare.apply(t["x"], t["wW"]),
            BARE_ADAPTERS: lambda: lambda **t: _AdapterGradients.apply(t["x"], t["wW"], t["wA"], t["wB"]),
        },
    )


def lora_q(model: Model, tokens: int) -> Workload:
    """The projection to the queries, or back from the heads."""
    return _lora_linear("q", model.heads * model.head_dim, model.hidden, tokens)


def lora_k(model: Model, tokens: int) -> Workload:
    """The projection to the keys."""
    return _lora_linear("k", model.kv_heads * model.head_dim, model.hidden, tokens)


def lora_gate(model: Model, tokens: int) -> Workload:
    """The projection to the MLP's gate."""
    return _lora_linear("gate", model.intermediate, model.hidden, tokens)


def lora_down(model: Model, tokens: int) -> Workload:
    """The projection back from the MLP."""
    return _lora_linear("down", model.hidden, model.intermediate, tokens)


def lora_qkv(model: Model, tokens: int) -> Workload:
    """Queries, keys and values of one input."""
    from pantheraml.kernels import lora_qkv as ours

    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes = {name: (out, model.hidden) for name, out in (("q", heads), ("k", kv_heads), ("v", kv_heads))}

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels.fast_lora import LoRA_QKV

        return _autocast(lambda t: LoRA_QKV.apply(t["x"][None], *_peer_arguments(t, "qkv"), False))

    return _lora(
        f"{model.hidden}→{heads}+2×{kv_heads} r={RANK}",
        shapes,
        model.hidden,
        tokens,
        lambda t, backend: ours(t["x"], *_layers(t, "qkv"), backend=backend),
        {"unsloth": unsloth, BARE: lambda: lambda **t: _Bare.apply(t["x"], t["qW"], t["kW"], t["vW"])},
    )


def lora_mlp(model: Model, tokens: int) -> Workload:
    """Gated MLP with adapters on all three layers."""
    from pantheraml.kernels.lora import lora_mlp as ours

    shapes = {"g": (model.intermediate, model.hidden), "u": (model.intermediate, model.hidden)}
    shapes["d"] = (model.hidden, model.intermediate)

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel
        from unsloth.kernels.fast_lora import LoRA_MLP

        kernels = (swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel, False)
        return _autocast(lambda t: LoRA_MLP.apply(t["x"][None], *_peer_arguments(t, "gud"), *kernels))

    return _lora(
        f"D={model.hidden} I={model.intermediate} r={RANK}",
        shapes,
        model.hidden,
        tokens,
        lambda t, backend: ours(t["x"], *_layers(t, "gud"), backend=backend),
        {"unsloth": unsloth},
    )


def grouped_gemm(model: Model, tokens: int) -> Workload:
    """32 experts of uneven size with adapters."""
    from pantheraml.kernels import grouped_gemm as ours
    from pantheraml.kernels.reference.grouped_gemm import grouped_linear as reference

    width, out = model.hidden // 2, model.hidden // 4

    def make(device: torch.device) -> Inputs:
        counts = torch.multinomial(torch.rand(EXPERTS) + 0.2, tokens, replacement=True).bincount(minlength=EXPERTS)
        return {
            "x": randn(tokens, width, device=device),
            "weight": randn(EXPERTS, out, width, device=device, scale=0.02),
            "ends": counts.cumsum(0).to(device=device, dtype=torch.int32),
            "A": randn(EXPERTS, RANK, width, device=device, scale=0.02),
            "B": randn(EXPERTS, out, RANK, device=device, scale=0.02),
        }

    flops = 2.0 * tokens * width * out
    return Workload(
        f"G={EXPERTS} {width}→{out} r={RANK}",
        make,
        ("x", "A", "B"),
        {
            "ours": lambda: lambda x, weight, ends, A, B: ours(x, weight, ends, A, B, SCALING),
            "eager": lambda: lambda x, weight, ends, A, B: reference(x, weight, ends, A, B, SCALING),
        },
        forward_flops=flops,
        backward_flops=flops,
        tolerance=4e-2,
    )


def _stacked(x, W1, W2, A1, B1, A2, B2, experts, weights):
    """What transformers' grouped experts and PEFT's adapters on them compute: the update joins the whole stack."""
    up, down = (torch.baddbmm(W, B.to(W), A.to(W), alpha=SCALING) for W, A, B in ((W1, A1, B1), (W2, A2, B2)))
    flat, order = experts.reshape(-1).sort()
    counts = torch.histc(flat.int() if x.is_cuda else flat.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = x[order // CHOICES]
    gate, lifted = torch._grouped_mm(rows, up.transpose(1, 2), offs=ends).chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * lifted, down.transpose(1, 2), offs=ends)
    y = y * weights.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(len(x), CHOICES, -1).sum(1)


def experts_mlp(model: Model, tokens: int) -> Workload:
    """32 gated MLPs, two a token, with adapters on both stacks."""
    from pantheraml.kernels import Stack
    from pantheraml.kernels import experts_mlp as ours

    hidden, inner = model.hidden // 2, model.hidden // 4

    def make(device: torch.device) -> Inputs:
        chosen = torch.rand(tokens, EXPERTS).topk(CHOICES, 1)
        return {
            "x": randn(tokens, hidden, device=device),
            "W1": randn(EXPERTS, 2 * inner, hidden, device=device, scale=0.02),
            "W2": randn(EXPERTS, hidden, inner, device=device, scale=0.02),
            "A1": randn(EXPERTS, RANK, hidden, device=device, scale=0.02),
            "B1": randn(EXPERTS, 2 * inner, RANK, device=device, scale=0.02),
            "A2": randn(EXPERTS, RANK, inner, device=device, scale=0.02),
            "B2": randn(EXPERTS, hidden, RANK, device=device, scale=0.02),
            "experts": chosen.indices.to(device),
            "weights": chosen.values.to(device, DTYPE),
        }

    def fused(x, W1, W2, A1, B1, A2, B2, experts, weights):
        return ours(x, experts, weights, Stack(W1, None, A1, B1, SCALING), Stack(W2, None, A2, B2, SCALING))

    flops = 2.0 * tokens * CHOICES * 3 * hidden * inner
    return Workload(
        f"G={EXPERTS} K={CHOICES} {hidden}→{inner} r={RANK}",
        make,
        ("x", "A1", "B1", "A2", "B2"),
        {"ours": lambda: fused, "eager": lambda: _stacked},
        forward_flops=flops,
        backward_flops=flops,
        tolerance=6e-2,
    )


OPS = {
    "lora_gate": lora_gate,
    "lora_down": lora_down,
    "lora_q": lora_q,
    "lora_k": lora_k,
    "lora_qkv": lora_qkv,
    "lora_mlp": lora_mlp,
    "grouped_gemm": grouped_gemm,
    "experts_mlp": experts_mlp,
}

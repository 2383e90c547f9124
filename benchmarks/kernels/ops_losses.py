"""Workloads of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from workload import BARE, DTYPE, Contender, Inputs, Model, Workload, randn

# The largest logits that eager and its float32 copies leave room for on 80 GB.
MAX_EAGER_LOGITS = 8192 * 256_000


def cross_entropy(model: Model, tokens: int) -> Workload:
    """Over logits, the gradient apart from them."""
    from pantheraml.kernels import cross_entropy as ours

    vocabulary = model.vocabulary

    def make(device: torch.device) -> Inputs:
        return {
            "logits": randn(tokens, vocabulary, device=device),
            "labels": torch.randint(0, vocabulary, (tokens,), device=device),
        }

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as Function

        return lambda logits, labels: Function.apply(logits, labels, None)[0]

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import fast_cross_entropy_loss

        return lambda logits, labels: fast_cross_entropy_loss(logits[None], labels[None])

    contenders: dict[str, Contender] = {"ours": lambda: ours, "liger": liger, "unsloth": unsloth}
    if tokens * vocabulary <= MAX_EAGER_LOGITS:
        contenders["eager"] = lambda: lambda logits, labels: torch.nn.functional.cross_entropy(logits.float(), labels)
    size = tokens * vocabulary * DTYPE.itemsize
    return Workload(f"V={vocabulary}", make, ("logits",), contenders, size, 2 * size)


class _BareHead(torch.autograd.Function):
    """The products that a frozen head cannot do without, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden, weight):
        parts = []
        # in pieces whose logits fit anywhere
        for piece in hidden.split(8192):
            logits = torch.mm(piece, weight.t())
            parts.append(torch.mm(logits, weight))
        ctx.save_for_backward(torch.cat(parts) if len(parts) > 1 else parts[0])
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad):
        return ctx.saved_tensors[0], None


def _linear_cross_entropy(model: Model, tokens: int, leaves: tuple[str, ...], products: int) -> Workload:
    from pantheraml.kernels import linear_cross_entropy as ours

    vocabulary, width = model.vocabulary, model.hidden

    def make(device: torch.device) -> Inputs:
        return {
            "hidden": randn(tokens, width, device=device),
            "weight": randn(vocabulary, width, device=device, scale=0.02),
            "labels": torch.randint(0, vocabulary, (tokens,), device=device),
        }

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

        return lambda hidden, weight, labels: Function.apply(hidden, weight, labels)[0]

    def eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)

    contenders: dict[str, Contender] = {"ours": lambda: ours, "liger": liger}
    if tokens * vocabulary <= MAX_EAGER_LOGITS:
        contenders["eager"] = lambda: eager
    if leaves == ("hidden",):
        contenders[BARE] = lambda: lambda hidden, weight, labels: _BareHead.apply(hidden, weight)
    flops = 2.0 * products * tokens * vocabulary * width
    return Workload(f"H={width} V={vocabulary}", make, leaves, contenders, forward_flops=flops, tolerance=4e-2)


def linear_cross_entropy(model: Model, tokens: int) -> Workload:
    """Frozen head."""
    return _linear_cross_entropy(model, tokens, ("hidden",), 2)


def linear_cross_entropy_trained(model: Model, tokens: int) -> Workload:
    """With the head's gradient."""
    return _linear_cross_entropy(model, tokens, ("hidden", "weight"), 3)


OPS = {
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_trained": linear_cross_entropy_trained,
}

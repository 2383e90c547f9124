"""Gated MLPs of a mixture of experts as one node of the graph, with low-rank adapters on the experts.

For each token t, the experts e = experts[t, k] that it chose and their weights w[t, k]::

    out[t] = sum_k w[t, k] * down[e](glu(up[e](x[t])))         up, down: as in ``grouped_gemm``

Kept for the backward: x, the weights, where tokens went, the outputs of ``up`` and the adapters' skinny products. Rows
of x are gathered again, the gated product is computed again, and the outputs of ``down`` are not needed: with
``d_hidden[i] = dout[t] @ Down[e]`` of the row i of t and k, the gradient of its weight is ``hidden[i] . d_hidden[i]``
(and ``dout[t] . bias[e]``). Stacks in 4 bits are made dense for each product, one after the other, and never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ArgumentError, ConfigError
from . import dispatch
from ._once import once_differentiable
from .four_bit_stack import FourBitStack, dense
from .glu import packed_glu
from .grouped_gemm import (
    Stack,
    StackNeeds,
    check_stack,
    grouped_project,
    grouped_project_backward,
    require_kernel,
)
from .reference import grouped_gemm as reference
from .routing import Routing, combine, route, weigh_

_STACK = 4
# Of both stacks, what is no tensor of the graph.
_Rests = tuple[tuple[float, FourBitStack | None], tuple[float, FourBitStack | None]]


class _ExpertsMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        routing: Routing,
        rests: _Rests,
        options: Mapping[str, Any],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        backend = options["backend"]
        up, down = _stacks(tensors, rests)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.index_select(0, routing.order // routing.choices)
            gate_up, skinny = grouped_project(rows, routing.ends, up, backend)
            del rows
            hidden = packed_glu(gate_up, **options)
            y, down_skinny = grouped_project(hidden, routing.ends, down, backend)
            del hidden
            out = combine(y, routing.inverse, routing.choices, weights, backend=backend)
        ctx.save_for_backward(x, weights, *routing[:3], gate_up, skinny, down_skinny, *tensors)
        ctx.rests, ctx.options, ctx.choices = rests, options, routing.choices
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weights, order, inverse, ends, gate_up, skinny, down_skinny, *tensors = ctx.saved_tensors
        need_x, need_weights, _, _, _, *flags = ctx.needs_input_grad
        up, down = _stacks(tensors, ctx.rests)
        up_needs, down_needs = StackNeeds(*flags[:_STACK]), StackNeeds(*flags[_STACK:])
        inner = need_x or any(up_needs)
        options, backend = ctx.options, ctx.options["backend"]
        grad_weights = grad_x = None
        up_grads: tuple[torch.Tensor | None, ...] = (None,) * _STACK
        with torch.autocast(x.device.type, enabled=False):
            tokens = order // ctx.choices
            grad = upstream[0].index_select(0, tokens)
            row_weights = weights.reshape(-1).index_select(0, order)
            gate_up = gate_up.detach().requires_grad_(inner)
            with torch.set_grad_enabled(inner):
                hidden = packed_glu(gate_up, **options)
            # Rows count by their weights; the product with the bare ones gives the gradient of the weights as well.
            d_hidden, down_grads = grouped_project_backward(
                grad,
                hidden.detach(),
                down_skinny,
                ends,
                down,
                down_needs,
                need_x=inner or need_weights,
                row_weights=row_weights,
                backend=backend,
            )
            if d_hidden is not None:
                dots = weigh_(hidden.detach(), d_hidden, order, weights, backend=backend)
                if need_weights:
                    grad_weights = _of_weights(dots, grad, down.bias, ends, inverse, weights)
            del grad
            if inner:
                (d_gate_up,) = torch.autograd.grad(hidden, gate_up, d_hidden)
                del hidden, d_hidden, gate_up
                rows = x.index_select(0, tokens) if up_needs.weight or up_needs.A else None
                d_rows, up_grads = grouped_project_backward(
                    d_gate_up, rows, skinny, ends, up, up_needs, need_x=need_x, backend=backend
                )
                if d_rows is not None:
                    grad_x = combine(d_rows, inverse, ctx.choices, backend=backend)
        return grad_x, grad_weights, None, None, None, *up_grads, *down_grads


def _of_weights(
    dots: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    inverse: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the weights [T, K] from the products of rows, to which the bias of ``down`` adds its own."""
    if bias is not None:
        group = torch.searchsorted(ends, torch.arange(len(dots), device=ends.device, dtype=ends.dtype), right=True)
        dots = dots + torch.linalg.vecdot(grad.to(dots.dtype), bias.to(dots.dtype)[group])
    return dots.index_select(0, inverse).view(weights.shape).to(weights.dtype)


def _stacks(tensors: Any, rests: _Rests) -> tuple[Stack, Stack]:
    return Stack.of(tensors[:_STACK], rests[0]), Stack.of(tensors[_STACK:], rests[1])


def experts_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: Stack,
    down: Stack,
    activation: str = "silu",
    *,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Weighted sum of the gated MLPs that each token chose, as one node; the formula stands at the top of this file.

    In the dtype of ``x`` with float32 sums: inside the products, over a token's experts, and in the gradient of x over
    them. Weights and adapters may have other dtypes, are cast for the products, and get gradients in their own.
    Deterministic. It can be differentiated once.

    Args:
        x: [T, H].
        experts: [T, K], int64 or int32 in [0, G).
        weights: [T, K], floating; they get a gradient.
        up: [G, 2 I, H], gate and up in one; trained, frozen (also in 4 bits), or with adapters.
        down: [G, H, I].
        activation: As in ``packed_glu``, like the remaining options. Default ``"silu"``.
        interleaved: As in ``packed_glu``.
        limit: As in ``packed_glu``.
        alpha: As in ``packed_glu``.
        up_offset: As in ``packed_glu``.
        backend: As in ``grouped_gemm``.

    Returns:
        [T, H].

    Raises:
        ArgumentError: ``experts`` does not hold integers.
        ConfigError: Shapes or options do not fit.
        UnsupportedError: ``backend="triton"`` for a dtype or device that the kernels do not take.
    """
    where = "experts_mlp"
    if x.dim() != 2 or experts.dim() != 2 or experts.shape[0] != x.shape[0]:
        raise ConfigError(f"experts {list(experts.shape)} do not fit x {list(x.shape)}", where=where)
    if weights.shape != experts.shape or not weights.is_floating_point():
        raise ConfigError(
            f"weights {list(weights.shape)} ({weights.dtype}) do not fit experts {list(experts.shape)}", where=where
        )
    if experts.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"experts must be int64 or int32, not {experts.dtype}", where=where)
    groups = up.weight.shape[0]
    check_stack(where, x.shape[1], groups, up)
    check_stack(where, up.weight.shape[1] // 2, groups, down)
    if down.weight.shape[1] != x.shape[1]:
        raise ConfigError(f"down {list(down.weight.shape)} does not lead back to x {list(x.shape)}", where=where)
    shape = {"interleaved": interleaved, "limit": limit, "alpha": alpha, "up_offset": up_offset}
    if backend == "reference":
        up, down = (stack._replace(weight=dense(stack.weight, x.dtype)) for stack in (up, down))
        return reference.experts_mlp(x, experts, weights, up, down, activation, **shape)
    if backend == "triton":
        require_kernel(where, x)
    options = {"activation": activation, **shape, "backend": backend}
    if not torch.is_grad_enabled() and 0 < experts.numel() < groups:
        experts, (up, down) = _chosen_only(experts, (up, down))
        groups = up.weight.shape[0]
    rests = up.rest, down.rest
    return _ExpertsMLP.apply(x, weights, route(experts, groups), rests, options, *up.tensors, *down.tensors)


def _chosen_only(experts: torch.Tensor, stacks: tuple[Stack, Stack]) -> tuple[torch.Tensor, tuple[Stack, Stack]]:
    """For fewer rows than experts: an expert for each row, so that only these have to be made dense.

    Which they are stays on the device; an expert that two tokens chose is made twice.
    """
    packed = [stack.weight for stack in stacks]
    if not all(isinstance(weight, FourBitStack) and weight.divisible for weight in packed):
        return experts, stacks
    rows = experts.reshape(-1).long()

    def of_rows(stack: Stack) -> Stack:
        assert isinstance(stack.weight, FourBitStack)
        bias, A, B = (None if t is None else t.index_select(0, rows) for t in stack.tensors[1:])
        return Stack(stack.weight.chosen(rows), bias, A, B, stack.scaling)

    one_each = torch.arange(len(rows), device=rows.device).view(experts.shape)
    return one_each, (of_rows(stacks[0]), of_rows(stacks[1]))

"""Rows of tokens to the experts that they chose, and back.

With ``order`` and ``inverse`` from ``route``, K choices a token and float32 sums::

    permute:    rows[i]   = x[order[i] // K]
    unpermute:  out[t]    = sum_k weights[t, k] * rows[inverse[t * K + k]]
    weigh:      dots[i]   = sum_j left[i, j] * right[i, j]        right[i, j] *= weights[order[i]]

Each output has one writer, and its sum one order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, ConfigError
from . import dispatch
from ._once import once_differentiable
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .utils import cdiv, next_power_of_2

# Columns of a program, and what it runs with: it waits for memory only.
BLOCK = 1024
NUM_WARPS = 4


class Routing(NamedTuple):
    """Where tokens go and come back from.

    Attributes:
        order: [T * K], for each sorted row the slot ``token * K + choice`` it came from.
        inverse: [T * K], for each slot its sorted row.
        ends: [G] int32, the row after the last of each expert.
        choices: K, experts a token chose.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor
    choices: int


@jit
def combine_kernel(
    rows,
    inverse,
    weights,
    out,
    width,
    choices,
    rows_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """``out[t] = sum_k weights[t, k] * rows[inverse[t * K + k]]``; a weight is 1 where there are none."""
    i_token = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < width
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for k in range(choices):
        i_slot = i_token * choices + k
        i_row = tl.load(inverse + i_slot).to(tl.int64)
        b_row = tl.load(rows + i_row * rows_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
        if weights is not None:
            b_row *= tl.load(weights + i_slot).to(tl.float32)
        b_sum += b_row
    tl.store(out + i_token * out_stride + o_column, b_sum.to(out.dtype.element_ty), mask=m_column)


@jit
def weigh_kernel(
    left,
    right,
    order,
    weights,
    dots,
    width,
    left_stride,
    right_stride,
    BLOCK: tl.constexpr,
):
    """``dots[i] = sum_j left[i, j] right[i, j]``, then ``right[i, j] *= weights[order[i]]``, in float32."""
    i_row = tl.program_id(0).to(tl.int64)
    b_weight = tl.load(weights + tl.load(order + i_row)).to(tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_column = o_column < width
        b_left = tl.load(left + i_row * left_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
        p_right = right + i_row * right_stride + o_column
        b_right = tl.load(p_right, mask=m_column, other=0.0).to(tl.float32)
        b_sum += b_left * b_right
        tl.store(p_right, (b_right * b_weight).to(right.dtype.element_ty), mask=m_column)
    tl.store(dots + i_row, tl.sum(b_sum, 0))


def combine(
    rows: torch.Tensor,
    inverse: torch.Tensor,
    choices: int,
    weights: torch.Tensor | None = None,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Launch the sum over each token's rows; not differentiable.

    Args:
        rows: [T * K, H], contiguous rows.
        inverse: [T * K], for each slot its row.
        choices: K.
        weights: [T, K], contiguous, or None for ones.
        backend: See ``dispatch.resolve``.

    Returns:
        [T, H] in the dtype of ``rows``.
    """
    count, width = inverse.shape[0] // choices, rows.shape[1]
    if dispatch.resolve("unpermute", rows, backend) == "reference":
        wide = torch.promote_types(torch.float32, rows.dtype)
        gathered = rows.index_select(0, inverse).view(count, choices, width)
        if weights is None:
            return gathered.sum(1, dtype=wide).to(rows.dtype)
        return torch.bmm(weights.to(wide).unsqueeze(1), gathered.to(wide))[:, 0].to(rows.dtype).detach()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    block = min(BLOCK, next_power_of_2(width))
    if out.numel():
        with on_device(rows):
            combine_kernel[(count, cdiv(width, block))](
                rows=rows,
                inverse=inverse,
                weights=None if weights is None else weights.contiguous(),
                out=out,
                width=width,
                choices=choices,
                rows_stride=rows.stride(0),
                out_stride=out.stride(0),
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
    return out


def weigh_(
    left: torch.Tensor,
    right: torch.Tensor,
    order: torch.Tensor,
    weights: torch.Tensor,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """The products of the rows of ``left`` and ``right``, and ``right`` times its rows' weights in its own memory.

    Args:
        left: [M, W], contiguous rows.
        right: [M, W] of the same dtype, contiguous rows; overwritten.
        order: [M], for each row the slot whose weight it gets.
        weights: [T, K], contiguous.
        backend: See ``dispatch.resolve``.

    Returns:
        [M], float32 (float64 for float64), before the weights.
    """
    if dispatch.resolve("unpermute", left, backend) == "reference":
        wide = torch.promote_types(torch.float32, left.dtype)
        dots = torch.linalg.vecdot(left.to(wide), right.to(wide))
        right.copy_(right.to(wide) * weights.reshape(-1)[order].to(wide).unsqueeze(1))
        return dots
    dots = torch.empty(left.shape[0], dtype=torch.float32, device=left.device)
    if dots.numel():
        with on_device(left):
            weigh_kernel[(left.shape[0],)](
                left=left,
                right=right,
                order=order,
                weights=weights.contiguous(),
                dots=dots,
                width=left.shape[1],
                left_stride=left.stride(0),
                right_stride=right.stride(0),
                BLOCK=min(BLOCK, next_power_of_2(max(left.shape[1], 1))),
                num_warps=NUM_WARPS,
            )
    return dots


def route(experts: torch.Tensor, num_experts: int) -> Routing:
    """Sort the choices of all tokens by expert, stably; nothing is read back from the device.

    Args:
        experts: [T, K], integers in [0, num_experts).
        num_experts: Number of experts, G.

    Returns:
        The routing.

    Raises:
        ConfigError: ``experts`` is no matrix.
        ArgumentError: It does not hold integers.
    """
    if experts.dim() != 2:
        raise ConfigError(f"experts must be [tokens, choices], not {list(experts.shape)}", where="route")
    if experts.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"experts must be int64 or int32, not {experts.dtype}", where="route")
    flat = experts.reshape(-1)
    ranked, order = flat.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    bounds = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(ranked, bounds, right=True).to(torch.int32)
    return Routing(order, inverse, ends, experts.shape[1])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, routing: Routing, backend: dispatch.Backend) -> torch.Tensor:
        ctx.save_for_backward(routing.inverse)
        ctx.choices, ctx.backend = routing.choices, backend
        return x.index_select(0, routing.order // routing.choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        # Autograd's own index_add would add with atomics, in no fixed order.
        return combine(upstream[0], inverse, ctx.choices, backend=ctx.backend), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weights: torch.Tensor, routing: Routing, backend: dispatch.Backend
    ) -> torch.Tensor:
        ctx.save_for_backward(y, weights, routing.order, routing.inverse)
        return combine(y, routing.inverse, routing.choices, weights, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        y, weights, order, inverse = ctx.saved_tensors
        wide = torch.promote_types(torch.float32, y.dtype)
        rows = upstream[0].index_select(0, order // weights.shape[1]).to(wide)
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_y = (rows * weights.reshape(-1)[order].to(wide).unsqueeze(1)).to(y.dtype)
        if ctx.needs_input_grad[1]:
            products = torch.linalg.vecdot(rows, y.to(wide))
            grad_weights = products[inverse].view(weights.shape).to(weights.dtype)
        return grad_y, grad_weights, None, None


def permute(x: torch.Tensor, routing: Routing, *, backend: dispatch.Backend = "auto") -> torch.Tensor:
    """Copy each token's row once for each expert it chose, sorted by expert. The gradient is summed in float32.

    Args:
        x: [T, H].
        routing: From ``route``.
        backend: Of the gradient's sum; see ``dispatch.resolve``.

    Returns:
        [T * K, H]. Deterministic.

    Raises:
        ConfigError: The routing is of another number of tokens.
    """
    if x.dim() != 2 or x.shape[0] * routing.choices != routing.order.shape[0]:
        raise ConfigError(f"x {list(x.shape)} does not fit a routing of {routing.order.shape[0]} rows", where="permute")
    return _Permute.apply(x, routing, backend)


def unpermute(
    y: torch.Tensor, routing: Routing, weights: torch.Tensor, *, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """Weighted sum of each token's rows, in float32, rounded to the dtype of ``y``.

    Args:
        y: [T * K, H], sorted by expert.
        routing: From ``route``.
        weights: [T, K], the router's; they get a gradient.
        backend: See ``dispatch.resolve``.

    Returns:
        [T, H]. Deterministic.

    Raises:
        ConfigError: The shapes do not fit.
    """
    if weights.shape[1:] != (routing.choices,) or y.dim() != 2 or y.shape[0] != routing.order.shape[0]:
        raise ConfigError(
            f"y {list(y.shape)} and weights {list(weights.shape)} do not fit the routing", where="unpermute"
        )
    if y.shape[0] != weights.numel():
        raise ConfigError(f"weights {list(weights.shape)} do not fit y {list(y.shape)}", where="unpermute")
    return _Unpermute.apply(y, weights, routing, backend)


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    for dtype in ("fp16", "bf16", "fp32"):
        p, minimum = f"*{dtype}", bfloat16_minimum(dtype)
        common = {"num_warps": NUM_WARPS, "minimum": minimum, "representative": dtype == "bf16"}
        sizes = {"width": "i32", "choices": "i32", "rows_stride": "i32", "out_stride": "i32"}
        for weights in (p, None):
            yield Variant(
                f"routing_combine-{dtype}{'' if weights is None else '-weighted'}",
                combine_kernel,
                {"rows": p, "inverse": "*i64", "out": p, **sizes} | ({} if weights is None else {"weights": weights}),
                {"BLOCK": BLOCK} | ({"weights": None} if weights is None else {}),
                **common,
            )
        yield Variant(
            f"routing_weigh-{dtype}",
            weigh_kernel,
            {"left": p, "right": p, "order": "*i64", "weights": p, "dots": "*fp32"}
            | {"width": "i32", "left_stride": "i32", "right_stride": "i32"},
            {"BLOCK": BLOCK},
            **common,
        )

"""Mixture-of-experts products: sort tokens by expert, multiply each group by its expert's matrix, bring them back.

Every group's product runs in one launch of torch's grouped matrix product where it serves the dtype and the chip, and
one after another otherwise. The backward is written by hand: frozen experts get no gradient work, and adapters keep
only the skinny product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..errors import ArgumentError, ConfigError, UnsupportedError
from . import dispatch
from .reference import grouped_gemm as reference

# torch._grouped_mm reads rows in 16-byte pieces.
ALIGNMENT_BYTES = 16
GROUPED_CAPABILITY = (9, 0)


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
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, choices: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = (x.shape[0], choices, x.shape[1])
        return x.index_select(0, order // choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        wide = torch.promote_types(torch.float32, upstream[0].dtype)
        # A gather and a sum of K rows: autograd's own index_add would add with atomics, in no fixed order.
        rows = upstream[0].index_select(0, inverse).view(ctx.shape)
        return rows.sum(1, dtype=wide).to(upstream[0].dtype), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        wide = torch.promote_types(torch.float32, y.dtype)
        ctx.save_for_backward(y, weights, order, inverse)
        rows = y.index_select(0, inverse).view(*weights.shape, y.shape[1])
        return torch.einsum("tkh,tk->th", rows.to(wide), weights.to(wide)).to(y.dtype)

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


def permute(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Copy each token's row once for each expert it chose, sorted by expert. The gradient is summed in float32.

    Args:
        x: [T, H].
        routing: From ``route``.

    Returns:
        [T * K, H]. Deterministic.

    Raises:
        ConfigError: The routing is of another number of tokens.
    """
    if x.dim() != 2 or x.shape[0] * routing.choices != routing.order.shape[0]:
        raise ConfigError(f"x {list(x.shape)} does not fit a routing of {routing.order.shape[0]} rows", where="permute")
    return _Permute.apply(x, routing.order, routing.inverse, routing.choices)


def unpermute(y: torch.Tensor, routing: Routing, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows, in float32, rounded to the dtype of ``y``.

    Args:
        y: [T * K, H], sorted by expert.
        routing: From ``route``.
        weights: [T, K], the router's; they get a gradient.

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
    return _Unpermute.apply(y, weights, routing.order, routing.inverse)


def _one_launch(*tensors: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these factors: bf16 on a Hopper GPU or later, in 16-byte pieces."""
    first = tensors[0]
    if not first.is_cuda or torch.version.hip is not None or not hasattr(torch, "_grouped_mm"):
        return False
    if torch.cuda.get_device_capability(first.device) < GROUPED_CAPABILITY:
        return False
    for tensor in tensors:
        strides = tensor.stride()
        contiguous = strides[-1] == 1 or strides[-2] == 1
        rest = [stride for stride, size in zip(strides, tensor.shape) if stride != 1 and size != 1]
        aligned = all(stride * tensor.itemsize % ALIGNMENT_BYTES == 0 for stride in rest)
        if tensor.dtype != torch.bfloat16 or not contiguous or not aligned or tensor.data_ptr() % ALIGNMENT_BYTES:
            return False
    return first.shape[0] > 0


def _rows_times(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``x[i] @ matrices[g]`` for the rows of each group: [M, N] from [M, K] and [G, K, N]."""
    if _one_launch(x, matrices):
        return torch._grouped_mm(x, matrices, offs=ends)
    out = x.new_empty((x.shape[0], matrices.shape[2]))
    start = 0
    for matrix, end in zip(matrices, ends.tolist()):
        torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    return out


def _columns_times(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``left[rows of g].T @ right[rows of g]``: [G, P, Q] from [M, P] and [M, Q]."""
    if _one_launch(left, right):
        return torch._grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty((ends.shape[0], left.shape[1], right.shape[1]))
    start = 0
    for group, end in enumerate(ends.tolist()):
        torch.mm(left[start:end].t(), right[start:end], out=out[group])
        start = end
    return out


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        A: torch.Tensor | None,
        B: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        dtype = x.dtype
        skinny = None
        with torch.autocast(x.device.type, enabled=False):
            y = _rows_times(x, weight.to(dtype).transpose(1, 2), ends)
            if A is not None and B is not None:
                skinny = _rows_times(x, A.to(dtype).transpose(1, 2), ends)
                y.add_(_rows_times(skinny, B.to(dtype).transpose(1, 2), ends), alpha=scaling)
        keep_x = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None
        ctx.save_for_backward(keep_x, weight, ends, A, B, skinny if ctx.needs_input_grad[4] else None)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, ends, A, B, skinny = ctx.saved_tensors
        need_x, need_weight, _, need_A, need_B, _ = ctx.needs_input_grad
        grad = upstream[0].contiguous()
        dtype = grad.dtype
        grad_x = grad_weight = grad_A = grad_B = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_x:
                grad_x = _rows_times(grad, weight.to(dtype), ends)
            if need_weight:
                grad_weight = _columns_times(grad, x, ends).to(weight.dtype)
            if A is not None and B is not None and (need_x or need_A):
                thin = _rows_times(grad, B.to(dtype), ends).mul_(ctx.scaling)
                if grad_x is not None:
                    grad_x.add_(_rows_times(thin, A.to(dtype), ends))
                if need_A:
                    grad_A = _columns_times(thin, x, ends).to(A.dtype)
            if B is not None and need_B:
                grad_B = _columns_times(grad, skinny, ends).mul_(ctx.scaling).to(B.dtype)
        return grad_x, grad_weight, None, grad_A, grad_B, None


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``y[i] = x[i] @ W[g].T + scaling * (x[i] @ A[g].T) @ B[g].T`` for the rows ``i`` of each group ``g``.

    In the dtype of ``x`` with float32 sums inside the products. bf16 on a Hopper GPU or later, with widths of whole 16
    bytes, runs each product in one launch; anything else runs one product a group, which reads ``ends`` back. It can be
    differentiated once.

    Args:
        x: [M, I], rows sorted by group, as ``permute`` gives them.
        weight: [G, O, I], trained or frozen; a transposed view of [G, I, O] is taken as it is.
        ends: [G] int32, the row after the last of each group, from ``route``; ``ends[-1]`` is M.
        A: [G, r, I] or None (default) without adapters.
        B: [G, O, r] or None.
        scaling: Factor of the update. Default 1.
        backend: ``"auto"`` as above, or ``"reference"``; there is no Triton kernel.

    Returns:
        [M, O].

    Raises:
        ConfigError: Shapes do not fit.
        UnsupportedError: ``backend="triton"``.
    """
    where = "grouped_gemm"
    if backend == "triton":
        raise UnsupportedError(f"{where} has no Triton kernel", where="backend", hint="use backend='auto'")
    groups = ends.shape[0]
    shapes = {"x": x, "weight": weight, "A": A, "B": B}
    described = ", ".join(f"{name} {list(t.shape)}" for name, t in shapes.items() if t is not None)
    fits = x.dim() == 2 and weight.dim() == 3 and weight.shape[0] == groups and weight.shape[2] == x.shape[1]
    if (A is None) != (B is None):
        raise ConfigError("A and B come together", where=where)
    if A is not None and B is not None:
        rank = A.shape[1] if A.dim() == 3 else -1
        fits = fits and A.shape == (groups, rank, x.shape[1]) and B.shape == (groups, weight.shape[1], rank)
    if not fits:
        raise ConfigError(f"{described} and {groups} groups do not fit", where=where)
    if backend == "reference":
        if A is not None and B is not None:
            return reference.lora_grouped_gemm(x, weight, ends, A, B, scaling)
        return reference.grouped_gemm(x, weight.to(x.dtype), ends)
    return _GroupedGemm.apply(x, weight, ends, A, B, scaling)

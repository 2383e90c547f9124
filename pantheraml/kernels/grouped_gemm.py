"""Mixture-of-experts products: each group of rows times its own matrix, with low-rank adapters, in one launch.

For the rows i of each group g, in the dtype of x with float32 sums::

    y[i] = x[i] @ W[g].T + bias[g] + scaling * (x[i] @ A[g].T) @ B[g].T
    dx   = dy @ W[g] + thin @ A[g]           thin = scaling * dy @ B[g]
    dA   = thin.T @ x        dB = scaling * dy.T @ (x @ A[g].T)        dW = dy.T @ x        over the rows of g

The products are those of ``grouped_products``: the adapters' update and a bias are added to a product that is there
already, which saves a pass over the wide result. The backward is written by hand: frozen experts get no gradient work,
and adapters keep only the skinny product. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from .four_bit_stack import FourBitStack, dense
from .grouped_products import DTYPES, columns_times, rows_times
from .reference import grouped_gemm as reference


class Stack(NamedTuple):
    """One linear layer of all experts, with at most one low-rank update.

    Attributes:
        weight: [G, O, I], a tensor or frozen in 4 bits; a transposed view of [G, I, O] is taken as it is.
        bias: [G, O] or None.
        A: [G, r, I] or None.
        B: [G, O, r] or None.
        scaling: Factor of the update.
    """

    weight: torch.Tensor | FourBitStack
    bias: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    scaling: float = 1.0

    @classmethod
    def of(cls, tensors: Sequence[Any], rest: tuple[float, FourBitStack | None]) -> Stack:
        """The stack of ``tensors`` and ``rest`` as these properties give them."""
        weight, bias, A, B = tensors
        scaling, packed = rest
        return cls(weight if packed is None else packed, bias, A, B, scaling)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Weight, bias, A and B, as far as they may need a gradient."""
        weight, bias, A, B, _ = self
        return None if isinstance(weight, FourBitStack) else weight, bias, A, B

    @property
    def rest(self) -> tuple[float, FourBitStack | None]:
        """The scaling, and a weight in 4 bits."""
        return self.scaling, self.weight if isinstance(self.weight, FourBitStack) else None


def check_stack(where: str, x_width: int, groups: int, stack: Stack) -> None:
    """Raise unless a stack serves ``groups`` experts of inputs of this width.

    Raises:
        ConfigError: Shapes do not fit.
    """
    weight, bias, A, B, _ = stack
    if (A is None) != (B is None):
        raise ConfigError("A and B come together", where=where)
    fits = weight.dim() == 3 and weight.shape[0] == groups and weight.shape[2] == x_width
    if A is not None and B is not None:
        rank = A.shape[1] if A.dim() == 3 else -1
        fits = fits and A.shape == (groups, rank, x_width) and B.shape == (groups, weight.shape[1], rank)
    if bias is not None:
        fits = fits and bias.shape == (groups, weight.shape[1])
    if not fits:
        named = {"weight": weight, "bias": bias, "A": A, "B": B}
        described = ", ".join(f"{name} {list(t.shape)}" for name, t in named.items() if t is not None)
        raise ConfigError(f"{described} do not fit {groups} groups of rows of {x_width}", where=where)


def _factor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An adapter's factor in the compute dtype; PEFT's B lies with its experts innermost, which nothing multiplies."""
    return tensor.to(dtype).contiguous()


def grouped_project(
    x: torch.Tensor, ends: torch.Tensor, stack: Stack, backend: dispatch.Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stack's output [M, O] for x [M, I], and ``x @ A[g].T`` [M, r] for the backward; not differentiable."""
    weight, bias, A, B, scaling = stack
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype).contiguous()
    common: dict[str, Any] = {"backend": backend}
    if A is None or B is None:
        return rows_times(x, dense(weight, dtype).transpose(1, 2), ends, bias=bias, **common), None
    y = rows_times(x, dense(weight, dtype).transpose(1, 2), ends, **common)
    skinny = rows_times(x, _factor(A, dtype).transpose(1, 2), ends, **common)
    rows_times(skinny, _factor(B, dtype).transpose(1, 2), ends, scaling=scaling, bias=bias, base=y, **common)
    return y, skinny


class StackNeeds(NamedTuple):
    """Which of a stack's tensors need a gradient."""

    weight: bool
    bias: bool
    A: bool
    B: bool


def grouped_project_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    skinny: torch.Tensor | None,
    ends: torch.Tensor,
    stack: Stack,
    needs: StackNeeds,
    *,
    need_x: bool,
    row_weights: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor | None, tuple[torch.Tensor | None, ...]]:
    """Gradients of ``grouped_project``.

    Args:
        grad: [M, O], contiguous.
        x: As in the forward; needed when A or the weight is trained.
        skinny: From the forward; needed when B is trained.
        ends: As in the forward.
        stack: As in the forward.
        needs: Which of its tensors need a gradient.
        need_x: Whether x does.
        row_weights: [M], by which rows of ``grad`` count for the stack's own gradients, but not for that of x.
        backend: As in the forward.

    Returns:
        Gradient of x, gradients of weight, bias, A and B.
    """
    weight, bias, A, B, scaling = stack
    dtype = grad.dtype
    common: dict[str, Any] = {"backend": backend}

    def weighted(rows: torch.Tensor) -> torch.Tensor:
        return rows if row_weights is None else rows * row_weights.unsqueeze(1).to(rows.dtype)

    grad_x = grad_weight = grad_bias = grad_A = grad_B = None
    if need_x:
        grad_x = rows_times(grad, dense(weight, dtype), ends, **common)
    if needs.weight:
        assert x is not None
        assert isinstance(weight, torch.Tensor)
        grad_weight = columns_times(grad, weighted(x), ends, weight.dtype, **common)
    if needs.bias and bias is not None:
        wide = torch.promote_types(torch.float32, dtype)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        sums = torch.segment_reduce(weighted(grad.to(wide)), "sum", lengths=lengths, axis=0, initial=0.0)
        grad_bias = sums.to(bias.dtype)
    if A is not None and B is not None and (need_x or needs.A):
        thin = rows_times(grad, _factor(B, dtype), ends, scaling=scaling, **common)
        if grad_x is not None:
            rows_times(thin, _factor(A, dtype), ends, base=grad_x, **common)
        if needs.A:
            assert x is not None
            grad_A = columns_times(weighted(thin), x, ends, A.dtype, **common)
    if B is not None and needs.B:
        assert skinny is not None
        grad_B = columns_times(grad, weighted(skinny), ends, B.dtype, scaling=scaling, **common)
    return grad_x, (grad_weight, grad_bias, grad_A, grad_B)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        ends: torch.Tensor,
        rest: tuple[float, FourBitStack | None],
        backend: dispatch.Backend,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        stack = Stack.of(tensors, rest)
        with torch.autocast(x.device.type, enabled=False):
            y, skinny = grouped_project(x, ends, stack, backend)
        needs = StackNeeds(*ctx.needs_input_grad[4:])
        ctx.save_for_backward(x if needs.weight or needs.A else None, ends, skinny if needs.B else None, *tensors)
        ctx.rest, ctx.backend = rest, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, ends, skinny, *tensors = ctx.saved_tensors
        grad = upstream[0].contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, grads = grouped_project_backward(
                grad,
                x,
                skinny,
                ends,
                Stack.of(tensors, ctx.rest),
                StackNeeds(*ctx.needs_input_grad[4:]),
                need_x=ctx.needs_input_grad[0],
                backend=ctx.backend,
            )
        return grad_x, None, None, None, *grads


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor | FourBitStack,
    ends: torch.Tensor,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``y[i] = x[i] @ W[g].T + bias[g] + scaling * (x[i] @ A[g].T) @ B[g].T`` for the rows ``i`` of each group ``g``.

    In the dtype of ``x`` with float32 sums inside the products. It can be differentiated once.

    Args:
        x: [M, I], rows sorted by group, as ``permute`` gives them.
        weight: [G, O, I], trained or frozen, or frozen in 4 bits; a transposed view of [G, I, O] is taken as it is.
        ends: [G] int32, the row after the last of each group, from ``route``; ``ends[-1]`` is M.
        A: [G, r, I] or None (default) without adapters.
        B: [G, O, r] or None.
        scaling: Factor of the update. Default 1.
        bias: [G, O] or None (default).
        backend: ``"auto"`` takes torch's grouped product or the Triton kernels on a GPU, as told at the top of this
            file, and one product a group elsewhere; ``"triton"`` takes the kernels alone; ``"reference"`` is the
            specification.

    Returns:
        [M, O].

    Raises:
        ConfigError: Shapes do not fit.
        UnsupportedError: ``backend="triton"`` for a dtype or device that the kernels do not take.
    """
    where = "grouped_gemm"
    if x.dim() != 2:
        raise ConfigError(f"x must be [rows, width], not {list(x.shape)}", where=where)
    stack = Stack(weight, bias, A, B, scaling)
    check_stack(where, x.shape[1], ends.shape[0], stack)
    if backend == "triton":
        require_kernel(where, x)
    if backend == "reference":
        return reference.grouped_linear(x, dense(weight, x.dtype), ends, A, B, scaling, bias=bias)
    return _GroupedGemm.apply(x, ends, stack.rest, backend, *stack.tensors)


def require_kernel(where: str, x: torch.Tensor) -> None:
    """Raise unless the kernels take x.

    Raises:
        UnsupportedError: Its dtype or its device is none of theirs.
    """
    dispatch.resolve(where, x, "triton")
    if x.dtype not in DTYPES:
        raise UnsupportedError(
            f"the Triton kernel of {where} multiplies float16 and bfloat16, and x is {x.dtype}",
            where=f"argument backend of {where}",
            hint="use backend='auto'",
        )

"""Linear layers with a frozen base and trained low-rank adapters, with a hand-written backward.

For each projection of an input ``x`` [T, I] with base ``W`` [O, I] and adapter ``A`` [r, I], ``B`` [O, r]::

    y  = x @ W.T + bias + s * (u @ A.T) @ B.T          u = x, or dropout of x
    g  = s * dy @ B
    dx = dy @ W + g @ A        dA = g.T @ u        dB = s * dy.T @ (u @ A.T)

Kept for the backward: ``u``, the skinny ``u @ A.T`` and the parameters as they are; never ``x`` apart from ``u``, a
dequantised weight, or anything of the outputs' size. The adapter's product is written first and the base's product
added to it in that product's epilogue: on an H100 at 8,192 x 4,096 x 4,096 that takes 0.40 ms, the other order 0.44 ms,
the bare product 0.35 ms. Projections of one input share one product with all their A, and one for all their dA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import env
from ..errors import ConfigError, UnsupportedError
from . import dispatch, low_rank
from .fp8 import Fp8Matrix
from .fp8_linear import Fp8Base, Fp8Input, Fp8Weight, Nf4Fp8Weight, fp8_input_gradient, fp8_product
from .nf4 import nf4_dequantize
from .reference import lora as reference
from .reference.nf4 import Quantized4Bit

# Fewer rows are left to torch's products, which take less of the host's time.
KERNEL_ROWS = 512

Weight = torch.Tensor | Quantized4Bit | Fp8Base | Callable[[], torch.Tensor]


class Adapter(NamedTuple):
    """A low-rank update ``scaling * B @ A``.

    Attributes:
        A: [r, in_features].
        B: [out_features, r].
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One linear layer: a frozen base and its adapters.

    Attributes:
        weight: [out_features, in_features] dense, a ``Quantized4Bit``, an ``Fp8Weight`` or ``Nf4Fp8Weight`` (multiplied
            in fp8), or a function that returns the dense weight (8-bit, gathered); it is called again in the backward.
            Frozen.
        adapters: Any number; none is a plain frozen layer.
        bias: [out_features] or None.
        magnitude: DoRA's [out_features] or None; needs exactly one adapter.
    """

    weight: Weight
    adapters: Sequence[Adapter] = field(default_factory=tuple)
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype, backend: dispatch.Backend = "auto") -> torch.Tensor:
        """The weight in ``dtype``."""
        if isinstance(self.weight, Quantized4Bit):
            return nf4_dequantize(self.weight, dtype=dtype, backend=backend)
        if isinstance(self.weight, Fp8Weight | Nf4Fp8Weight):
            return self.weight.dense(dtype, backend)
        return (self.weight if isinstance(self.weight, torch.Tensor) else self.weight()).to(dtype)


class Term(NamedTuple):
    """A projection as the products below take it: at most one adapter, parameters as tensors or None.

    ``grad_dtype`` is the dtype of the gradients of A and B where the tensors here are rounded copies of the parameters;
    None means their own.
    """

    base: Projection
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None
    scaling: float
    backend: dispatch.Backend
    grad_dtype: torch.dtype | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The base weight in ``dtype``."""
        return self.weight.to(dtype) if self.weight is not None else self.base.dense(dtype, self.backend)

    @property
    def fp8(self) -> Fp8Base | None:
        """The base weight when it is multiplied in fp8."""
        return self.base.weight if isinstance(self.base.weight, Fp8Weight | Nf4Fp8Weight) else None

    @property
    def rank(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.A is None else self.A.shape[0]


class TermGradients(NamedTuple):
    """Gradients of one term's parameters."""

    bias: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None
    weight: torch.Tensor | None = None


class Needs(NamedTuple):
    """Which of one term's parameters need a gradient."""

    bias: bool
    A: bool
    B: bool
    weight: bool = False


def joined_A(terms: Sequence[Term], dtype: torch.dtype | None) -> torch.Tensor | None:
    """All A of the terms below one another, [sum of ranks, I], in ``dtype`` (None: as they are)."""
    factors = [term.A if dtype is None else term.A.to(dtype) for term in terms if term.A is not None]
    if not factors:
        return None
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _pieces(terms: Sequence[Term]) -> list[slice]:
    """Where each term's columns lie in ``u @ joined_A.T``."""
    pieces, start = [], 0
    for term in terms:
        pieces.append(slice(start, start + term.rank))
        start += term.rank
    return pieces


def by_kernels(wide: torch.Tensor, terms: Sequence[Term]) -> bool:
    """Whether Triton's kernels make the thin products beside this wide factor [T, W], or torch does."""
    backend = terms[0].backend
    rank = sum(term.rank for term in terms)
    if not low_rank.serves(wide, rank) or (backend == "auto" and wide.shape[0] < KERNEL_ROWS):
        return False
    return dispatch.resolve("lora_linear", wide, backend) == "triton"


def thin_product(
    u: torch.Tensor, terms: Sequence[Term], A: torch.Tensor | None = None, *, kernels: bool | None = None
) -> torch.Tensor | None:
    """``u @ A.T`` [T, sum of ranks] of all terms, None without adapters.

    Args:
        u: The adapters' input [T, I].
        terms: The projections.
        A: What ``joined_A`` would return, for a caller that has it.
        kernels: What ``by_kernels`` would return, for a caller that has asked.
    """
    A = joined_A(terms, None) if A is None else A
    if A is None:
        return None
    kernels = by_kernels(u, terms) if kernels is None else kernels
    return low_rank.narrow(u, A) if kernels else torch.mm(u, A.to(u.dtype).t())


def project(
    x: torch.Tensor,
    u: torch.Tensor,
    terms: Sequence[Term],
    *,
    A: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    rows: Fp8Matrix | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Outputs of all terms for ``x`` [T, I], and ``u @ A.T`` for the backward.

    Args:
        x: The bases' input [T, I].
        u: The adapters' input [T, I]: x, or dropout of x.
        terms: The projections.
        A: What ``joined_A`` would return, for a caller that has it.
        residual: [T, O], added to the output; for one term.
        out: [T, O], receives the output; for one term.
        rows: x quantised row by row, where a kernel before has done it and a base is multiplied in fp8.
    """
    dtype = x.dtype
    kernels = by_kernels(u, terms)
    skinny = thin_product(u, terms, A, kernels=kernels)
    outputs = []
    shared = Fp8Input(x, rows)
    for term, piece in zip(terms, _pieces(terms)):
        added = None if term.bias is None else term.bias.to(dtype)
        if residual is not None:
            added = residual if added is None else residual + added
        columns = None if term.B is None or skinny is None else skinny[:, piece]
        if term.fp8 is not None:
            # A product of fp8 factors takes no summand but a bias, so what is added comes after.
            y = fp8_product(shared, term.fp8, backend=term.backend)
            if columns is not None:
                if added is not None:
                    y += added
                added = y
            elif added is not None or out is not None:
                y = torch.add(y, 0 if added is None else added, out=out)
            outputs.append(y if columns is None else _update(columns, term, added, out, kernels=kernels))
        elif columns is not None:
            y = _update(columns, term, added, out, kernels=kernels)
            outputs.append(y.addmm_(x, term.dense(dtype).t()))
        elif added is None or added.dim() == 1:
            y = functional.linear(x, term.dense(dtype), added) if out is None else None
            if y is None:
                y = torch.mm(x, term.dense(dtype).t(), out=out)
                y = y if added is None else y.add_(added)
            outputs.append(y)
        else:
            outputs.append(torch.addmm(added, x, term.dense(dtype).t(), out=out))
    return outputs, skinny


def _update(
    columns: torch.Tensor, term: Term, added: torch.Tensor | None, out: torch.Tensor | None, *, kernels: bool
) -> torch.Tensor:
    """``scaling * columns @ B.T + added``, to which a dense base's product is added."""
    assert term.B is not None
    rows, dtype = columns.shape[0], columns.dtype
    if kernels:
        base = added if added is None or added.dim() == 2 else added.expand(rows, -1)
        return low_rank.widen(columns, term.B, term.scaling, base=base, out=out)
    B = term.B.to(dtype).t()
    if added is not None:
        return torch.addmm(added, columns, B, alpha=term.scaling, out=out)
    return _scaled_product(columns, B, term.scaling, columns.new_empty((rows, B.shape[1])) if out is None else out)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` with ``scaling * left @ right`` in one launch."""
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0) -> torch.Tensor:
    """``scaling * left @ right`` in ``dtype``, from the matrix unit's float32 sums where it can give them."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.float16, torch.bfloat16):
        product = torch.mm(left, right, out_dtype=dtype)
        return product if scaling == 1.0 else product.mul_(scaling)
    out = left.new_empty((left.shape[0], right.shape[1]))
    return _scaled_product(left, right, scaling, out).to(dtype)


def _through_B(
    grad: torch.Tensor, columns: torch.Tensor | None, term: Term, thin: torch.Tensor | None, *, kernels: bool
) -> torch.Tensor | None:
    """Fill ``thin = scaling * grad @ B``, and return ``scaling * grad.T @ columns`` where there are columns."""
    B = term.B
    assert B is not None
    dtype = term.grad_dtype or B.dtype
    if kernels:
        grad_B = None if columns is None else torch.empty(B.shape, dtype=dtype, device=B.device)
        if thin is not None or grad_B is not None:
            low_rank.gradients(grad, B, columns, term.scaling, thin=thin, gradient=grad_B)
        return grad_B
    if thin is not None:
        _scaled_product(grad, B.to(grad.dtype), term.scaling, thin)
    return None if columns is None else _product(grad.t(), columns, dtype, term.scaling)


def _through_A(
    thin: torch.Tensor, u: torch.Tensor, terms: Sequence[Term], *, kernels: bool
) -> list[torch.Tensor | None]:
    """``thin.T @ u`` of each term, in the dtype of its A."""
    dtypes = [None if term.A is None else term.grad_dtype or term.A.dtype for term in terms]
    distinct = {dtype for dtype in dtypes if dtype is not None}
    wide = torch.promote_types(torch.float32, u.dtype)
    if kernels:
        joint = distinct.pop() if len(distinct) == 1 else wide
        product = torch.empty((thin.shape[1], u.shape[1]), dtype=joint, device=u.device)
        low_rank.gradients(u, None, thin, gradient=product.t())
    else:
        product = _product(thin.t(), u, wide)
    return [None if dtype is None else product[piece].to(dtype) for dtype, piece in zip(dtypes, _pieces(terms))]


def project_backward(
    grads: Sequence[torch.Tensor | None],
    u: torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor] | None,
    skinny: torch.Tensor | None,
    terms: Sequence[Term],
    needs: Sequence[Needs],
    *,
    need_x: bool,
    need_u: bool,
    A: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[TermGradients]]:
    """Gradients of ``project``.

    Args:
        grads: [T, O] of each output, None for an output that nobody used.
        u: The adapters' input [T, I], or a function that makes it from the gradient of x; needed when an A is trained,
            and, being x itself, when a base weight is.
        skinny: ``u @ A.T`` of all terms; needed when a B is trained.
        terms: As in the forward.
        needs: Which parameters of each term need a gradient.
        need_x: Whether the base's input does.
        need_u: Whether the adapters' input does, when it is another tensor. Otherwise its gradient joins that of x.
        A: What ``joined_A`` would return, for a caller that has it.

    Returns:
        Gradient of x, gradient of u (None unless ``need_u``), gradients of the parameters.
    """
    first = next(grad for grad in grads if grad is not None)
    dtype, rows = first.dtype, first.shape[0]
    kernels = by_kernels(first, terms) and all(grad is None or grad.stride(1) == 1 for grad in grads)
    kernels = kernels and (not isinstance(u, torch.Tensor) or u.stride(1) == 1)
    if A is None:
        A = joined_A(terms, None if kernels else dtype)
    elif not kernels:
        A = A.to(dtype)
    need_A = any(need.A for need in needs)
    thin: torch.Tensor | None = None
    if A is not None and (need_x or need_u or need_A):
        unused = any(grad is None for grad in grads)
        thin = (first.new_zeros if unused else first.new_empty)((rows, A.shape[0]))
    result: list[TermGradients] = []
    for grad, term, piece, need in zip(grads, terms, _pieces(terms), needs):
        grad_bias = grad_B = None
        if grad is not None:
            if term.B is not None:
                columns = skinny[:, piece] if need.B and skinny is not None else None
                grad_B = _through_B(grad, columns, term, None if thin is None else thin[:, piece], kernels=kernels)
            if need.bias and term.bias is not None:
                grad_bias = grad.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(term.bias.dtype)
        result.append(TermGradients(grad_bias, None, grad_B))
    grad_x = _fp8_gradient(grads, terms) if need_x else None
    grad_u = None
    if thin is not None and A is not None and (need_x or need_u):
        base = None if need_u else grad_x
        through = _widen(thin, A, base, kernels=kernels)
        grad_x, grad_u = (grad_x, through) if need_u else (through, None)
    if need_x:
        for grad, term in zip(grads, terms):
            if grad is not None and term.fp8 is None:
                weight = term.dense(dtype)
                grad_x = torch.mm(grad, weight) if grad_x is None else grad_x.addmm_(grad, weight)
    if u is not None and not isinstance(u, torch.Tensor):
        u = u(grad_x)
    if u is None:
        return grad_x, grad_u, result
    for i, (grad, term, need) in enumerate(zip(grads, terms, needs)):
        if need.weight and grad is not None and term.weight is not None:
            result[i] = result[i]._replace(weight=_product(grad.t(), u, term.weight.dtype))
    if thin is not None and need_A:
        for i, (grad_A, need) in enumerate(zip(_through_A(thin, u, terms, kernels=kernels), needs)):
            if need.A:
                result[i] = result[i]._replace(A=grad_A)
    return grad_x, grad_u, result


def _widen(thin: torch.Tensor, A: torch.Tensor, base: torch.Tensor | None, *, kernels: bool) -> torch.Tensor:
    """``thin @ A [+ base]``, over the base's memory."""
    if kernels:
        return low_rank.widen(thin, A.t(), base=base, out=base)
    return torch.mm(thin, A) if base is None else base.addmm_(thin, A)


def _fp8_gradient(grads: Sequence[torch.Tensor | None], terms: Sequence[Term]) -> torch.Tensor | None:
    """What the terms with fp8 weights give to the gradient of x; their products start a sum, they cannot join one."""
    pairs = [(grad, term.fp8) for grad, term in zip(grads, terms) if grad is not None and term.fp8 is not None]
    if not pairs:
        return None
    backend = next(term.backend for term in terms if term.fp8 is not None)
    return fp8_input_gradient([grad for grad, _ in pairs], [weight for _, weight in pairs], backend=backend)


@dataclass(frozen=True, slots=True)
class Static:
    """What an autograd.Function below must know of a projection besides its tensors."""

    base: Projection
    scaling: float
    backend: dispatch.Backend


def terms_of(statics: Sequence[Static], tensors: Sequence[torch.Tensor | None]) -> list[Term]:
    """Put the tensors (weight, bias, A, B of each projection) back into terms."""
    return [
        Term(s.base, *tensors[4 * i : 4 * i + 4], s.scaling, s.backend)  # type: ignore[arg-type]
        for i, s in enumerate(statics)
    ]


def flatten(
    projections: Sequence[Projection], backend: dispatch.Backend
) -> tuple[tuple[Static, ...], list[torch.Tensor | None]]:
    """Split projections into static parts and tensors; several adapters of one projection become one, by autograd."""
    statics, tensors = [], []
    for projection in projections:
        adapters = projection.adapters
        scaling = adapters[0].scaling if len(adapters) == 1 else 1.0
        A = B = None
        if len(adapters) == 1:
            A, B = adapters[0].A, adapters[0].B
        elif adapters:
            A = torch.cat([adapter.A for adapter in adapters])
            B = torch.cat([adapter.B * adapter.scaling for adapter in adapters], dim=1)
        weight = projection.weight if isinstance(projection.weight, torch.Tensor) else None
        statics.append(Static(projection, scaling, backend))
        tensors.extend((weight, projection.bias, A, B))
    return tuple(statics), tensors


def needs_of(flags: Sequence[bool], count: int) -> list[Needs]:
    """Which parameters of each projection need a gradient, from flags for (weight, bias, A, B) of each."""
    return [Needs(flags[4 * i + 1], flags[4 * i + 2], flags[4 * i + 3], flags[4 * i]) for i in range(count)]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, u: torch.Tensor | None, statics: tuple[Static, ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        terms = terms_of(statics, tensors)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            outputs, skinny = project(flat, flat if u is None else u.reshape(flat.shape), terms)
        needs = needs_of(ctx.needs_input_grad[3:], len(statics))
        keep_u = (x if u is None else u) if any(need.A for need in needs) else None
        keep_skinny = skinny if any(need.B for need in needs) else None
        ctx.save_for_backward(keep_u, keep_skinny, *tensors)
        ctx.set_materialize_grads(False)
        ctx.statics, ctx.separate, ctx.shape = statics, u is not None, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        u, skinny, *tensors = ctx.saved_tensors
        if all(grad is None for grad in upstream):
            return (None,) * len(ctx.needs_input_grad)
        grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in upstream]
        kind = next(grad.device.type for grad in grads if grad is not None)
        with torch.autocast(kind, enabled=False):
            grad_x, grad_u, parameters = project_backward(
                grads,
                None if u is None else u.reshape(-1, u.shape[-1]),
                skinny,
                terms_of(ctx.statics, tensors),
                needs_of(ctx.needs_input_grad[3:], len(ctx.statics)),
                need_x=ctx.needs_input_grad[0],
                need_u=ctx.separate and ctx.needs_input_grad[1],
            )
        shaped = [None if grad is None else grad.view(ctx.shape) for grad in (grad_x, grad_u)]
        return (*shaped, None, *(g for p in parameters for g in (None, p.bias, p.A, p.B)))


def check_projection(where: str, x: torch.Tensor, projection: Projection) -> None:
    """Raise unless the projection fits ``x`` and is one that the hand-written backward serves."""
    weight = projection.weight
    shape = weight.shape if isinstance(weight, torch.Tensor | Quantized4Bit | Fp8Weight | Nf4Fp8Weight) else None
    if isinstance(weight, torch.Tensor):
        if weight.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                "the base weight requires a gradient",
                where=where,
                why="the backward is written for frozen bases",
                hint="freeze it with requires_grad_(False), or use torch.nn.functional.linear",
            )
        if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            raise UnsupportedError(
                f"the base weight is {weight.dtype}",
                where=where,
                hint="pass a Quantized4Bit, an Fp8Weight or a function that returns the dense weight",
            )
    if shape is not None and (len(shape) != 2 or shape[1] != x.shape[-1]):
        raise ConfigError(f"weight {list(shape)} does not fit x {list(x.shape)}", where=where)
    for A, B, _ in projection.adapters:
        fits = A.dim() == 2 and B.dim() == 2 and A.shape[1] == x.shape[-1] and A.shape[0] == B.shape[1]
        if not fits or (shape is not None and B.shape[0] != shape[0]):
            raise ConfigError(
                f"A {list(A.shape)} and B {list(B.shape)} do not fit x {list(x.shape)}",
                where=where,
                hint="A is [r, in_features] and B is [out_features, r]",
            )
    if projection.magnitude is not None and len(projection.adapters) != 1:
        raise ConfigError(f"DoRA takes one adapter, not {len(projection.adapters)}", where=where)


def use_reference(op: str, x: torch.Tensor, backend: dispatch.Backend) -> bool:
    """Whether the eager specification was asked for; a request for Triton that cannot be honoured raises.

    The hand-written backward is made of torch's products and serves every device; ``backend`` otherwise picks the
    kernels for 4-bit weights and activations.
    """
    if backend != "auto":
        return dispatch.resolve(op, x, backend) == "reference"
    return env.kernels() == "reference"


def project_all(
    x: torch.Tensor, projections: Sequence[Projection], *, dropout: float, backend: dispatch.Backend, where: str
) -> tuple[torch.Tensor, ...]:
    """Outputs of several projections of one input."""
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must lie in [0, 1), not {dropout}", where=where)
    for projection in projections:
        check_projection(where, x, projection)
    in_fp8 = any(isinstance(p.weight, Fp8Weight | Nf4Fp8Weight) for p in projections)
    if use_reference(where, x, backend):
        if in_fp8:
            # What the reference specifies is the product itself; autograd cannot differentiate its roundings.
            backend = "reference"
        else:
            return tuple(
                reference.lora_linear(
                    x, p.dense(x.dtype, "reference"), p.adapters, bias=p.bias, dropout=dropout, magnitude=p.magnitude
                )
                for p in projections
            )
    plain = all(p.magnitude is None for p in projections)
    if plain and not dropout:
        statics, tensors = flatten(projections, backend)
        return _Projections.apply(x, None, statics, *tensors)
    return tuple(
        _with_dropout(x, p, dropout, backend) if p.magnitude is None else _dora(x, p, dropout, backend)
        for p in projections
    )


def _with_dropout(x: torch.Tensor, projection: Projection, dropout: float, backend: dispatch.Backend) -> torch.Tensor:
    """Each adapter sees its own draw; the first joins the base's product."""
    if not projection.adapters:
        dropout = 0.0
    u = functional.dropout(x, dropout) if dropout else None
    first = Projection(projection.weight, projection.adapters[:1], projection.bias)
    statics, tensors = flatten([first], backend)
    (y,) = _Projections.apply(x, u, statics, *tensors)
    for A, B, scaling in projection.adapters[1:]:
        dropped = functional.dropout(x, dropout)
        y = y + functional.linear(functional.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * scaling
    return y


def _dora(x: torch.Tensor, projection: Projection, dropout: float, backend: dispatch.Backend) -> torch.Tensor:
    """DoRA by autograd around the frozen product; slower, and exact. The formula is the reference's."""
    dtype = x.dtype
    A, B, scaling = projection.adapters[0]
    assert projection.magnitude is not None
    statics, tensors = flatten([Projection(projection.weight)], backend)
    u = functional.dropout(x, dropout) if dropout else x
    factor = reference.dora_factor(projection.dense(dtype, backend), A, B, scaling, projection.magnitude).to(dtype)
    part = functional.linear(functional.linear(u, A.to(dtype)), B.to(dtype)) * scaling
    (base,) = _Projections.apply(x, None, statics, *tensors)
    if dropout:
        (dropped,) = _Projections.apply(u, None, statics, *tensors)
        y = base + (factor - 1) * dropped + factor * part
    else:
        y = factor * (base + part)
    return y if projection.bias is None else y + projection.bias.to(dtype)


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    dropout: float = 0.0,
    magnitude: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Linear layer with a frozen base and trained low-rank adapters: ``x @ W.T + bias + s * (drop(x) @ A.T) @ B.T``.

    The compute dtype is that of ``x``; A and B may be float32 masters, are cast for the products and get gradients in
    their own dtype. Sums are float32 inside the products. Autocast is off inside. It can be differentiated once.
    LoRA: https://arxiv.org/abs/2106.09685; rsLoRA (https://arxiv.org/abs/2312.03732) is a matter of ``scaling``.

    Args:
        x: [..., in_features].
        weight: Frozen base [out_features, in_features]: dense, a ``Quantized4Bit``, an ``Fp8Weight`` or
            ``Nf4Fp8Weight`` (see ``fp8_linear``), or a function that returns the dense weight and is called again in
            the backward.
        A: [r, in_features], or None (default) without this adapter.
        B: [out_features, r], or None.
        scaling: Factor of the update. Default 1.
        bias: [out_features] or None (default); trained when it requires a gradient.
        adapters: More adapters on the same base. Default none.
        dropout: Probability of dropping an element of the adapters' input. Default 0; pass 0 in evaluation. Above 0 the
            dropped input is kept for the backward.
        magnitude: DoRA's [out_features] (https://arxiv.org/abs/2402.09353), one adapter; a slower path. Default None.
        backend: Picks the kernel that dequantises; ``"reference"`` is the eager specification. See
            ``dispatch.resolve``.

    Returns:
        [..., out_features] in the dtype of ``x``.

    Raises:
        ConfigError: Shapes or options do not fit.
        UnsupportedError: The base requires a gradient or is of a quantised dtype, or ``backend`` cannot be honoured.
    """
    if (A is None) != (B is None):
        raise ConfigError("A and B come together", where="lora_linear")
    own = (Adapter(A, B, scaling),) if A is not None and B is not None else ()
    projection = Projection(weight, (*own, *adapters), bias, magnitude)
    return project_all(x, [projection], dropout=dropout, backend=backend, where="lora_linear")[0]


def lora_qkv(
    x: torch.Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    dropout: float = 0.0,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three LoRA projections of one input with a joint backward; formulas and dtypes as in ``lora_linear``.

    The input is read once for all A, kept once, and its gradient is summed inside the products.

    Args:
        x: [..., in_features].
        q: Projection to the queries.
        k: Projection to the keys.
        v: Projection to the values.
        dropout: As in ``lora_linear``, each projection with its own draw. Default 0.
        backend: As in ``lora_linear``.

    Returns:
        Queries, keys, values, each [..., its out_features].

    Raises:
        ConfigError: Shapes or options do not fit.
        UnsupportedError: As in ``lora_linear``.
    """
    queries, keys, values = project_all(x, [q, k, v], dropout=dropout, backend=backend, where="lora_qkv")
    return queries, keys, values

"""Products of linear layers with a frozen base and low-rank adapters, and their gradients, outside autograd.

Formulas, and what is kept for the backward, are told in ``lora_linear``. The adapter's product is written first and the
base's product added to it in that product's epilogue: on an H100 at 8,192 x 4,096 x 4,096 that takes 0.40 ms, the other
order 0.44 ms, the bare product 0.35 ms. Projections of one input share one product with all their A, and one for all
their dA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from . import dispatch, low_rank
from .fp8 import Fp8Matrix
from .fp8_linear import Fp8Base, Fp8Input, Fp8Weight, Nf4Fp8Weight, fp8_input_gradient, fp8_product
from .nf4 import nf4_dequantize
from .nf4_product import nf4_matvec, serves
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


def joined_A(terms: Sequence[Term]) -> torch.Tensor | None:
    """All A of the terms below one another, [sum of ranks, I]."""
    factors = [term.A for term in terms if term.A is not None]
    if not factors:
        return None
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def by_kernels(wide: torch.Tensor, groups: Sequence[Sequence[Term]]) -> list[bool]:
    """For groups of terms, whether Triton's kernels make the thin products beside wide factors like this [T, W]."""
    backend = groups[0][0].backend
    if backend == "auto" and wide.shape[0] < KERNEL_ROWS:
        return [False] * len(groups)
    served = [low_rank.serves(wide, sum([term.rank for term in terms])) for terms in groups]
    if any(served) and dispatch.resolve("lora_linear", wide, backend) != "triton":
        return [False] * len(groups)
    return served


class Group:
    """Projections of one input.

    Attributes:
        terms: The projections.
        A: All their A below one another, [sum of ranks, I]; None without adapters.
        kernels: Whether Triton's kernels make the thin products.
        pieces: Where each term's columns lie in ``u @ A.T``.
        read: Numbers of each row of ``u @ A.T`` that the kernels read to make the updates.
        together: Whether the terms' thin products share launches: they have one kind of adapter.
    """

    __slots__ = ("A", "kernels", "pieces", "read", "terms", "together")

    def __init__(self, terms: Sequence[Term], A: torch.Tensor | None, *, kernels: bool) -> None:
        self.terms, self.A, self.kernels = terms, A, kernels
        self.pieces: list[slice] = []
        start = 0
        for term in terms:
            self.pieces.append(slice(start, start + term.rank))
            start += term.rank
        self.read = sum([low_rank.reading(t.rank, t.B.shape[0]) for t in terms if t.B is not None]) if kernels else 0
        self.together = kernels and 1 < len(terms) <= low_rank.JOBS
        if self.together:
            kinds = {None if t.B is None else (t.rank, t.scaling, t.grad_dtype, t.B.dtype, t.B.stride()) for t in terms}
            self.together = len(kinds) == 1 and None not in kinds

    @classmethod
    def of(cls, terms: Sequence[Term], wide: torch.Tensor) -> Group:
        """Terms whose inputs and outputs are like ``wide`` [T, W]."""
        return cls(terms, joined_A(terms), kernels=by_kernels(wide, [terms])[0])

    def columns(self, thin: torch.Tensor, i: int) -> torch.Tensor:
        """Those of one term in ``thin`` [..., sum of ranks]."""
        return thin if len(self.terms) == 1 else thin[..., self.pieces[i]]


def thin_product(u: torch.Tensor, group: Group) -> torch.Tensor | None:
    """``u @ A.T`` [T, sum of ranks] of all terms for the adapters' input ``u`` [T, I], None without adapters."""
    if group.A is None:
        return None
    if group.kernels and u.stride(1) == 1:
        return low_rank.narrow(u, group.A)
    return torch.mm(u, group.A.to(u.dtype).t())


def project(
    x: torch.Tensor,
    u: torch.Tensor,
    group: Group,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    rows: Fp8Matrix | None = None,
    parts: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Outputs of all terms for ``x`` [T, I], and ``u @ A.T`` for the backward.

    Args:
        x: The bases' input [T, I].
        u: The adapters' input [T, I]: x, or dropout of x.
        group: The projections.
        residual: [T, O], added to the output; for one term.
        out: [T, O], receives the output; for one term.
        rows: x quantised row by row, where a kernel before has done it and a base is multiplied in fp8.
        parts: [parts, T, sum of ranks] whose sum is ``u @ A.T``, as ``low_rank.narrow_parts`` leaves them, where a
            kernel before has made them.
    """
    dtype = x.dtype
    terms, A = group.terms, group.A
    if parts is None and A is not None and group.kernels and u.stride(1) == 1:
        # What its programs leave is added up by the kernels that read it.
        parts = low_rank.narrow_parts(u, A, read=group.read)
    if parts is not None:
        skinny: torch.Tensor | None = (
            parts[0] if parts.shape[0] == 1 else torch.empty(parts.shape[1:], dtype=dtype, device=x.device)
        )
    else:
        skinny = thin_product(u, group)
    shared = Fp8Input(x, rows)
    if parts is not None and group.together and residual is None and out is None:
        factors = [t.B for t in terms if t.B is not None and t.bias is None and not _is_bare(shared, t)]
        if len(factors) == len(terms):
            total = None if parts.shape[0] == 1 else skinny
            updates = low_rank.widen_each(parts, factors, terms[0].scaling, total=total)
            return [y.addmm_(x, term.dense(dtype).t()) for y, term in zip(updates, terms)], skinny
    outputs = []
    for i, term in enumerate(terms):
        added = None if term.bias is None else term.bias.to(dtype)
        if residual is not None:
            added = residual if added is None else residual + added
        columns = None if term.B is None or skinny is None else group.columns(skinny, i)
        left = None if columns is None or parts is None else group.columns(parts, i)
        y = _bare_product(shared, term)
        if y is not None:
            # It takes no summand, so what is added comes after.
            if columns is not None:
                if added is not None:
                    y += added
                added = y
            elif added is not None or out is not None:
                y = torch.add(y, 0 if added is None else added, out=out)
            outputs.append(y if columns is None else _update(columns, term, added, out, left))
        elif columns is not None:
            y = _update(columns, term, added, out, left)
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


def bare_products(x: torch.Tensor, group: Group) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The bases' products alone, and ``x @ A.T``; for whoever adds the adapters' updates later.

    Args:
        x: [T, I].
        group: Projections without bias.

    Returns:
        [T, O] of each term, and [T, sum of ranks].
    """
    shared = Fp8Input(x)
    outputs = []
    for term in group.terms:
        y = _bare_product(shared, term)
        outputs.append(torch.mm(x, term.dense(x.dtype).t()) if y is None else y)
    return outputs, thin_product(x, group)


def _by_vectors(x: torch.Tensor, term: Term) -> Quantized4Bit | None:
    """The weight in 4 bits when few rows of x are multiplied with it as it is, as in generation."""
    stored = term.base.weight.stored if isinstance(term.base.weight, Nf4Fp8Weight) else term.base.weight
    served = isinstance(stored, Quantized4Bit) and serves(x, stored)
    return stored if served and dispatch.resolve("nf4_matvec", x, term.backend) == "triton" else None


def _is_bare(x: Fp8Input, term: Term) -> bool:
    """Whether ``_bare_product`` makes the base's product."""
    return term.fp8 is not None or _by_vectors(x.x, term) is not None


def _bare_product(x: Fp8Input, term: Term) -> torch.Tensor | None:
    """``x @ W.T`` where the weight is not made dense for it: in fp8, or in 4 bits with few rows of x. Else None."""
    stored = _by_vectors(x.x, term)
    if stored is not None:
        return nf4_matvec(x.x, stored, backend=term.backend)
    return None if term.fp8 is None else fp8_product(x, term.fp8, backend=term.backend)


def _update(
    columns: torch.Tensor,
    term: Term,
    added: torch.Tensor | None,
    out: torch.Tensor | None,
    parts: torch.Tensor | None,
) -> torch.Tensor:
    """``scaling * columns @ B.T + added``, to which a dense base's product is added.

    With the ``parts`` of the columns a kernel does it, which fills the columns where there are several parts.
    """
    assert term.B is not None
    rows, dtype = columns.shape[0], columns.dtype
    if parts is not None:
        base = added if added is None or added.dim() == 2 else added.expand(rows, -1)
        total = None if parts.shape[0] == 1 else columns
        return low_rank.widen(parts, term.B, term.scaling, base=base, out=out, total=total)
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
            low_rank.gradients([grad], [B], columns, term.scaling, thin=thin, gradient=grad_B)
        return grad_B
    if thin is not None:
        _scaled_product(grad, B.to(grad.dtype), term.scaling, thin)
    return None if columns is None else _product(grad.t(), columns, dtype, term.scaling)


def _through_every_B(
    grads: Sequence[torch.Tensor | None],
    skinny: torch.Tensor | None,
    group: Group,
    needs: Sequence[Needs],
    thin: torch.Tensor | None,
    *,
    kernels: bool,
) -> list[torch.Tensor | None]:
    """``_through_B`` of each term, in one launch where it can be."""
    terms, first = group.terms, group.terms[0]
    given = [grad for grad in grads if grad is not None]
    wanted = {need.B and skinny is not None for need in needs}
    if kernels and group.together and len(given) == len(terms) and len(wanted) == 1:
        factors = [term.B for term in terms if term.B is not None]
        if not wanted.pop():
            if thin is not None:
                low_rank.gradients(given, factors, None, first.scaling, thin=thin)
            return [None] * len(terms)
        heights = [factor.shape[0] for factor in factors]
        dtype = first.grad_dtype or factors[0].dtype
        joint = torch.empty((sum(heights), first.rank), dtype=dtype, device=given[0].device)
        low_rank.gradients(given, factors, skinny, first.scaling, thin=thin, gradient=joint)
        return list(joint.split(heights))
    found: list[torch.Tensor | None] = []
    for i, (grad, term, need) in enumerate(zip(grads, terms, needs)):
        if grad is None or term.B is None:
            found.append(None)
            continue
        columns = group.columns(skinny, i) if need.B and skinny is not None else None
        found.append(_through_B(grad, columns, term, None if thin is None else group.columns(thin, i), kernels=kernels))
    return found


def _through_A(
    thin: torch.Tensor, u: torch.Tensor, group: Group, needs: Sequence[Needs], *, kernels: bool
) -> list[torch.Tensor | None]:
    """``thin.T @ u`` of each term whose A needs it, in the dtype of its A."""
    dtypes = [None if term.A is None else term.grad_dtype or term.A.dtype for term in group.terms]
    distinct = {dtype for dtype in dtypes if dtype is not None}
    if kernels:
        joint = distinct.pop() if len(distinct) == 1 else torch.float32
        product = torch.empty((thin.shape[1], u.shape[1]), dtype=joint, device=u.device)
        low_rank.gradients([u], None, thin, gradient=product.t())
    else:
        product = _product(thin.t(), u, torch.promote_types(torch.float32, u.dtype))
    if len(dtypes) == 1:
        return [product if dtypes[0] is None else product.to(dtypes[0])]
    return [
        product[piece].to(dtype) if need.A and dtype is not None else None
        for dtype, piece, need in zip(dtypes, group.pieces, needs)
    ]


def project_backward(
    grads: Sequence[torch.Tensor | None],
    u: torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor] | None,
    skinny: torch.Tensor | None,
    group: Group,
    needs: Sequence[Needs],
    *,
    need_x: bool,
    need_u: bool,
    finish: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[TermGradients]]:
    """Gradients of ``project``.

    Args:
        grads: [T, O] of each output, None for an output that nobody used.
        u: The adapters' input [T, I], or a function that makes it from the gradient of x; needed when an A is trained,
            and, being x itself, when a base weight is.
        skinny: ``u @ A.T`` of all terms; needed when a B is trained.
        group: As in the forward.
        needs: Which parameters of each term need a gradient.
        need_x: Whether the base's input does.
        need_u: Whether the adapters' input does, when it is another tensor. Otherwise its gradient joins that of x.
        finish: Of one projection with x for u: gets the gradient of x through the base and the gradient of the thin
            product, uses both up, and returns the gradient of A if there is an A. Then this returns no gradient of x.

    Returns:
        Gradient of x, gradient of u (None unless ``need_u``), gradients of the parameters.
    """
    terms, A = group.terms, group.A
    given = [grad for grad in grads if grad is not None]
    first = given[0]
    dtype, rows = first.dtype, first.shape[0]
    kernels = group.kernels and all(grad.stride(1) == 1 for grad in given)
    kernels = kernels and (not isinstance(u, torch.Tensor) or u.stride(1) == 1)
    if A is not None and not kernels:
        A = A.to(dtype)
    need_A = any(need.A for need in needs)
    thin: torch.Tensor | None = None
    if A is not None and (need_x or need_u or need_A):
        thin = (first.new_empty if len(given) == len(grads) else first.new_zeros)((rows, A.shape[0]))
    grads_B = _through_every_B(grads, skinny, group, needs, thin, kernels=kernels)
    grad_x = _fp8_gradient(grads, terms) if need_x else None
    grad_u = None
    if finish is None and thin is not None and A is not None and (need_x or need_u):
        base = None if need_u else grad_x
        through = _widen(thin, A, base, kernels=kernels)
        grad_x, grad_u = (grad_x, through) if need_u else (through, None)
    if need_x:
        for grad, term in zip(grads, terms):
            if grad is not None and term.fp8 is None:
                weight = term.dense(dtype)
                grad_x = torch.mm(grad, weight) if grad_x is None else grad_x.addmm_(grad, weight)
    grads_A: list[torch.Tensor | None] = [None] * len(terms)
    if finish is not None:
        assert grad_x is not None
        grads_A, grad_x = [finish(grad_x, thin)], None
    if u is not None and not isinstance(u, torch.Tensor):
        u = u(grad_x)
    if u is not None and thin is not None and need_A:
        grads_A = _through_A(thin, u, group, needs, kernels=kernels)
    result = []
    for grad, term, need, grad_A, grad_B in zip(grads, terms, needs, grads_A, grads_B):
        bias = weight = None
        if need.bias and grad is not None and term.bias is not None:
            bias = grad.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(term.bias.dtype)
        if need.weight and grad is not None and term.weight is not None and u is not None:
            weight = _product(grad.t(), u, term.weight.dtype)
        result.append(TermGradients(bias, grad_A if need.A else None, grad_B, weight))
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

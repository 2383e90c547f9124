"""Linear layers with a frozen base and trained low-rank adapters, with a hand-written backward.

For each projection of an input ``x`` [T, I] with base ``W`` [O, I] and adapter ``A`` [r, I], ``B`` [O, r]::

    y  = x @ W.T + bias + s * (u @ A.T) @ B.T          u = x, or dropout of x
    g  = s * dy @ B
    dx = dy @ W + g @ A        dA = g.T @ u        dB = s * dy.T @ (u @ A.T)

Kept for the backward: ``u``, the skinny ``u @ A.T`` and the parameters as they are; never ``x`` apart from ``u``, a
dequantised weight, or anything of the outputs' size. The products are made in ``projections``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .. import env
from ..errors import ConfigError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from .fp8_linear import Fp8Weight, Nf4Fp8Weight
from .projections import (
    Adapter,
    Group,
    Projection,
    Static,
    Weight,
    flatten,
    needs_of,
    project,
    project_backward,
    terms_of,
)
from .reference import lora as reference
from .reference.nf4 import Quantized4Bit


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, u: torch.Tensor | None, statics: tuple[Static, ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        terms = terms_of(statics, tensors)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            outputs, skinny = project(flat, flat if u is None else u.reshape(flat.shape), Group.of(terms, flat))
        needs = needs_of(ctx.needs_input_grad[3:], len(statics))
        keep_u = (x if u is None else u) if any(need.A for need in needs) else None
        keep_skinny = skinny if any(need.B for need in needs) else None
        ctx.save_for_backward(keep_u, keep_skinny, *tensors)
        ctx.set_materialize_grads(False)
        ctx.statics, ctx.separate, ctx.shape = statics, u is not None, x.shape
        # Detached, these are no views to autograd: a model may write into them.
        return tuple(y.view(*x.shape[:-1], y.shape[-1]).detach() for y in outputs)

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
                Group.of(terms_of(ctx.statics, tensors), next(grad for grad in grads if grad is not None)),
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
    Deterministic but for dropout.
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
    """Three LoRA projections of one input with a joint backward: ``q = x @ Wq.T + ...`` and so on.

    Formulas, dtypes, float32 sums and determinism as in ``lora_linear``: deterministic but for dropout.

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

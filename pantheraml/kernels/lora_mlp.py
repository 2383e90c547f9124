"""Gated MLP with frozen bases and low-rank adapters as one node of the graph.

``y = down(act(gate(x)) * up(x))`` where each of gate, up and down is a ``Projection``. Kept for the backward: ``x``,
the outputs of gate and up, and the skinny products of the adapters; the gated product is computed again. Where
``Joint`` serves, the outputs kept are those of the bases alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import dispatch, low_rank
from ._once import once_differentiable
from .glu import GluSpec, check_spec, glu
from .lora_glu import Lift, lora_glu_backward, lora_glu_forward, serves
from .lora_linear import check_projection, project_all, use_reference
from .projections import (
    Group,
    Needs,
    Projection,
    Static,
    Term,
    TermGradients,
    bare_products,
    flatten,
    needs_of,
    project,
    project_backward,
    terms_of,
)


class Joint(NamedTuple):
    """An MLP whose activation adds what the adapters of gate and up give, see ``lora_glu``.

    Attributes:
        lift: Gate and up, or the one projection that makes both.
        down: The projection back.
        spec: The activation.
        packed: ``"gate_first"`` or ``"up_first"`` where one projection makes both gate and up, else None.
    """

    lift: Group
    down: Group
    spec: GluSpec
    packed: str | None = None

    @classmethod
    def of(cls, lift: Group, down: Group, spec: GluSpec, x: torch.Tensor, packed: str | None = None) -> Joint | None:
        """The two groups as one, or None where the kernels do not serve them for x [T, H]; Triton serves the rest."""
        first, (last,) = lift.terms[0], down.terms
        alike = lift.together if packed is None else lift.kernels and lift.A is not None
        if not alike or len(lift.terms) != (2 if packed is None else 1):
            return None
        # A trained base wants the activation itself.
        trained = last.weight is not None and last.weight.requires_grad
        if trained or any(term.bias is not None for term in lift.terms) or (down.A is not None and not down.kernels):
            return None
        return cls(lift, down, spec, packed) if serves(x, first.rank, last.rank) else None

    def project(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Gate and up, or both in one, without what the adapters add, and the adapters' thin product."""
        return bare_products(x, self.lift)

    def _lift(self, skinny: torch.Tensor | None) -> Lift:
        factors = [term.B for term in self.lift.terms]
        first, last = factors[0], factors[-1]
        assert skinny is not None
        assert first is not None
        assert last is not None
        if self.packed is not None:
            first, last = first.chunk(2)
        if self.packed == "up_first":
            first, last = last, first
        return Lift(skinny, first, last, self.lift.terms[0].scaling)

    def activate(
        self, gate: torch.Tensor, up: torch.Tensor, skinny: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The activation, and the parts of its thin product with the adapter of the projection back."""
        out, parts = lora_glu_forward(gate, up, self._lift(skinny), self.down.A, self.spec)
        assert out is not None
        return out, parts

    def thin(self, gate: torch.Tensor, up: torch.Tensor, skinny: torch.Tensor | None) -> torch.Tensor | None:
        """The thin product alone, None without an adapter of the projection back."""
        if self.down.A is None:
            return None
        _, parts = lora_glu_forward(gate, up, self._lift(skinny), self.down.A, self.spec, keep=False)
        assert parts is not None
        return low_rank.added(parts, gate.dtype)

    def down_backward(
        self,
        dy: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        skinny: torch.Tensor | None,
        down_skinny: torch.Tensor | None,
        needs: Sequence[Needs],
    ) -> list[TermGradients]:
        """From the gradient of the output: gate and up become their gradients. Returns those of the projection back."""
        lift, (last,) = self._lift(skinny), self.down.terms

        def finish(dout: torch.Tensor, thin: torch.Tensor | None) -> torch.Tensor | None:
            down = None if thin is None or self.down.A is None else (thin, self.down.A)
            dtype = None if last.A is None else last.grad_dtype or last.A.dtype
            return lora_glu_backward(dout, gate, up, lift, down, self.spec, dtype=dtype)

        _, _, found = project_backward(
            [dy], None, down_skinny, self.down, needs, need_x=True, need_u=False, finish=finish
        )
        return found


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        statics: tuple[Static, ...],
        activation: str,
        options: Mapping[str, Any],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        terms = terms_of(statics, tensors)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            lift, down = Group.of(terms[:2], flat), Group.of(terms[2:], flat)
            joint = Joint.of(lift, down, _spec(activation, options), flat)
            parts: torch.Tensor | None = None
            if joint is not None:
                (gate, up), skinny = joint.project(flat)
                hidden, parts = joint.activate(gate, up, skinny)
            else:
                (gate, up), skinny = project(flat, flat, lift)
                hidden = glu(gate, up, activation, **options)
            (y,), down_skinny = project(hidden, hidden, down, parts=parts)
        ctx.save_for_backward(x, gate, up, skinny, down_skinny, *tensors)
        ctx.statics, ctx.activation, ctx.options, ctx.joined = statics, activation, options, joint is not None
        return y.view(*x.shape[:-1], y.shape[-1]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, gate, up, skinny, down_skinny, *tensors = ctx.saved_tensors
        terms = terms_of(ctx.statics, tensors)
        needs = needs_of(ctx.needs_input_grad[4:], len(terms))
        inner = ctx.needs_input_grad[0] or any(any(need) for need in needs[:2])
        with torch.autocast(x.device.type, enabled=False):
            if ctx.joined:
                return _joint_backward(ctx, upstream[0], x, gate, up, skinny, down_skinny, terms, needs)
            gate, up = gate.detach().requires_grad_(inner), up.detach().requires_grad_(inner)
            hidden: torch.Tensor | None = None
            if inner or needs[2].A:
                with torch.enable_grad():
                    hidden = glu(gate, up, ctx.activation, **ctx.options)
            grad_y = upstream[0].reshape(-1, upstream[0].shape[-1])
            grad_hidden, _, down = project_backward(
                [grad_y],
                None if hidden is None else hidden.detach(),
                down_skinny,
                Group.of(terms[2:], grad_y),
                needs[2:],
                need_x=inner,
                need_u=False,
            )
            grad_x, first = None, []
            if inner and hidden is not None:
                grads = torch.autograd.grad(hidden, (gate, up), grad_hidden)
                del hidden, grad_hidden
                flat = x.reshape(-1, x.shape[-1])
                grad_x, _, first = project_backward(
                    grads,
                    flat,
                    skinny,
                    Group.of(terms[:2], flat),
                    needs[:2],
                    need_x=ctx.needs_input_grad[0],
                    need_u=False,
                )
        return _results(x, grad_x, [*first, *down], len(tensors))


def _spec(activation: str, options: Mapping[str, Any]) -> GluSpec:
    return GluSpec(activation, **{name: value for name, value in options.items() if name != "backend"})


def _joint_backward(
    ctx: Any,
    upstream: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    skinny: torch.Tensor,
    down_skinny: torch.Tensor | None,
    terms: Sequence[Term],
    needs: Sequence[Needs],
) -> tuple[torch.Tensor | None, ...]:
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # They become gradients below, and another backward may follow.
        gate, up = gate.clone(), up.clone()
    flat = x.reshape(-1, x.shape[-1])
    lift, spec = Group.of(terms[:2], flat), _spec(ctx.activation, ctx.options)
    joint = Joint(lift, Group.of(terms[2:], flat), spec)
    dy = upstream.reshape(-1, upstream.shape[-1])
    down = joint.down_backward(dy, gate, up, skinny, down_skinny, needs[2:])
    grad_x, _, first = project_backward(
        [gate, up], flat, skinny, lift, needs[:2], need_x=ctx.needs_input_grad[0], need_u=False
    )
    return _results(x, grad_x, [*first, *down], 4 * len(terms))


def _results(
    x: torch.Tensor, grad_x: torch.Tensor | None, found: Sequence[TermGradients], count: int
) -> tuple[torch.Tensor | None, ...]:
    """In the order of the forward's arguments."""
    parameters = [g for p in found for g in (None, p.bias, p.A, p.B)]
    missing = [None] * (count - len(parameters))
    return None if grad_x is None else grad_x.view(x.shape), None, None, None, *missing, *parameters


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
    dropout: float = 0.0,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Gated MLP ``down(act(gate(x)) * up(x))`` whose linear layers are frozen bases with low-rank adapters.

    Dtypes and formulas of the layers as in ``lora_linear``, of the activation as in ``glu``; float32 sums inside the
    products, deterministic but for dropout. Without dropout and DoRA
    it is one node that keeps ``x``, gate and up; with either it is made of the separate ops, which keep more.

    Args:
        x: [..., hidden_size].
        gate: Projection to the activation's argument, [intermediate_size, hidden_size].
        up: Projection to the other factor, of the same shape.
        down: Projection back, [hidden_size, intermediate_size].
        activation: As in ``glu``. Default ``"silu"``.
        limit: As in ``glu``.
        alpha: As in ``glu``.
        up_offset: As in ``glu``.
        dropout: As in ``lora_linear``, each layer with its own draw. Default 0.
        backend: Picks the kernels for 4-bit weights and the activation; see ``lora_linear``.

    Returns:
        [..., hidden_size] in the dtype of ``x``.

    Raises:
        ConfigError: Shapes or options do not fit.
        UnsupportedError: As in ``lora_linear``.
    """
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "up_offset": up_offset, "backend": backend}
    projections = (gate, up, down)
    where = "lora_mlp"
    check_spec(where, _spec(activation, options))
    if use_reference(where, x, backend) or dropout or any(p.magnitude is not None for p in projections):
        shared = {"dropout": dropout, "backend": backend, "where": where}
        gated, lifted = project_all(x, projections[:2], **shared)
        return project_all(glu(gated, lifted, activation, **options), projections[2:], **shared)[0]
    for projection in projections[:2]:
        check_projection(where, x, projection)
    statics, tensors = flatten(projections, backend)
    return _LoraMLP.apply(x, statics, activation, options, *tensors)

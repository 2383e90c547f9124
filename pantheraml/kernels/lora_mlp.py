"""Gated MLP with frozen bases and low-rank adapters as one node of the graph.

``y = down(act(gate(x)) * up(x))`` where each of gate, up and down is a ``Projection``. Kept for the backward: ``x``,
the outputs of gate and up, and the skinny products of the adapters; the gated product is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import dispatch
from .glu import glu
from .lora_linear import check_projection, project_all, use_reference
from .projections import Group, Projection, Static, flatten, needs_of, project, project_backward, terms_of


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
            (gate, up), skinny = project(flat, flat, Group.of(terms[:2], flat))
            hidden = glu(gate, up, activation, **options)
            (y,), down_skinny = project(hidden, hidden, Group.of(terms[2:], hidden))
        ctx.save_for_backward(x, gate, up, skinny, down_skinny, *tensors)
        ctx.statics, ctx.activation, ctx.options = statics, activation, options
        return y.view(*x.shape[:-1], y.shape[-1]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, gate, up, skinny, down_skinny, *tensors = ctx.saved_tensors
        terms = terms_of(ctx.statics, tensors)
        needs = needs_of(ctx.needs_input_grad[4:], len(terms))
        inner = ctx.needs_input_grad[0] or any(any(need) for need in needs[:2])
        with torch.autocast(x.device.type, enabled=False):
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
        parameters = [g for p in (*first, *down) for g in (None, p.bias, p.A, p.B)]
        missing = [None] * (len(tensors) - len(parameters))
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
    if use_reference(where, x, backend) or dropout or any(p.magnitude is not None for p in projections):
        shared = {"dropout": dropout, "backend": backend, "where": where}
        gated, lifted = project_all(x, projections[:2], **shared)
        return project_all(glu(gated, lifted, activation, **options), projections[2:], **shared)[0]
    for projection in projections[:2]:
        check_projection(where, x, projection)
    statics, tensors = flatten(projections, backend)
    return _LoraMLP.apply(x, statics, activation, options, *tensors)

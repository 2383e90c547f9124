"""The parts of a decoder layer that are no matrix products, each as a forward and a hand-called backward.

Where Triton serves the tensors the kernels' launchers are called; elsewhere (a CPU, float64) the backward runs the
eager form again under autograd, which is exact and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from ... import kernels
from ...kernels.dispatch import resolve
from ...kernels.glu import GluSpec, glu_backward, glu_forward
from ...kernels.qk_norm_rotary import Norms, qk_norm_rotary_launch
from ...kernels.rms_norm import rms_norm_backward, rms_norm_forward
from ...kernels.rotary import Angles, make_angles, rotary_launch
from .norm import NormPlan
from .slots import swap_of


def by_autograd(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    upstream: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of ``function(*inputs)`` for the inputs that need one, by running it again under autograd."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs)]
    with torch.enable_grad():
        output = function(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needs) if need]
    grads = iter(torch.autograd.grad(output, wanted, upstream, allow_unused=True)) if wanted else iter(())
    return [next(grads) if need else None for need in needs]


class Fused(NamedTuple):
    """Which parts Triton's kernels make of tensors such as one; a layer's node asks once."""

    norm: bool
    glu: bool
    rotary: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> Fused:
        """The parts that kernels make of tensors such as ``x``."""
        norm, glu, rotary = (resolve(op, x) == "triton" for op in ("rms_norm", "glu", "rotary"))
        return cls(norm, glu, rotary)


@dataclass(frozen=True, slots=True)
class Norm:
    """One norm of a layer.

    Attributes:
        module: The norm.
        plan: Its formula, or None for one that keeps its own forward.
    """

    module: nn.Module
    plan: NormPlan | None

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Describe a norm by what was put into it."""
        swap = swap_of(module)
        return cls(module, swap.plan if swap is not None and isinstance(swap.plan, NormPlan) else None)

    def parameters(self) -> list[torch.Tensor]:
        """Its parameters, in the order in which gradients are returned."""
        return [p for p in self.module._parameters.values() if p is not None]

    def _fused(self, fused: Fused) -> NormPlan | None:
        plan = self.plan
        return plan if fused.norm and plan is not None and plan.op == "rms_norm" else None

    def _eager(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        names = [name for name, p in self.module._parameters.items() if p is not None]
        return torch.func.functional_call(self.module, dict(zip(names, parameters)), (x,))

    def forward(
        self, x: torch.Tensor, parameters: Sequence[torch.Tensor], fused: Fused
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalise ``x [..., D]``; also returns what the backward needs."""
        plan = self._fused(fused)
        if plan is None:
            return self._eager(x, *parameters), None
        weight = parameters[0] if parameters else None
        result = rms_norm_forward(x, weight, plan.eps, plan.offset, plan.casting)
        return result.y, result.rstd

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
        needs: Sequence[bool],
        fused: Fused,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Gradient of x, to which ``residual`` is added, and of the parameters."""
        plan = self._fused(fused)
        if plan is None or rstd is None:
            grad_x, *grads = by_autograd(self._eager, [x, *parameters], [True, *needs], dy)
            assert grad_x is not None
            return (grad_x if residual is None else grad_x + residual), grads
        weight = parameters[0] if parameters else None
        grad_x, grad_weight = rms_norm_backward(
            dy, x, weight, rstd, plan.offset, residual, weight_grad=bool(needs and needs[0])
        )
        return grad_x, [grad_weight] if parameters else []


def activate(gate: torch.Tensor, up: torch.Tensor, activation: str, fused: Fused) -> torch.Tensor:
    """``activation(gate) * up`` of two matrices."""
    if fused.glu:
        return glu_forward(gate, up, GluSpec(activation))
    return kernels.glu(gate, up, activation, backend="reference")


def activate_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, fused: Fused, *, again: bool
) -> None:
    """Put the gradients of gate and up into their own memory, and with ``again`` the product into that of ``dout``."""
    if fused.glu:
        # Every element is read before it is written.
        glu_backward(dout, gate, up, GluSpec(activation), dgate=gate, dup=up, out=dout if again else None)
        return

    def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return kernels.glu(gate, up, activation, backend="reference")

    product = eager(gate, up) if again else None
    d_gate, d_up = by_autograd(eager, [gate, up], [True, True], dout)
    for memory, value in ((gate, d_gate), (up, d_up), (dout, product)):
        if value is not None:
            memory.copy_(value)


@dataclass(slots=True)
class Turn:
    """The rotation of the queries and keys of one call, both [B, T, heads, D], by angles of every position.

    Attributes:
        cos: [B or 1, T, R], in the order that the layout wants.
        sin: As ``cos``.
        layout: ``"half"`` or ``"interleaved"``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    layout: Literal["half", "interleaved"]
    _angles: Angles | None = None

    def angles(self, q: torch.Tensor, k: torch.Tensor) -> Angles:
        """The angles as kernels read them, checked against the first q and k."""
        if self._angles is None:
            self._angles = make_angles(q, k, self.cos, self.sin, layout=self.layout, head_axis=2)
        return self._angles

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, fused: Fused, *, backward: bool = False, inplace: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn q and k, or gradients back; ``inplace`` may overwrite them."""
        if fused.rotary:
            return rotary_launch(q, k, self.angles(q, k), backward=backward, inplace=inplace)

        def eager(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            turned = kernels.rotary(q, k, self.cos, self.sin, layout=self.layout, head_axis=2, backend="reference")
            return torch.cat([x.flatten(2) for x in turned], dim=-1)

        if not backward:
            return kernels.rotary(q, k, self.cos, self.sin, layout=self.layout, head_axis=2, backend="reference")
        upstream = torch.cat([q.flatten(2), k.flatten(2)], dim=-1)
        # A rotation is linear: its gradient does not depend on what was turned.
        dq, dk = by_autograd(eager, [torch.zeros_like(q), torch.zeros_like(k)], [True, True], upstream)
        assert dq is not None
        assert dk is not None
        return dq, dk


@dataclass(frozen=True, slots=True)
class NormedTurn:
    """Norms of single heads of queries and keys with the rotation after them, by one kernel each way.

    Attributes:
        norms: Of queries and of keys.
        turn: The rotation.
    """

    norms: tuple[Norm, Norm]
    turn: Turn

    @classmethod
    def of(cls, norms: tuple[Norm, Norm] | None, turn: Turn, x: torch.Tensor) -> NormedTurn | None:
        """The two in one, None where no kernel makes them of tensors such as ``x``."""
        if norms is None or resolve("qk_norm_rotary", x) != "triton":
            return None
        plans = [norm.plan for norm in norms]
        weights = [norm.module._parameters.get("weight") for norm in norms]
        if any(plan is None or plan.op != "rms_norm" for plan in plans) or any(weight is None for weight in weights):
            return None
        alike = {(plan.eps, plan.offset) for plan in plans if plan is not None}
        return cls(norms, turn) if len(alike) == 1 else None

    def _options(
        self, q: torch.Tensor, k: torch.Tensor, parameters: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[Norms, Angles]:
        plan = self.norms[0].plan
        assert plan is not None
        return Norms(parameters[0][0], parameters[1][0], plan.offset, plan.eps), self.turn.angles(q, k)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, parameters: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm and turn q and k [B, T, heads, D]; ``parameters`` are those of the two norms."""
        q, k, _ = qk_norm_rotary_launch(q, k, *self._options(q, k, parameters))
        return q, k

    def backward(
        self,
        upstream: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        parameters: Sequence[Sequence[torch.Tensor]],
        needs: Sequence[Sequence[bool]],
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor | None]]]:
        """Gradients of q and k, which are as they came, and of the parameters of each norm."""
        trained = [bool(need and need[0]) for need in needs]
        dq, dk, sums = qk_norm_rotary_launch(q, k, *self._options(q, k, parameters), upstream, weight_grad=any(trained))
        grads: list[list[torch.Tensor | None]] = [
            [sums[i].to(own[0].dtype) if sums is not None and trained[i] else None] for i, own in enumerate(parameters)
        ]
        return dq, dk, grads

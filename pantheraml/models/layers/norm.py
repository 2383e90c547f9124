"""Norms: root mean square norms of any family, and hand-written layer norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ... import kernels
from ..probe import Formula, Regime, choose, regime_of, stand_in
from ..roles import epsilon
from .slots import Swap, plan_of, stock_forward
from .step import is_bound_by_host

# torch serves these with one fused kernel of its own already.
FUSED_BY_TORCH = (nn.LayerNorm.forward, nn.RMSNorm.forward)
DEFAULT_WIDTH = 64


@dataclass(frozen=True)
class NormPlan:
    """The formula of a norm.

    Attributes:
        op: ``"rms_norm"`` or ``"layer_norm"``.
        eps: Added to the mean square or variance.
        offset: Added to the weight (Gemma's norms store weight - 1).
        casting: ``"input"`` rounds before the weight is applied, ``"float32"`` after it.
        regimes: Dtype combinations in which the formula was seen to hold; others run the stock forward.
    """

    op: str
    eps: float
    offset: float = 0.0
    casting: Literal["input", "float32"] = "input"
    regimes: frozenset[Regime] = frozenset()

    def compute(self, module: nn.Module, x: torch.Tensor) -> Any:
        """Apply the formula with the module's weights."""
        weight = module._parameters.get("weight")
        if self.op == "layer_norm":
            return kernels.layer_norm(x, weight, module._parameters.get("bias"), self.eps)
        return kernels.rms_norm(x, weight, self.eps, offset=self.offset, casting=self.casting)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped norm: ``x [..., H]`` to the same shape; any other call goes to the stock forward."""
    plan: NormPlan = plan_of(self)
    x = args[0] if len(args) == 1 and not kwargs else None
    if (
        not isinstance(x, torch.Tensor)
        or is_bound_by_host(x)
        or regime_of(x, self._parameters.get("weight")) not in plan.regimes
    ):
        return stock_forward(self, *args, **kwargs)
    return plan.compute(self, x)


def _formulas(has_bias: bool, eps: float, has_weight: bool) -> list[Formula]:
    plans = [] if has_bias else [NormPlan("rms_norm", eps)]
    if has_weight and not has_bias:
        plans.append(NormPlan("rms_norm", eps, 0.0, "float32"))
        plans.append(NormPlan("rms_norm", eps, 1.0, "float32"))
    plans.append(NormPlan("layer_norm", eps))
    return [Formula(plan, plan.compute) for plan in plans]


def plan(module: nn.Module) -> Swap | str:
    """Find out which norm a module is.

    Args:
        module: A candidate for the norm role.

    Returns:
        What to install, or why the module keeps its forward.
    """
    eps = epsilon(module)
    if eps is None:
        return "it has no single epsilon"
    if type(module).forward in FUSED_BY_TORCH:
        return "torch's own fused kernel serves it"
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    if any(value.dim() != 1 or name not in ("weight", "bias") for name, value in parameters.items()):
        return "its parameters are not one weight vector and one bias vector"
    width = next((value.numel() for value in parameters.values()), DEFAULT_WIDTH)

    def build(dtype: torch.dtype) -> nn.Module:
        generator = torch.Generator(device="cpu").manual_seed(1)
        values = {
            name: torch.empty(width, device="cpu").uniform_(0.5, 1.5, generator=generator).to(dtype)
            for name in parameters
        }
        return stand_in(module, {**dict.fromkeys(module._parameters), **values}, {})

    chosen = choose(build, width, _formulas("bias" in parameters, eps, "weight" in parameters))
    if isinstance(chosen, str):
        return chosen
    formula, regimes = chosen
    found: NormPlan = formula.plan
    final = NormPlan(found.op, found.eps, found.offset, found.casting, regimes)
    return Swap("norm", final.op, final, forward)

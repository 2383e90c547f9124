"""Gated MLPs: activation and product in one op, around whatever linear layers the module holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ... import kernels
from ..probe import Formula, Regime, choose, copy_child, regime_of, stand_in
from ..roles import base_layer, is_linear, linear_children, splits_packed
from .lora import compute_dtype, projection_of
from .slots import Swap, plan_of, stock_forward
from .step import is_bound_by_host, is_step

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2", "sigmoid")
# Sizes of the stand-in's linear layers.
HIDDEN, WIDTH = 24, 40


@dataclass(frozen=True)
class GluPlan:
    """The formula of a gated MLP: ``down(activation(gate(x)) * up(x))``.

    Attributes:
        activation: Name of the activation, as ``kernels.glu`` takes it.
        gate: Name of the child that makes the gate; of both halves when ``up`` is None.
        up: Name of the child that is multiplied with the activated gate.
        down: Name of the child that projects back.
        layout: Of a packed projection: ``"gate_first"``, ``"up_first"`` or ``"interleaved"``.
        regimes: Dtype combinations in which the formula was seen to hold; others run the stock forward.
    """

    activation: str
    gate: str
    up: str | None
    down: str
    layout: str = "gate_first"
    regimes: frozenset[Regime] = frozenset()

    def compute(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Apply the formula with the module's children, which may be quantised or carry adapters."""
        children: dict[str, Any] = module._modules
        if self.up is not None and not is_step(x):
            gate, up, down = (projection_of(children[name], x) for name in (self.gate, self.up, self.down))
            if gate and up and down and (gate.adapters or up.adapters or down.adapters):
                return kernels.lora_mlp(x.to(compute_dtype(x)), gate, up, down, self.activation)
        gated = children[self.gate](x)
        if self.up is not None:
            product = kernels.glu(gated, children[self.up](x), self.activation)
        elif self.layout == "up_first":
            lifted, gated = gated.chunk(2, dim=-1)
            product = kernels.glu(gated, lifted, self.activation)
        else:
            product = kernels.packed_glu(gated, self.activation, interleaved=self.layout == "interleaved")
        return children[self.down](product)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped MLP: ``x [..., H]`` to the same shape; any other call goes to the stock forward."""
    plan: GluPlan = plan_of(self)
    x = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(x, torch.Tensor) or is_bound_by_host(x) or regime_of(x, None) not in plan.regimes:
        return stock_forward(self, *args, **kwargs)
    return plan.compute(self, x)


def _formulas(linears: dict[str, Any]) -> Iterator[Formula]:
    names = list(linears)
    shapes = {name: (child.in_features, child.out_features) for name, child in linears.items()}
    plans: list[GluPlan] = []
    if len(names) == 2:
        packed, down = names if splits_packed(*shapes.values()) else reversed(names)
        for activation, layout in itertools.product(ACTIVATIONS, ("gate_first", "up_first", "interleaved")):
            plans.append(GluPlan(activation, packed, None, down, layout))
    else:
        for gate, up, down in itertools.permutations(names):
            if shapes[gate] == shapes[up] == shapes[down][::-1]:
                plans.extend(GluPlan(activation, gate, up, down) for activation in ACTIVATIONS)
    # Every order of the children with the likeliest activation before the next activation.
    for plan in sorted(plans, key=lambda plan: ACTIVATIONS.index(plan.activation)):
        yield Formula(plan, plan.compute)


def _small_sizes(linears: dict[str, Any]) -> dict[int, int]:
    """Sizes of the real linear layers to those of the stand-in's."""
    shapes = [(child.in_features, child.out_features) for child in linears.values()]
    if len(shapes) == 2:
        width, hidden = shapes[1] if splits_packed(*shapes) else shapes[0]
    else:
        hidden, width = next(shape for shape in shapes if shapes.count(shape) > 1)
    small = HIDDEN if hidden == width else WIDTH
    return {2 * width: 2 * small, width: small, hidden: HIDDEN}


def _floating_dtypes(linears: dict[str, Any]) -> set[torch.dtype]:
    weights = [getattr(base_layer(child), "weight", None) for child in linears.values()]
    return {weight.dtype for weight in weights if isinstance(weight, torch.Tensor) and weight.is_floating_point()}


def plan(module: nn.Module) -> Swap | str:
    """Find out whether a module is a gated MLP and of which kind.

    Args:
        module: A candidate for the gated MLP role.

    Returns:
        What to install, or why the module keeps its forward.
    """
    linears = linear_children(module)
    if len(_floating_dtypes(linears)) > 1:
        # Families that keep one projection in float32 cast in between.
        return "its projections differ in dtype"
    sizes = _small_sizes(linears)

    def build(dtype: torch.dtype) -> nn.Module:
        generator = torch.Generator(device="cpu").manual_seed(2)
        children: dict[str, nn.Module] = {}
        modules: dict[str, Any] = module._modules
        for name, child in modules.items():
            if child is None or not is_linear(child):
                children[name] = child if child is None else copy_child(child)  # type: ignore[assignment]
                continue
            bias = getattr(base_layer(child), "bias", None) is not None
            columns, rows = sizes[child.in_features], sizes[child.out_features]
            small = nn.utils.skip_init(nn.Linear, columns, rows, bias=bias, device="cpu", dtype=torch.float32)
            for parameter in small.parameters():
                parameter.data.normal_(0.0, 0.4, generator=generator)
            children[name] = small.to(dtype)
        clone = stand_in(module, dict.fromkeys(module._parameters), children)
        # Forwards that split by a stored size see the stand-in's.
        clone.__dict__.update(
            {name: sizes[size] for name, size in vars(module).items() if type(size) is int and size in sizes}
        )
        return clone

    chosen = choose(build, HIDDEN, list(_formulas(linears)))
    if isinstance(chosen, str):
        return chosen
    formula, regimes = chosen
    final: GluPlan = replace(formula.plan, regimes=regimes)
    name = f"glu[{final.activation}]" if final.up is not None else f"packed_glu[{final.activation}]"
    return Swap("glu", name, final, forward)

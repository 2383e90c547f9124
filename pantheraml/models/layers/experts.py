"""Stacked experts of a mixture as one node, with PEFT's LoRA on them taken as it is.

PEFT puts an adapter on a stack of experts by adding ``scaling * B @ A`` to the whole stack in every forward, and gets
the adapter's gradient from that of the whole stack. Here the update is multiplied beside the stack. What the experts
compute is learnt by running their class's own forward in float64 on a small stand-in.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ... import kernels
from ...kernels.four_bit_stack import FourBitStack
from ...kernels.glu import ACTIVATIONS
from ...kernels.grouped_gemm import Stack
from ...kernels.reference.nf4 import Quantized4Bit
from .. import stacks
from ..probe import FOREIGN_ERRORS, copy_child, stand_in
from ..roles import is_parameter_lora, looks_like_experts, plain_tensor
from .lora import compute_dtype, untouched
from .slots import Swap, is_installed, plan_of, stock_forward, swap_of, unhooked

# The implementations of transformers that stand for "whatever is fastest"; another one was asked for by name.
_DEFAULTS = ("grouped_mm", None)
_TOLERANCE = 1e-10
# Of the stand-in: experts, choices of a token, and magnitudes of tokens, so that clamps and saturation show.
_EXPERTS, _CHOICES = 5, 2
_SCALES = (1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0)
_HIDDEN, _INNER = 12, 20


@dataclass(frozen=True)
class ExpertsPlan:
    """What stacked experts compute: ``sum_k weight_k * down[e_k](glu(up[e_k](x)))``.

    Attributes:
        up: Name of the stack that makes gate and up.
        down: Name of the stack that projects back.
        transposed: Whether stacks lie as [experts, in, out].
        biased: Whether each has a bias, under its name and ``_bias``.
        activation: As in ``kernels.packed_glu``.
        options: Its other options.
        names: Parameters of the class's forward: tokens, chosen experts, their weights.
    """

    up: str
    down: str
    transposed: bool
    biased: bool
    activation: str
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def stack(self, experts: Any, name: str, adapters: list[_Adapter]) -> Stack:
        """The stack ``name`` as the kernels take it."""
        weight = stacks.held(experts, name)
        A = B = None
        scaling = 1.0
        if len(adapters) == 1:
            ((A, B, scaling),) = adapters
        elif adapters:
            A = torch.cat([a for a, _, _ in adapters], 1)
            B = torch.cat([b * s for _, b, s in adapters], 2)
        bias = getattr(experts, f"{name}_bias") if self.biased else None
        if isinstance(weight, Quantized4Bit):
            return Stack(FourBitStack(weight, self.transposed), bias, A, B, scaling)
        return Stack(weight.transpose(1, 2) if self.transposed else weight, bias, A, B, scaling)

    def compute(
        self,
        experts: Any,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        adapters: dict[str, list[_Adapter]],
        **options: Any,
    ) -> torch.Tensor:
        """Apply the formula with the module's parameters."""
        up, down = (self.stack(experts, name, adapters.get(name, [])) for name in (self.up, self.down))
        return kernels.experts_mlp(x, chosen, weights, up, down, self.activation, **self.options, **options)


# A [experts, r, in], B [experts, out, r] and the scaling.
_Adapter = tuple[torch.Tensor, torch.Tensor, float]


# ---------------------------------------------------------------- probing


def _eager(module: Any) -> Any:
    """The class's own forward, below transformers' choice of an implementation."""
    return inspect.unwrap(type(module).forward)


def _stacks(module: nn.Module) -> tuple[str, str, bool] | None:
    """Names of the stacks up and down, and whether they lie transposed."""
    shapes = stacks.shapes(module)
    for up, down in itertools.permutations(shapes, 2):
        (_, a, b), (_, c, d) = shapes[up], shapes[down]
        if len(shapes) == 2 and (a, b) == (2 * d, c):
            return up, down, False
        if len(shapes) == 2 and (a, b) == (d, 2 * c):
            return up, down, True
    return None


def _formulas(plan: ExpertsPlan, module: nn.Module) -> Iterator[ExpertsPlan]:
    constants = [None, *dict.fromkeys(v for v in vars(module).values() if isinstance(v, float) and v > 0)]
    for activation, interleaved in itertools.product(ACTIVATIONS, (False, True)):
        alphas = constants if activation == "silu" else [None]
        for limit, alpha, offset in itertools.product(constants, alphas, (0.0, 1.0)):
            options = {"interleaved": interleaved, "limit": limit, "alpha": alpha, "up_offset": offset}
            yield ExpertsPlan(plan.up, plan.down, plan.transposed, plan.biased, activation, plan.names, options)


def _small(module: nn.Module, plan: ExpertsPlan) -> nn.Module:
    """A stand-in with few small experts in float64."""
    shapes = stacks.shapes(module)
    count, down = shapes[plan.up][0], shapes[plan.down][1:]
    inner, hidden = down if plan.transposed else down[::-1]
    small_inner = _HIDDEN // 2 if hidden == 2 * inner else _HIDDEN if hidden == inner else _INNER
    sizes = {hidden: _HIDDEN, inner: small_inner, 2 * inner: 2 * small_inner}
    generator = torch.Generator(device="cpu").manual_seed(6)
    parameters: dict[str, torch.Tensor | None] = {}
    # The order decides which numbers each gets, and stacks in 4 bits have none among the others.
    own = {name: None if p is None else tuple(p.shape) for name, p in module._parameters.items()} | shapes
    for name, stored in own.items():
        if stored is None:
            parameters[name] = None
            continue
        shape = (_EXPERTS, *(sizes[size] for size in stored[1:]))
        parameters[name] = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator) * 0.4
    children = {name: copy_child(child) for name, child in _children(module)}
    clone = stand_in(module, parameters, children)
    for name, value in vars(module).items():
        if type(value) is int and "expert" in name and value == count:
            clone.__dict__[name] = _EXPERTS
        elif type(value) is int and value in sizes:
            clone.__dict__[name] = sizes[value]
    return clone.requires_grad_(False)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if name != stacks.PARAMETRIZATIONS]


def plan(module: Any) -> Swap | str:
    """Find out what stacked experts compute.

    Args:
        module: A candidate for the experts role.

    Returns:
        What to install, or why the module keeps its forward.
    """
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if hasattr(module, "has_gate") and implementation not in _DEFAULTS:
        return f"experts_implementation={implementation!r} was asked for"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts lie on several devices"
    found = _stacks(module)
    names = tuple(inspect.signature(_eager(module)).parameters)[1:]
    if found is None:
        return "its stacks are no gate and up in one, and a projection back"
    if len(names) != 3:
        return "its forward takes other arguments"
    up, down, transposed = found
    biases = {f"{up}_bias", f"{down}_bias"}
    present = {name for name, p in module._parameters.items() if p is not None} | stacks.four_bit(module).keys()
    if present - {up, down} not in (set(), biases) or any(True for _, c in _children(module) for _ in c.parameters()):
        return "it holds something besides two stacks and their biases"
    draft = ExpertsPlan(up, down, transposed, biases <= present, "", names)
    generator = torch.Generator(device="cpu").manual_seed(5)
    x = torch.randn(len(_SCALES), _HIDDEN, dtype=torch.float64, device="cpu", generator=generator)
    x = x * torch.tensor(_SCALES, dtype=torch.float64, device="cpu")[:, None]
    draws = torch.rand(len(_SCALES), _EXPERTS, dtype=torch.float64, device="cpu", generator=generator)
    weights, chosen = draws.topk(_CHOICES, -1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            clone = _small(module, draft)
            truth = _eager(module)(clone, x, chosen, weights)
        except FOREIGN_ERRORS as error:
            return f"its forward cannot be probed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if not isinstance(truth, torch.Tensor) or truth.shape != x.shape:
            return "its forward returns something else than the weighted sum"
        allowed = _TOLERANCE * truth.abs().amax(-1, keepdim=True)
        for formula in _formulas(draft, module):
            ours = formula.compute(clone, x, chosen, weights, {}, backend="reference")
            if bool(((ours - truth).abs() <= allowed).all()):
                return Swap("experts", f"experts_mlp[{formula.activation}]", formula, forward)
    return "its gate is of no form that is known here"


# ---------------------------------------------------------------- calling


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of swapped experts: tokens [T, H], chosen experts [T, K] and weights [T, K] to [T, H]."""
    out = _run(self, args, kwargs, {})
    return stock_forward(self, *args, **kwargs) if out is None else out


def _run(experts: Any, args: Any, kwargs: Any, adapters: dict[str, list[_Adapter]]) -> torch.Tensor | None:
    """The fused experts; None for a call that they do not cover."""
    plan: ExpertsPlan = plan_of(experts)
    call = {**dict(zip(plan.names, args)), **kwargs}
    if len(args) > len(plan.names) or call.keys() != set(plan.names) or torch.compiler.is_compiling():
        return None
    x, chosen, weights = (call[name] for name in plan.names)
    if stacks.adapted_by_others(experts):
        return None
    held = [stacks.held(experts, name) for name in (plan.up, plan.down)]
    plain = [x, chosen, weights, *(weight for weight in held if not isinstance(weight, Quantized4Bit))]
    if not all(isinstance(t, torch.Tensor) and plain_tensor(t) for t in plain):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or getattr(experts, "_is_expert_parallel", False):
        return None
    if x.dim() != 2 or weights.shape != chosen.shape or not weights.is_floating_point():
        return None
    dtype = compute_dtype(x)
    if not torch.is_autocast_enabled(x.device.type) and held[0].dtype != dtype:
        return None
    return plan.compute(experts, x.to(dtype), chosen, weights, adapters).to(x.dtype)


# ---------------------------------------------------------------- adapters


def innermost(module: Any) -> Any:
    """What one or several LoRA wrappers of parameters wrap."""
    while is_parameter_lora(module):
        module = module.base_layer
    return module


def plan_lora(module: Any) -> Swap | str:
    """Decide whether LoRA on a parameter can take the fused path; experts are decided on before.

    Args:
        module: A LoRA layer of PEFT around a module with parameters of its own.

    Returns:
        What to install, or why the wrapper keeps its forward.
    """
    experts = innermost(module)
    swap = swap_of(experts)
    if swap is not None and isinstance(swap.plan, ExpertsPlan):
        return Swap("lora", swap.implementation, None, forward_lora)
    what = "experts that keep their forward" if looks_like_experts(experts) else type(experts).__name__
    return f"no fused path for LoRA on a parameter of {what}"


def forward_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped LoRA wrapper around experts; as ``forward`` with all adapters of the chain."""
    experts, adapters = _adapters(self)
    out = None if adapters is None else _run(experts, args, kwargs, adapters)
    return stock_forward(self, *args, **kwargs) if out is None else out


def _adapters(wrapper: Any) -> tuple[Any, dict[str, list[_Adapter]] | None]:
    """The experts inside, and the active adapters by name of the stack; None where PEFT's own forward has to run."""
    found: dict[str, list[_Adapter]] = {}
    module = wrapper
    while is_parameter_lora(module):
        own = module is wrapper
        if module.disable_adapters or module.merged or not (own or (is_installed(module) and unhooked(module))):
            return None, None
        adapters = [_factors(module, name) for name in module.active_adapters if name in module.lora_A]
        if any(adapter is None for adapter in adapters):
            return None, None
        found[module.parameter_name] = adapters  # type: ignore[assignment]
        module = module.base_layer
    swap = swap_of(module)
    if swap is None or not isinstance(swap.plan, ExpertsPlan) or not is_installed(module):
        return None, None
    if not stacks.unhooked(module):
        return None, None
    # PEFT has two layouts of a stack, told by its class; they have to be those of the plan.
    wrappers = _wrappers(wrapper)
    if not found.keys() <= {swap.plan.up, swap.plan.down} or any(
        getattr(w, "_did_swap_in_out_features", None) is swap.plan.transposed for w in wrappers
    ):
        return None, None
    return module, found


def _wrappers(module: Any) -> Iterator[Any]:
    while is_parameter_lora(module):
        yield module
        module = module.base_layer


def _factors(module: Any, name: str) -> _Adapter | None:
    """A, B and scaling of an adapter, as PEFT packs the experts into two linear layers."""
    A, B = module.lora_A[name], module.lora_B[name]
    plain = type(A) is nn.Linear and type(B) is nn.Linear and A.bias is None and B.bias is None
    if name in module.lora_variant or not plain or not (untouched(A) and untouched(B)):
        return None
    if not plain_tensor(A.weight) or not plain_tensor(B.weight) or module.num_experts < 2:
        return None
    count = module.num_experts
    first = A.weight.view(count, -1, A.weight.shape[1])
    second = B.weight.view(B.weight.shape[0], -1, count).permute(2, 0, 1)
    return first, second, float(module.scaling[name])

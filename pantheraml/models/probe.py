"""Find out what a module computes by running its own forward on small random inputs.

A stand-in is a shallow copy of the module with small random weights in float32 or bfloat16 on the CPU; the model's
weights are neither read nor moved. The formula that agrees with the stock forward in every bit is the module's formula.
Where no formula agrees in every bit, one is accepted whose error against the stock forward in float64 is within
``ERROR_FACTOR`` times that of the stock forward in the same dtype, which is what rounding in another order does.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

# Rows of small, usual and large values: epsilon shows in the first, clamps and saturation in the last.
ROW_SCALES = (1e-3, 0.3, 1.0, 4.0, 100.0)
ERROR_FACTOR = 1.5
# Besides that, so many units in the last place of the row's largest value. A stock forward that computes in float32 is
# its own truth there, and another order of summation moves it by a few units.
FLOOR_ULPS = {torch.float32: 4, torch.bfloat16: 1}
# What calling a foreign forward on a stand-in may raise; anything else is a fault of this package.
FOREIGN_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
    ZeroDivisionError,
    ImportError,
)


class Regime(StrEnum):
    """The combination of dtypes in which a module is called."""

    SAME = "same dtype"
    MIXED = "input and weight differ in dtype"
    AUTOCAST = "autocast"


def regime_of(x: torch.Tensor, weight: torch.Tensor | None) -> Regime:
    """Return the regime of a call on ``x`` with ``weight``."""
    if torch.is_autocast_enabled(x.device.type):
        return Regime.AUTOCAST
    return Regime.SAME if weight is None or weight.dtype == x.dtype else Regime.MIXED


def random_rows(
    width: int, dtype: torch.dtype, *, seed: int = 0, scales: tuple[float, ...] = ROW_SCALES
) -> torch.Tensor:
    """Return random inputs ``[2, len(scales), width]`` on the CPU, each row of its own magnitude."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(2, len(scales), width, generator=generator, device="cpu", dtype=torch.float32)
    return (x * torch.tensor(scales, device="cpu").view(1, -1, 1)).to(dtype)


def stand_in(
    module: nn.Module, parameters: dict[str, torch.Tensor | None], children: dict[str, nn.Module]
) -> nn.Module:
    """Return a shallow copy of ``module`` in training mode with other parameters and children, and nothing hooked.

    Args:
        module: The module to imitate; it is left untouched.
        parameters: The copy's own parameters.
        children: The copy's children.
    """
    clone = object.__new__(type_before_parametrizations(module))
    state = dict(module.__dict__)
    for name in [name for name in state if name in ("forward", "_old_forward", "_hf_hook", "_pantheraml_swap")]:
        del state[name]
    hooks = {name: OrderedDict() for name, value in state.items() if isinstance(value, OrderedDict) and "hooks" in name}
    own = {name: None if value is None else nn.Parameter(value) for name, value in parameters.items()}
    state.update(hooks, _parameters=own, _modules=dict(children), _buffers={}, training=True)
    clone.__dict__.update(state)
    return clone


def copy_child(child: nn.Module) -> nn.Module:
    """Return a copy of a small child (an activation, a dropout) in training mode and without its tensors' devices."""
    return copy.deepcopy(child).to("cpu").train()


@contextmanager
def _quietly() -> Iterator[None]:
    """No gradients, no autocast, and the random state of the CPU as it was."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield


@dataclass(frozen=True)
class Formula:
    """A formula to compare with a stock forward.

    Attributes:
        plan: What the formula is, for the caller.
        compute: Maps ``(stand-in, x)`` to the formula's result.
    """

    plan: Any
    compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _differing(stock: Any, ours: Any, truth: torch.Tensor | None) -> float | None:
    """Return the share of elements in which ours differs from stock; None when it is not the same function."""
    if not isinstance(stock, torch.Tensor) or stock.shape != ours.shape or stock.dtype != ours.dtype:
        return None
    share = (stock != ours).float().mean().item()
    if share == 0.0:
        return 0.0
    if truth is None or not torch.isfinite(ours).all() or not torch.isfinite(stock).all():
        return None
    scale = truth.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    floor = FLOOR_ULPS.get(stock.dtype, 1) * torch.finfo(stock.dtype).eps
    stock_error = ((stock.double() - truth) / scale).abs().amax(dim=-1)
    our_error = ((ours.double() - truth) / scale).abs().amax(dim=-1)
    return share if bool((our_error <= ERROR_FACTOR * stock_error + floor).all()) else None


def _run(module: nn.Module, x: torch.Tensor) -> Any:
    return type(module).forward(module, x)


def choose(
    build: Callable[[torch.dtype], nn.Module],
    width: int,
    formulas: list[Formula],
) -> tuple[Formula, frozenset[Regime]] | str:
    """Choose the formula that a module computes.

    Args:
        build: Makes the module's stand-in with weights of a dtype; the same random values every time.
        width: Size of the input's last dimension.
        formulas: The formulas to try, the likeliest first.

    Returns:
        The formula and the regimes in which it holds, or the reason why none does.
    """
    cases = {
        # regime -> (weights, input, autocast); every case of a regime has to agree.
        Regime.SAME: [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, False)],
        Regime.MIXED: [(torch.float32, torch.bfloat16, False)],
        Regime.AUTOCAST: [(torch.float32, torch.float32, True), (torch.float32, torch.bfloat16, True)],
    }
    with _quietly():
        scores: dict[int, float] = {}
        for index, formula in enumerate(formulas):
            score = _score(build, width, formula, cases[Regime.SAME])
            if isinstance(score, str):
                return score
            if score is not None:
                scores[index] = score
            if score == 0.0:
                break
        if not scores:
            return "its forward computes something else"
        best = formulas[min(scores, key=scores.__getitem__)]
        regimes = {Regime.SAME}
        for regime in (Regime.MIXED, Regime.AUTOCAST):
            if isinstance(_score(build, width, best, cases[regime]), float):
                regimes.add(regime)
    return best, frozenset(regimes)


def _score(
    build: Callable[[torch.dtype], nn.Module],
    width: int,
    formula: Formula,
    cases: list[tuple[torch.dtype, torch.dtype, bool]],
) -> float | str | None:
    """Largest share of differing elements over the cases; None when the formula differs, a reason when stock fails."""
    worst = 0.0
    for weights, inputs, autocast in cases:
        x = random_rows(width, inputs)
        module = build(weights)
        drawn = torch.random.get_rng_state()
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                stock = _run(module, x)
        except FOREIGN_ERRORS as error:
            return f"its forward cannot be probed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if not torch.equal(drawn, torch.random.get_rng_state()):
            return "its forward draws random numbers in training"
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                ours = formula.compute(build(weights), x)
        except FOREIGN_ERRORS:
            return None
        try:
            # The weights as the dtype under test rounds them, so that only the arithmetic differs.
            truth = _run(build(weights).to(torch.float64), x.double())
        except FOREIGN_ERRORS:
            truth = None
        if not isinstance(truth, torch.Tensor) or truth.dtype != torch.float64:
            truth = None
        share = _differing(stock, ours, truth)
        if share is None:
            return None
        worst = max(worst, share)
    return worst

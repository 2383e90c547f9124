"""Swap a model's modules for fused ones: what was swapped, what was left and why, and the way back.

Only instances change, never classes, so that import order does not matter and other models in the process stay stock.
Parameter names and state dicts stay those of transformers and PEFT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from .. import log
from ..device import get_device
from . import loss as _loss  # noqa: F401  (registers the losses of lazy logits)
from .families import KEEP_STOCK
from .fused_head import uninstall_fused_head
from .layers import attention, decoder, experts, head, lora, mlp, norm
from .layers.slots import Swap, foreign_forward, install, is_installed, swap_of, uninstall
from .roles import Candidate, Role, base_model, find_roles, is_parameter_lora

__all__ = ["AdaptReport", "Left", "Swapped", "adapt", "restore"]


def _plan_lora(module: nn.Module) -> Swap | str:
    return experts.plan_lora(module) if is_parameter_lora(module) else lora.plan(module)


Planner = Callable[[nn.Module], Swap | str]
PLANNERS: dict[Role, Planner] = {
    Role.NORM: norm.plan,
    Role.GLU_MLP: mlp.plan,
    Role.ATTENTION: attention.plan,
    Role.LORA: _plan_lora,
    Role.HEAD: head.plan,
    Role.EXPERTS: experts.plan,
    Role.LAYER: decoder.plan,
}
# Differs in every layer and decides nothing by itself: what depends on it lies in attributes of its own.
_POSITION = "layer_idx"


@dataclass(frozen=True)
class Swapped:
    """A module with a fused forward.

    Attributes:
        module: Its name in the transformers model.
        role: ``"norm"``, ``"glu"``, ``"attention"``, ``"lora"``, ``"head"``, ``"layer"`` or ``"experts"``.
        implementation: The op that serves it.
    """

    module: str
    role: str
    implementation: str


@dataclass(frozen=True)
class Left:
    """A module with a known role that keeps its forward.

    Attributes:
        module: Its name in the transformers model.
        role: ``"norm"``, ``"glu"``, ``"attention"``, ``"lora"``, ``"head"``, ``"layer"`` or ``"experts"``.
        reason: Why.
    """

    module: str
    role: str
    reason: str


@dataclass
class AdaptReport:
    """What ``adapt`` did to a model.

    Attributes:
        model: Class name of the transformers model.
        swapped: Modules that run fused forwards.
        left: Modules with a known role that do not, with reasons.
    """

    model: str
    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line: the model, counts of what was swapped, and what was left with reasons."""
        counts = Counter(entry.implementation for entry in self.swapped)
        done = ", ".join(f"{name} {count}" for name, count in counts.items())
        line = f"{self.model}: {len(self.swapped)} modules swapped" + (f" ({done})" if done else "")
        reasons = Counter((entry.role, entry.reason) for entry in self.left)
        if reasons:
            kept = ", ".join(f"{role} {count} ({reason})" for (role, reason), count in reasons.items())
            line += f"; left: {kept}"
        return line


def _signature(candidate: Candidate) -> tuple[object, ...]:
    """Modules with equal signatures compute the same formula, so that one probe serves all of them."""
    module = candidate.module
    plain = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, bool)) and name not in ("training", _POSITION)
    )
    # Objects (a config, an activation function) are the same for the same id while the model lives.
    others = tuple(
        (name, id(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and not isinstance(value, (int, float, str, bool))
    )
    # A layer's own children have candidates, and signatures, of their own.
    show = type if candidate.role is Role.LAYER else repr
    children = tuple((name, show(child)) for name, child in module.named_children())
    parameters = tuple((name, None if p is None else (p.shape, p.dtype)) for name, p in module._parameters.items())
    return candidate.role, type(module), plain, others, children, parameters


def _decide(candidate: Candidate, decided: dict[tuple[object, ...], Swap | str]) -> Swap | str:
    module = candidate.module
    if get_device().type == "xla" and candidate.role is not Role.HEAD:
        return "the XLA compiler fuses it"
    exception = KEEP_STOCK.get(type(module).__name__)
    if exception is not None:
        return exception
    if foreign_forward(module) is not None:
        return "another library replaced its forward"
    planner = PLANNERS[candidate.role]
    if candidate.role is Role.HEAD:
        return planner(module)
    signature = _signature(candidate)
    if signature not in decided:
        decided[signature] = planner(module)
    return decided[signature]


def adapt(model: nn.Module) -> AdaptReport:
    """Give every module whose formula is known its fused forward.

    Adapting twice changes nothing; call it again after PEFT wrapped the model, so that a head with an adapter is served
    as a whole. An architecture of which nothing is known is left alone, which is told once.

    Args:
        model: A transformers model, or PEFT's wrapper around one.

    Returns:
        The report, which is also kept as ``adapt_report`` of the transformers model.
    """
    inner = base_model(model)
    candidates = find_roles(inner)
    report = AdaptReport(type(inner).__name__)
    wanted = {id(candidate.module) for candidate in candidates}
    for module in inner.modules():
        if swap_of(module) is not None and id(module) not in wanted:
            # What PEFT has wrapped since: the wrapper plays the role now.
            uninstall(module)
    decided: dict[tuple[object, ...], Swap | str] = {}
    # LoRA on experts is served as the experts inside are.
    for candidate in sorted(candidates, key=lambda candidate: candidate.role is Role.LORA):
        module = candidate.module
        if candidate.role is Role.LORA:
            lora.adopt(module)
        swap = swap_of(module)
        if swap is None or not is_installed(module):
            decision = _decide(candidate, decided)
            if isinstance(decision, str):
                report.left.append(Left(candidate.name, candidate.role.value, decision))
                continue
            swap = Swap(decision.role, decision.implementation, decision.plan, decision.forward)
            install(module, swap)
        report.swapped.append(Swapped(candidate.name, swap.role, swap.implementation))
    inner.adapt_report = report
    if not report.swapped:
        log.once(
            f"{report.model} runs unaccelerated: none of its modules has a form that is known here",
            key=f"models.adapt.{report.model}",
        )
    return report


def restore(model: nn.Module) -> None:
    """Undo ``adapt`` (and ``install_fused_head``): every module runs its stock forward again.

    Args:
        model: The adapted transformers model, or PEFT's wrapper around it.
    """
    inner = base_model(model)
    uninstall_fused_head(inner)
    for module in inner.modules():
        uninstall(module)
    inner.__dict__.pop("adapt_report", None)

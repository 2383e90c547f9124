"""Putting a forward into one module, and taking it out again.

Only the instance changes: its class, its parameters and its place in the model stay. The forward is a bound method of a
module-level function, so that ``copy.deepcopy`` rebinds it to the copy; what the function needs to know lies in the
module as a ``Swap``.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_KEY = "_pantheraml_swap"
# accelerate's hooks put their own forward into the instance and keep the one they call under this name.
_HOOKED = "_old_forward"


@dataclass
class Swap:
    """What was put into a module.

    Attributes:
        role: The role the module plays.
        implementation: Name of what serves it now, for the report.
        plan: What the forward needs to know about the module.
        forward: The function that serves as the module's forward.
        previous: A forward that another library had put into the instance before, which ``uninstall`` puts back.
    """

    role: str
    implementation: str
    plan: Any
    forward: Callable[..., Any]
    previous: Callable[..., Any] | None = None


def swap_of(module: nn.Module) -> Swap | None:
    """Return what was put into ``module``, or None."""
    return module.__dict__.get(_KEY)


def plan_of(module: nn.Module) -> Any:
    """Return the plan of a module that ``install`` has served."""
    return module.__dict__[_KEY].plan


def stock_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run what the module ran before ``install``, below accelerate's hooks."""
    swap = swap_of(module)
    if swap is not None and swap.previous is not None:
        return swap.previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _slot(module: nn.Module) -> str:
    return _HOOKED if _HOOKED in module.__dict__ else "forward"


def _is_ours(method: Any, module: nn.Module) -> bool:
    swap = swap_of(module)
    return swap is not None and getattr(method, "__func__", None) is swap.forward


def is_installed(module: nn.Module) -> bool:
    """Whether what ``install`` put into the module is still in place."""
    return any(_is_ours(module.__dict__.get(slot), module) for slot in ("forward", _HOOKED))


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module calls its forward alone."""
    d = module.__dict__
    return not (d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


def foreign_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that another library put into the instance, looking below accelerate's hooks; None without."""
    method = module.__dict__.get(_slot(module))
    if method is None or _is_ours(method, module) or getattr(method, "__func__", None) is type(module).forward:
        return None
    return method


def install(module: nn.Module, swap: Swap) -> None:
    """Make ``swap.forward`` the forward of this instance.

    accelerate's hooks (device placement) stay around it. Installing over an earlier swap replaces it.
    """
    uninstall(module)
    swap.previous = foreign_forward(module)
    module.__dict__[_KEY] = swap
    module.__dict__[_slot(module)] = types.MethodType(swap.forward, module)


def uninstall(module: nn.Module) -> bool:
    """Give a module its former forward back; return whether there was anything to undo."""
    swap = swap_of(module)
    if swap is None:
        return False
    for slot in ("forward", _HOOKED):
        if not _is_ours(module.__dict__.get(slot), module):
            continue
        if swap.previous is not None:
            module.__dict__[slot] = swap.previous
        elif slot == _HOOKED:
            module.__dict__[slot] = types.MethodType(type(module).forward, module)
        else:
            del module.__dict__[slot]
    del module.__dict__[_KEY]
    return True

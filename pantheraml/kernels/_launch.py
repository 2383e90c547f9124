"""A jitted function whose repeated launches take half the time on the host.

Triton binds, specialises and formats all arguments at every launch, about 25 µs with the two dozen that a kernel here
has. A layer of a small model launches fifty kernels of about 20 µs each, so that the GPU waits for the host. Here a
launch is found by what Triton's choice of a compiled form depends on, and goes straight to the compiled form; the first
of each kind, and whatever Triton's own hooks want to see, goes through Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Releases whose compiled forms are launched with the arguments below.
KNOWN = ((3, 6), (3, 7))
_INT32 = 1 << 31


class _Form(NamedTuple):
    """What a launch needs of a compiled kernel."""

    run: Callable[..., None]
    function: Any
    metadata: Any


def _unhooked(hook: Any) -> bool:
    return hook is None or getattr(hook, "calls", hook) == []


class Kernel(JITFunction):
    """A ``triton.jit`` function, launched as ``kernel[grid](name=value, ...)``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forms: dict[Any, _Form] = {}
        self._order = tuple(parameter.name for parameter in self.params)
        self._ordinary = frozenset(
            p.name for p in self.params if not (p.is_constexpr or p.do_not_specialize or p.annotation_type)
        )
        self._typed = frozenset(p.name for p in self.params if p.do_not_specialize and not p.is_constexpr)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid, warmup=False)

    def key(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What the compiled form depends on: at least as fine as Triton's own choice."""
        found: list[Any] = []
        add = found.append
        ordinary, typed = self._ordinary, self._typed
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                add((name, value.dtype, value.data_ptr() & 15 == 0))
            elif value.__class__ is int and name in ordinary:
                # Triton tells apart 1, multiples of 16 and what needs 64 bits.
                add((name, value if value == 1 else (value & 15 == 0, -_INT32 <= value < _INT32, value >= 1 << 63)))
            elif value.__class__ is float and (name in ordinary or name in typed):
                add((name, float))
            elif value.__class__ is int and name in typed:
                add((name, -_INT32 <= value < _INT32, value >= 1 << 63))
            else:
                add((name, value.__class__, value))
        return tuple(found)

    def run(self, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        runtime = knobs.runtime
        if (
            args
            or warmup
            or callable(grid)
            or self.pre_run_hooks
            or not _unhooked(runtime.launch_enter_hook)
            or not _unhooked(runtime.launch_exit_hook)
        ):
            return super().run(*args, grid=grid, warmup=warmup, **arguments)
        active: Any = driver.active
        device = active.get_current_device()
        key = (device, self.key(arguments))
        form = self._forms.get(key)
        if form is None:
            compiled: Any = super().run(grid=grid, warmup=False, **arguments)
            # Without a default in between, what was given is all that the form takes.
            if compiled is not None and arguments.keys() >= set(self._order):
                self._forms[key] = _Form(compiled.run, compiled.function, compiled.packed_metadata)
            return compiled
        sizes = (*grid, 1, 1)
        form.run(
            *sizes[:3],
            active.get_current_stream(device),
            form.function,
            form.metadata,
            None,
            None,
            None,
            *[arguments[name] for name in self._order],
        )
        return None


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit`` with the launches above, where this Triton is known and compiles."""
    if function is None:
        return functools.partial(jit, **options)
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if knobs.runtime.interpret or release not in KNOWN:
        return triton.jit(function, **options)
    return Kernel(function, **options)

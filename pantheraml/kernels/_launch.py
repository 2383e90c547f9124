"""A jitted function whose repeated launches take less time on the host.

Triton binds, specialises and formats all arguments at every launch, and a kernel here has two dozen. A layer of
Llama-3.2-1B launches fifty of them a step, and the GPU waits for the host. Here a launch like an earlier one goes
straight to the compiled form, and so does one for which Triton would choose that form; the first of each kind, and
whatever Triton's own hooks want to see, goes through Triton. ``Launch`` holds what does not change from call to call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .utils import on_device

# Releases whose compiled forms are launched with the arguments below.
KNOWN = ((3, 6), (3, 7))
_INT32 = 1 << 31
# Launches of one kernel whose sizes are remembered, before they are forgotten together.
_REMEMBERED = 4096
# Tensors of other classes may be anything, and go through Triton.
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


class _Form(NamedTuple):
    """What a launch needs of a compiled kernel."""

    run: Callable[..., None]
    function: Any
    metadata: Any


def _hooked(runtime: Any) -> bool:
    """Whether somebody wants to see every launch."""
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", hook) != []:
            return True
    return False


class Kernel(JITFunction):
    """A ``triton.jit`` function, launched as ``kernel[grid](name=value, ...)``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forms: dict[Any, _Form] = {}
        self._known: dict[Any, _Form] = {}
        self._names = tuple(parameter.name for parameter in self.params)
        names = self._names
        self._in_order = operator.itemgetter(*names) if len(names) > 1 else lambda given: [given[n] for n in names]
        self._ordinary = frozenset(
            p.name for p in self.params if not (p.is_constexpr or p.do_not_specialize or p.annotation_type)
        )
        self._typed = frozenset(p.name for p in self.params if p.do_not_specialize and not p.is_constexpr)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid, warmup=False)

    def key(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What the compiled form depends on: at least as fine as Triton's own choice."""
        found: list[Any] = []
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                found.append((name, value.dtype, value.data_ptr() & 15 == 0))
            elif value.__class__ is int and name in self._ordinary:
                # Triton tells apart 1, multiples of 16 and what needs 64 bits.
                kind = (value & 15 == 0, -_INT32 <= value < _INT32, value >= 1 << 63)
                found.append((name, value if value == 1 else kind))
            elif value.__class__ is float and (name in self._ordinary or name in self._typed):
                found.append((name, float))
            elif value.__class__ is int and name in self._typed:
                found.append((name, -_INT32 <= value < _INT32, value >= 1 << 63))
            else:
                found.append((name, value.__class__, value))
        return tuple(found)

    def run(self, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        if args or warmup or self.pre_run_hooks or _hooked(knobs.runtime) or callable(grid):
            return super().run(*args, grid=grid, warmup=warmup, **arguments)
        active: Any = driver.active
        device = active.get_current_device()
        values = arguments.values()
        classes = tuple(map(type, values))
        # The sizes as they are: a step has those of the step before. 1, 1.0 and True are equal, their classes are not.
        seen = (
            device,
            tuple(arguments),
            classes,
            tuple([(v.dtype, v.data_ptr() & 15) if c in _TENSORS else v for c, v in zip(classes, values)]),
        )
        form = self._known.get(seen)
        if form is None:
            if any(issubclass(c, torch.Tensor) and c not in _TENSORS for c in classes):
                return super().run(grid=grid, warmup=False, **arguments)
            key = (device, self.key(arguments))
            form = self._forms.get(key)
            if form is None:
                compiled: Any = super().run(grid=grid, warmup=False, **arguments)
                # Without a default in between, what was given is all that the form takes.
                if compiled is not None and arguments.keys() >= set(self._names):
                    self._forms[key] = _Form(compiled.run, compiled.function, compiled.packed_metadata)
                return compiled
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[seen] = form
        x, y, z, *_ = (*grid, 1, 1)
        stream = active.get_current_stream(device)
        form.run(x, y, z, stream, form.function, form.metadata, None, None, None, *self._in_order(arguments))
        return None


class Launch:
    """A launch at given sizes, which takes tensors only, on the GPU of the first.

    Args:
        kernel: What :func:`jit` returned.
        grid: Programs in each dimension.
        tensors: Names of the arguments that are given at each call, which are the kernel's first ones.
        arguments: All other arguments.
    """

    __slots__ = ("_arguments", "_forms", "_grid", "_kernel", "_names", "_rest")

    def __init__(self, kernel: Any, grid: tuple[int, ...], tensors: tuple[str, ...], **arguments: Any) -> None:
        self._kernel, self._names, self._arguments = kernel, tensors, arguments
        self._grid = (*grid, 1, 1)[:3]
        self._forms: dict[tuple[Any, ...], _Form] | None = None
        if isinstance(kernel, Kernel) and {*tensors, *arguments} >= set(kernel._names):
            assert kernel._names[: len(tensors)] == tensors
            self._forms = {}
            self._rest = [arguments[name] for name in kernel._names[len(tensors) :]]

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on these tensors; None for one that the kernel goes without."""
        first = tensors[0]
        assert first is not None
        forms = self._forms
        if forms is None or self._kernel.pre_run_hooks or _hooked(knobs.runtime):
            with on_device(first):
                self._kernel[self._grid](**dict(zip(self._names, tensors)), **self._arguments)
            return
        active: Any = driver.active
        device = active.get_current_device()
        at = first.get_device()
        if at != device and at >= 0:
            with on_device(first):
                self(*tensors)
            return
        given = (device, *[None if x is None else (x.__class__, x.dtype, x.data_ptr() & 15) for x in tensors])
        form = forms.get(given) or self._form(given, tensors)
        if form is None:
            return
        x, y, z = self._grid
        stream = active.get_current_stream(device)
        form.run(x, y, z, stream, form.function, form.metadata, None, None, None, *tensors, *self._rest)

    def _form(self, given: tuple[Any, ...], tensors: tuple[torch.Tensor | None, ...]) -> _Form | None:
        """The compiled form for such tensors; None when there was none and Triton has launched what it compiled."""
        kernel = self._kernel
        arguments = dict(zip(self._names, tensors)) | self._arguments
        if all(x is None or x.__class__ in _TENSORS for x in tensors):
            form = kernel._forms.get((given[0], kernel.key(arguments)))
            if form is not None:
                assert self._forms is not None
                self._forms[given] = form
                return form
        kernel.run(grid=self._grid, warmup=False, **arguments)
        return None


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit`` with the launches above, where this Triton is known and compiles."""
    if function is None:
        return functools.partial(jit, **options)
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if knobs.runtime.interpret or release not in KNOWN:
        return triton.jit(function, **options)
    return Kernel(function, **options)

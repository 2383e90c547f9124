"""Triton, or stand-ins that let the kernel files be read where Triton is not installed.

Kernel files write ``from ._triton import jit, tl, triton``. Without Triton the decorated functions stay plain Python
functions that nobody calls: ``dispatch.resolve`` answers "reference" there, or raises when Triton was asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .utils import on_device as on_device

if TYPE_CHECKING:
    import triton as triton
    import triton.language as tl

    AVAILABLE: bool

    from ._launch import Launch as Launch

    def jit(function: Any = None, **options: Any) -> Any: ...
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

        def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
            """Leave the function as it is; ``options`` are those of ``triton.jit``."""
            return function if function is not None else lambda decorated: decorated

        Launch: Any = None
        AVAILABLE = False
    else:
        from ._launch import Launch as Launch
        from ._launch import jit

        AVAILABLE = True


# For functions that make a ``Launch`` from sizes: a step has those of the step before.
remembered = functools.lru_cache(maxsize=4096, typed=True)


@jit
def _probe():
    """Tells by its type whether kernels are compiled or interpreted."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return AVAILABLE and not isinstance(_probe, triton.JITFunction)

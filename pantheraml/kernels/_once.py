"""A backward that is written for one differentiation, and says so when it is asked for a second.

torch's ``once_differentiable`` objects only where the incoming gradient has a graph of its own. That of a loss has
none, and a second derivative would lack what goes through the op without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _once_differentiable

from ..errors import UnsupportedError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an ``autograd.Function``.

    Raises, when it is called with ``create_graph=True``:
        UnsupportedError: its result would be taken for a constant.
    """
    once = _once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedError(
                "a fused operation can be differentiated once",
                where="create_graph=True",
                why="its backward is a kernel, of which autograd knows no derivative",
                hint="use the model's own operations: pantheraml.restore(model), and attn_implementation='eager'",
            )
        return once(ctx, *upstream)

    return checked

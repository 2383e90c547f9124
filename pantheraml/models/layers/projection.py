"""A call of the output head that may never have to be carried out, and when heads are lazy at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import ConflictError
from ..roles import plain_tensor
from .slots import plan_of, stock_forward


class _State(threading.local):
    eager = False
    forced = False


_state = _State()


@contextmanager
def eager_heads() -> Iterator[None]:
    """Heads return real logits inside."""
    previous, _state.eager = _state.eager, True
    try:
        yield
    finally:
        _state.eager = previous


@contextmanager
def lazy_heads() -> Iterator[None]:
    """Heads return lazy logits inside, also for a single position without gradients."""
    previous, _state.forced = _state.forced, True
    try:
        yield
    finally:
        _state.forced = previous


def wants_lazy(hidden: torch.Tensor) -> bool:
    """Whether a head called on ``hidden`` should be lazy.

    A decoding step (one position, no gradient) is not: its logits are read at once. Neither is anything under a
    compiler's or tracer's eyes, or of a tensor type that redefines operations.
    """
    if _state.eager or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not plain_tensor(hidden) or hidden.dim() < 2:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(hidden):
        return False
    return _state.forced or torch.is_grad_enabled() or hidden.shape[-2] > 1


@dataclass
class Uses:
    """Uses of the logits of one call of the head.

    Attributes:
        fused: Whether a loss was computed without the logits.
    """

    fused: bool = False


@dataclass(frozen=True)
class Projection:
    """A head, and the circumstances under which it was called.

    Attributes:
        module: The head.
        out_features: Size of the vocabulary V.
        dtype: Of the logits.
        device: Of the logits.
        autocast: Arguments of ``torch.autocast`` at the call.
        grad: Whether gradients were recorded.
        inference: Whether inference mode was on.
        versions: The head's parameters and their versions at the call.
        uses: What happened to the logits since, shared by everything derived from them.
    """

    module: nn.Module
    out_features: int
    dtype: torch.dtype
    device: torch.device
    autocast: dict[str, Any]
    grad: bool
    inference: bool
    versions: tuple[tuple[torch.Tensor, int], ...]
    uses: Uses

    @classmethod
    def of_call(cls, module: nn.Module, hidden: torch.Tensor, out_features: int) -> Projection:
        """Record a call of ``module`` on ``hidden``."""
        kind = hidden.device.type
        enabled = torch.is_autocast_enabled(kind)
        autocast = {
            "device_type": kind,
            "enabled": enabled,
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        versions = tuple((p, p._version) for p in module.parameters() if not p.is_inference())
        return cls(
            module,
            out_features,
            plan_of(module).dtype(module, hidden),
            hidden.device,
            autocast,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            versions,
            Uses(),
        )

    def here(self) -> Projection:
        """The projection for something derived now: without gradients when none are recorded now."""
        return self if not self.grad or torch.is_grad_enabled() else replace(self, grad=False)

    def in_float32(self) -> Projection:
        """The projection outside autocast, for float32 hidden states."""
        return replace(self, autocast={**self.autocast, "enabled": False}, dtype=torch.float32)

    @contextmanager
    def circumstances(self, *, grad: bool | None = None) -> Iterator[None]:
        """Restore autocast, gradient and inference mode as they were at the call, with eager heads."""
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled() != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad if grad is None else grad))
            stack.enter_context(torch.autocast(**self.autocast))
            stack.enter_context(eager_heads())
            yield

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute the logits of ``rows [..., H]`` as the stock head does."""
        return stock_forward(self.module, rows)

    def linear(self) -> tuple[torch.Tensor | Callable[[], torch.Tensor], torch.Tensor | None] | None:
        """Return weight [V, H] (or its maker) and bias when the head is one plain product, else None."""
        return plan_of(self.module).linear(self.module)

    def trained(self) -> list[torch.Tensor]:
        """The head's parameters that get a gradient."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def check_unchanged(self) -> None:
        """Raise when the head was changed since the call, which would give logits that the model never had.

        Raises:
            ConflictError: A parameter of the head was written to.
        """
        if any(parameter._version != version for parameter, version in self.versions):
            raise ConflictError(
                "the logits are read after the output head's weights changed",
                where=type(self.module).__name__,
                why="logits are computed when they are read, and the weights they belong to are gone",
                hint="read outputs.logits before optimizer.step(), or undo the swap with pantheraml's restore(model)",
            )

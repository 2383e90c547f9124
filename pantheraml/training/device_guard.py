"""The guard against steps that are not finite, for devices that are read only when something is logged.

The decision is made on the device: a step that must not happen is computed and its result discarded, so every step runs
the same program. The host learns of it with the next log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import log, xla_runtime
from ..errors import NonFiniteError
from .guards import NonFiniteGuard, innermost


class DeviceGuard(NonFiniteGuard):
    """Keeps weights and optimizer states as they were wherever a loss or a gradient is not finite.

    With ``action="raise"`` every step from the first such one on is left out; ``check`` raises. With ``"skip"`` those
    steps alone are, and everything from the point on where more than ``patience`` come in a row.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting, and stand around the optimizer's step."""
        self._step = xla_runtime.upload(torch.tensor(state.global_step))
        self._stopped, self._bad, self._row, self._tokens = (xla_runtime.upload(torch.tensor(0)) for _ in range(4))
        self._discard: torch.Tensor | None = None
        optimizer = innermost(kwargs["optimizer"])
        if getattr(self, "_watched", None) is not optimizer:
            self._watched = optimizer
            optimizer.register_step_pre_hook(self._keep)
            optimizer.register_step_post_hook(self._restore)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide on the device whether the step that is about to be made counts."""
        watch = self._watch
        loss, gradient = self._find_bad(kwargs["model"])
        bad = loss | gradient
        self._step = self._step + 1
        self._tokens = self._tokens + sum(watch.tokens)
        self._bad = self._bad + bad
        self._row = torch.where(bad, self._row + 1, torch.zeros_like(self._row))
        allowed = self._patience if self._action == "skip" else 0
        stops = (self._stopped == 0) & (self._row > allowed)
        self._stopped = torch.where(stops, self._step, self._stopped)
        self._discard = bad | (self._stopped > 0)
        watch.clear()

    def facts(self) -> list[torch.Tensor]:
        """What ``check`` takes, on the device."""
        return [self._stopped, self._bad, self._tokens]

    def check(self, facts: Sequence[torch.Tensor]) -> None:
        """Look at what happened since training began.

        Args:
            facts: ``facts()``, on the host.

        Raises:
            NonFiniteError: steps were left out, and more than may be.
        """
        stopped, bad, tokens = (int(fact) for fact in facts)
        self._watch.trained_tokens = tokens
        if stopped:
            in_a_row = self._patience + 1 if self._action == "skip" else 1
            raise NonFiniteError(
                f"the loss or the gradient is not finite in step {stopped}",
                where=type(self._trainer).__name__,
                why="the weights are as they were before this step"
                if self._action == "raise"
                else f"{in_a_row} steps in a row were not finite; the weights are as before the first of them",
                hint="lower learning_rate or max_grad_norm, look at the rows of this step, or pass on_nonfinite='skip' "
                "to PantheraMLTrainingArguments",
            )
        if bad > self.skipped:
            log.warning(f"{bad - self.skipped} steps since the last log were not finite and are skipped ({bad} so far)")
            self.skipped = bad

    def _keep(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Copies that are recorded, not made: the compiler chooses between old and new where it computes the new.
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._before = [
            (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)})
            for p in self._parameters
        ]

    @torch.no_grad()
    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        discard = self._discard
        assert discard is not None
        for parameter, (weight, states) in zip(self._parameters, self._before, strict=True):
            parameter.copy_(torch.where(discard, weight, parameter))
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.device == parameter.device:
                    value.copy_(torch.where(discard, states.get(name, torch.zeros_like(value)), value))
        self._before = []

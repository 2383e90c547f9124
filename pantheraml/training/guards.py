"""A loss or a gradient that is not finite never reaches the weights.

The check runs between backward and the optimizer's step, costs one reading from the device a step, and comes out the
same on every rank. See the numerics rules of torchtitan (https://github.com/pytorch/torchtitan) for the idea.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from .. import log
from ..errors import ConfigError, NonFiniteError
from .steps import StepWatch

# Rows of the training set that are compared with an offending batch to name it.
_ROWS_SEARCHED = 50_000
CHOICES = ("raise", "skip")


class NonFiniteGuard(TrainerCallback):
    """Stops before an optimizer step whose loss or gradient is not finite, or skips it.

    With fp16 and a gradient scaler an overflow of the gradient is ordinary: the scaler skips that step and lowers its
    scale. Only a scale that has fallen under 1, or a loss that is not finite, counts then.

    Args:
        trainer: The trainer.
        watch: Its step watch.
        action: ``"raise"`` or ``"skip"``.
        patience: How many steps in a row may be skipped.

    Attributes:
        skipped: Steps skipped so far.
        stop_asked: Set from outside: this rank wants to stop after the coming step.
        stop_agreed: Whether some rank wanted to stop, the same on all of them from the coming step on.
    """

    def __init__(self, trainer: Any, watch: StepWatch, *, action: str = "raise", patience: int = 10) -> None:
        if action not in CHOICES:
            raise ConfigError(
                f"on_nonfinite is {action!r}", where="argument on_nonfinite", hint="use 'raise' or 'skip'"
            )
        self.skipped = 0
        self.stop_asked = self.stop_agreed = False
        self._trainer = trainer
        self._watch = watch
        self._action = action
        self._patience = patience
        self._in_a_row = 0
        self._total_loss = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that is about to be made."""
        watch, model = self._watch, kwargs["model"]
        loss, gradient = self._find_bad(model)
        bad, tokens, ranks = self._agree(loss, gradient, sum(watch.tokens))
        watch.trained_tokens += tokens
        if not bad:
            self._in_a_row = 0
            watch.clear()
            return
        message = self._describe(state.global_step + 1, model, ranks)
        model.zero_grad(set_to_none=True)
        watch.clear()
        self.skipped += 1
        self._in_a_row += 1
        if self._action == "skip" and self._in_a_row <= self._patience:
            log.warning(f"{message}; the step is skipped ({self.skipped} so far)")
            return
        raise NonFiniteError(
            message,
            where=f"rank {args.process_index}",
            why="the weights are as they were before this step"
            if self._action == "raise"
            else f"{self._in_a_row} steps in a row were not finite; the weights are as before the first of them",
            hint="lower learning_rate or max_grad_norm, look at the rows named, or pass on_nonfinite='skip' to "
            "PantheraMLTrainingArguments",
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the NaN of a skipped step, which the log shows, out of the losses of later steps."""
        trainer = self._trainer
        running, total = getattr(trainer, "_tr_loss", None), getattr(trainer, "_total_loss_scalar", None)
        if self._action != "skip" or running is None or total is None:
            return
        running.nan_to_num_(0.0, 0.0, 0.0)
        if not math.isfinite(total):
            trainer._total_loss_scalar = self._total_loss
        self._total_loss = trainer._total_loss_scalar
        if logs is not None and "loss" in logs and self.skipped:
            logs["skipped_steps"] = self.skipped

    def _find_bad(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether this rank's losses, and its gradient, are not finite, as 0-d tensors on the device."""
        watch = self._watch
        loss_is_bad = torch.zeros((), dtype=torch.bool, device=self._trainer.args.device)
        for loss in watch.losses:
            loss_is_bad = loss_is_bad | ~torch.isfinite(loss.to(loss_is_bad.device)).all()
        bad = torch.zeros_like(loss_is_bad)
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1:
            return loss_is_bad, bad
        norm = watch.grad_norm if watch.grad_norm is not None else _gradient_norm(model)
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]
            bad = bad | ~torch.isfinite(norm.to(bad.device))
        return loss_is_bad, bad

    def _agree(
        self, loss: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor | int
    ) -> tuple[bool, int, list[int]]:
        """Whether any rank's step is bad, the tokens of all ranks, and the ranks whose loss is bad. One reading."""
        args = self._trainer.args
        facts = torch.zeros(3 + args.world_size, dtype=torch.int64, device=loss.device)
        facts[0] = loss | gradient
        facts[1] = torch.as_tensor(tokens, device=loss.device)
        if self.stop_asked:
            facts[2] = 1
        facts[3 + args.process_index] = loss
        if args.world_size > 1 and dist.is_available() and dist.is_initialized():
            dist.all_reduce(facts)
        count, total, stops, *losses = facts.tolist()
        self.stop_agreed = stops > 0
        return count > 0, total, [rank for rank, is_bad in enumerate(losses) if is_bad]

    def _describe(self, step: int, model: nn.Module, ranks: list[int]) -> str:
        """Say what is not finite and where, as far as this rank knows; ``ranks`` are those whose loss is not."""
        watch, args = self._watch, self._trainer.args
        if ranks and args.process_index not in ranks:
            # The gradients are averaged: they are bad on every rank, and say nothing about where it began.
            return f"the loss is not finite on rank {', '.join(map(str, ranks))} in step {step}"
        losses = [float(loss) for loss in watch.losses]
        wrong = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong:
            index = wrong[0]
            return f"the loss is {losses[index]} in step {step}, micro-batch {index + 1} of {len(losses)}" + self._rows(
                watch.inputs[index]
            )
        norm = "unknown" if watch.grad_norm is None else float(watch.grad_norm)
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        trained = sum(parameter.grad is not None for parameter in model.parameters())
        # Clipping by a NaN norm spreads it over all gradients: then no parameter can be named.
        named = f", first in {bad[0]}" if bad and len(bad) < trained else ""
        rows = "".join(dict.fromkeys(self._rows(ids) for ids in watch.inputs)) if len(watch.inputs) == 1 else ""
        rows = rows if args.world_size == 1 else ""
        return f"the gradient is not finite (norm {norm}) in step {step}{named}{rows}"

    def _rows(self, ids: torch.Tensor | None) -> str:
        rows = find_rows(self._trainer.train_dataset, ids)
        return f", rows {', '.join(map(str, rows))} of the training set" if rows else ""


def _gradient_norm(model: nn.Module) -> torch.Tensor | None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else None


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def find_rows(dataset: Any, ids: torch.Tensor | None) -> list[int]:
    """Indices of the rows of a tokenised data set that a batch was made of; empty when they cannot be told.

    Args:
        dataset: The training set; only one with an ``input_ids`` column and a length is searched.
        ids: Token ids of the batch, [B, T], rows padded on either side.
    """
    if ids is None or ids.dim() != 2 or "input_ids" not in (getattr(dataset, "column_names", None) or []):
        return []
    if not hasattr(dataset, "__len__") or len(dataset) > _ROWS_SEARCHED:
        return []
    wanted = [row.tolist() for row in ids]
    found = []
    for index, tokens in enumerate(dataset.select_columns(["input_ids"])["input_ids"]):
        if any(row[: len(tokens)] == tokens or row[-len(tokens) :] == tokens for row in wanted):
            found.append(index)
    return found[: len(wanted)]

"""A loss or a gradient that is not finite never reaches the weights.

The check runs between backward and the optimizer's step, costs one reading from the device a step, and comes out the
same on every rank. See the numerics rules of torchtitan (https://github.com/pytorch/torchtitan) for the idea.

An optimizer that takes torch's ``found_inf``, as the fused ones and our 8-bit AdamW do, is told on the device, and read
is only when the step has ended: what the host does in between, a few milliseconds, it does while the backward runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Told:
    """A step whose optimizer has been told on the device.

    Attributes:
        optimizer: The optimizer.
        step: Number of the step, from 1.
        facts: As ``_agree`` makes them, on their way to the host.
        ready: When they have arrived, or None where the host has them.
        gradients: Parameters and their gradients, which the trainer drops before the facts are read.
    """

    optimizer: Any
    step: int
    facts: torch.Tensor
    ready: torch.cuda.Event | None
    gradients: list[tuple[nn.Parameter, torch.Tensor]]


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
        self._told: _Told | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that is about to be made, or tell the optimizer to."""
        model = kwargs["model"]
        loss, gradient = self._find_bad(model)
        facts = self._agree(loss, gradient, sum(self._watch.tokens))
        optimizer = innermost(kwargs.get("optimizer"))
        gradients = self._gradients_of(optimizer)
        if gradients is None:
            self._judge(facts.tolist(), state.global_step + 1, model, None)
            return
        # Exactly 1 stops the update; the two attributes are how torch's GradScaler tells an optimizer.
        optimizer.grad_scale, optimizer.found_inf = None, (facts[0] > 0).float()
        ready = None
        if facts.is_cuda:
            facts, ready = facts.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self._told = _Told(optimizer, state.global_step + 1, facts, ready, gradients)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a step that an error has cut off."""
        self._take_back()
        self._told = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the optimizer was told is of this step alone."""
        self._take_back()

    def _take_back(self) -> None:
        if self._told is not None:
            for name in ("grad_scale", "found_inf"):
                vars(self._told.optimizer).pop(name, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that the optimizer made, or left out."""
        told, self._told = self._told, None
        if told is None:
            return
        if told.ready is not None:
            told.ready.synchronize()
        facts = told.facts.tolist()
        if facts[0] and hasattr(told.optimizer, "uncount"):
            told.optimizer.uncount()
        self._judge(facts, told.step, kwargs["model"], told.gradients)

    def _gradients_of(self, optimizer: Any) -> list[tuple[nn.Parameter, torch.Tensor]] | None:
        """What the optimizer is about to step by, where it can be told on the device whether to; None elsewhere."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if not _takes_found_inf(optimizer) or (scaler is not None and scaler.is_enabled()):
            return None
        gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A sharded parameter's update does not mix with a plain tensor, and one on a CPU would not wait for a GPU's.
        kind = self._trainer.args.device.type
        return None if any(hasattr(p, "full_tensor") or p.device.type != kind for p, _ in gradients) else gradients

    def _judge(
        self,
        facts: list[int],
        step: int,
        model: nn.Module,
        gradients: Sequence[tuple[nn.Parameter, torch.Tensor]] | None,
    ) -> None:
        """Count a step, and stop or skip where its facts are bad.

        Args:
            facts: As ``_agree`` makes them, of all ranks.
            step: Its number, from 1.
            model: The model.
            gradients: Of a step that the optimizer has left out by itself; None before the optimizer's step.
        """
        watch, args = self._watch, self._trainer.args
        bad, tokens, stops, *losses = facts
        self.stop_agreed = stops > 0
        watch.trained_tokens += tokens
        if not bad:
            self._in_a_row = 0
            watch.clear()
            return
        ranks = [rank for rank, is_bad in enumerate(losses) if is_bad]
        message = self._describe(step, model, ranks, gradients)
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

    def _agree(self, loss: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor | int) -> torch.Tensor:
        """Over all ranks: how many steps are bad, the tokens, who wants to stop; for each rank if its loss is bad."""
        args = self._trainer.args
        facts = torch.zeros(3 + args.world_size, dtype=torch.int64, device=loss.device)
        facts[0] = loss | gradient
        # Assigned, a number would be copied to the device, and the host would wait for all that it has still to do.
        facts[1].fill_(tokens)
        if self.stop_asked:
            facts[2].fill_(1)
        facts[3 + args.process_index] = loss
        if args.world_size > 1 and dist.is_available() and dist.is_initialized():
            dist.all_reduce(facts)
        return facts

    def _describe(
        self,
        step: int,
        model: nn.Module,
        ranks: list[int],
        gradients: Sequence[tuple[nn.Parameter, torch.Tensor]] | None,
    ) -> str:
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
        if gradients is None:
            gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        of = {id(parameter): gradient for parameter, gradient in gradients}
        bad = [name for name, p in model.named_parameters() if id(p) in of and not _is_finite(of[id(p)])]
        # Clipping by a NaN norm spreads it over all gradients: then no parameter can be named.
        named = f", first in {bad[0]}" if bad and len(bad) < len(of) else ""
        rows = "".join(dict.fromkeys(self._rows(ids) for ids in watch.inputs)) if len(watch.inputs) == 1 else ""
        rows = rows if args.world_size == 1 else ""
        return f"the gradient is not finite (norm {norm}) in step {step}{named}{rows}"

    def _rows(self, ids: torch.Tensor | None) -> str:
        rows = find_rows(self._trainer.train_dataset, ids)
        return f", rows {', '.join(map(str, rows))} of the training set" if rows else ""


def innermost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _takes_found_inf(optimizer: Any) -> bool:
    """Whether a step of the optimizer can be left out by a tensor on the device."""
    if getattr(optimizer, "takes_found_inf", False):
        return True
    # A checkpoint of an optimizer that was not fused takes that option away again. SGD that leaves its first step out
    # goes on with a momentum that nobody has filled.
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") and not group.get("momentum") for group in optimizer.param_groups
    )


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

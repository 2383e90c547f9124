"""What happens inside one optimizer step, noted without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


class StepWatch:
    """Notes the loss and tokens of every micro-batch and the gradient norm of every step of one trainer.

    Attributes:
        losses: Loss of each micro-batch since the last ``clear()``, 0-d tensors on the device.
        inputs: Token ids of each of them, or None where a batch holds none.
        tokens: Tokens of each of them, 0-d tensors or ints; padding does not count.
        grad_norm: Norm of the gradient before clipping, or None before it was computed.
        trained_tokens: Tokens of all ranks since training began, up to the last finished step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trained_tokens = 0
        self.clear()
        self._watch_batches(trainer)
        self._watch_norm(trainer.accelerator)

    def clear(self) -> None:
        """Forget the micro-batches of the step."""
        self.losses: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor | None] = []
        self.tokens: list[torch.Tensor | int] = []
        self.grad_norm: torch.Tensor | None = None

    def _watch_batches(self, trainer: Any) -> None:
        original = trainer.training_step

        @functools.wraps(original)
        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
            tokens = count_tokens(inputs)
            loss = original(model, inputs, *args, **kwargs)
            self.losses.append(loss.detach())
            self.inputs.append(ids)
            self.tokens.append(tokens)
            return loss

        trainer.training_step = training_step

    def _watch_norm(self, accelerator: Any) -> None:
        original = accelerator.clip_grad_norm_

        @functools.wraps(original)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            norm = original(*args, **kwargs)
            if isinstance(norm, torch.Tensor):
                self.grad_norm = norm.detach()
            return norm

        accelerator.clip_grad_norm_ = clip_grad_norm_


def count_tokens(inputs: Any) -> torch.Tensor | int:
    """Tokens of a batch: what its attention masks let through, else the size of its token ids."""
    if not isinstance(inputs, Mapping):
        return 0
    masks = [value for key, value in inputs.items() if key.endswith("attention_mask") and _is_mask(value)]
    if masks:
        return sum((mask.sum() for mask in masks[1:]), masks[0].sum())
    return sum(value.numel() for key, value in inputs.items() if key.endswith("input_ids") and _is_mask(value))


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2

"""The figures that TRL logs with the loss, read from the device once a log instead of several times a micro-batch.

TRL's ``SFTTrainer`` sums entropy, accuracy and tokens over the ranks and reads each sum at once, so the host waits for
the forward before it launches the backward. Here those reads are put off: TRL's own code computes with figures that
stay on the device, and ``log`` reads all of them in one transfer just before TRL averages them. A number that TRL makes
a tensor of is written on the device, not copied there, for which the host would wait too. The values are the same to
the last bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import xla_runtime

# Micro-batches after which figures are read although nothing is logged, so that they do not pile up.
_MOST_PENDING = 512


class Deferred:
    """A number that is still on the device.

    Knows what TRL does with a sum over ranks: sums, means, quotients of counts, ``item()``, running totals. Anything
    else that needs the number, such as ``float()`` or a comparison, reads it.

    Args:
        tensor: A tensor; 0-d once it is ``item()``.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def sum(self) -> Deferred:
        """Sum over the ranks."""
        return self if self.tensor.dim() == 0 else Deferred(self.tensor.sum())

    def mean(self) -> Deferred:
        """Mean over the ranks."""
        return self if self.tensor.dim() == 0 else Deferred(self.tensor.mean())

    def item(self) -> Deferred:
        """The number, still on the device."""
        return self

    def __truediv__(self, other: Any) -> Deferred:
        divisor = other.tensor if isinstance(other, Deferred) else other
        quotient = self.tensor / divisor
        # What TRL logs for a batch without labels, where it asks whether the count is over zero.
        return Deferred(torch.where(divisor > 0, quotient, 0.0)) if isinstance(other, Deferred) else Deferred(quotient)

    def __floordiv__(self, other: int) -> Deferred:
        return self if other == 1 else Deferred(self.tensor // other)

    def __add__(self, other: Any) -> Deferred:
        return Deferred(self.tensor + (other.tensor if isinstance(other, Deferred) else other))

    __radd__ = __add__

    def __gt__(self, other: Any) -> bool:
        # A count is compared with zero only to divide by it, and the quotient minds that.
        return True if type(other) is int and other == 0 else self.tensor.item() > other

    def __float__(self) -> float:
        return float(self.tensor)

    def __int__(self) -> int:
        return int(self.tensor)

    def __format__(self, spec: str) -> str:
        return format(self.tensor.item(), spec)


def read(figures: Iterable[Any]) -> list[Any]:
    """Replace deferred figures by numbers, in one transfer for each dtype and device; in one for all on XLA."""
    values = list(figures)
    waiting = [index for index, value in enumerate(values) if isinstance(value, Deferred)]
    if waiting and values[waiting[0]].tensor.device.type == "xla":
        for index, tensor in zip(waiting, xla_runtime.read([values[i].tensor for i in waiting]), strict=True):
            values[index] = tensor.item()
        return values
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Deferred):
            groups.setdefault((value.tensor.dtype, value.tensor.device), []).append(index)
    for indices in groups.values():
        for index, number in zip(indices, torch.stack([values[i].tensor for i in indices]).tolist(), strict=True):
            values[index] = number
    return values


class _Written(TorchFunctionMode):
    """Writes a number that becomes a tensor of a GPU there, instead of copying it, for which the host would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and len(args) == 1 and isinstance(args[0], int | float) and kwargs.keys() == {"device"}:
            given = kwargs["device"]
            # On XLA a number that is written is part of the program, and another number another program.
            if given is not None and torch.device(given).type not in ("cpu", "xla"):
                return torch.full((), args[0], device=given)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Put a method on an instance for now."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@dataclass(frozen=True)
class Figures:
    """What a trainer has put off.

    Attributes:
        settle: Reads all figures, and the tensors given to it, whose values it returns as tensors on the host.
    """

    settle: Callable[[list[torch.Tensor]], list[torch.Tensor]]


def sft_trainer(trainer: Any) -> type | None:
    """TRL's ``SFTTrainer`` among the classes of a trainer."""
    name = ("trl.trainer.sft_trainer", "SFTTrainer")
    return next((cls for cls in type(trainer).__mro__ if (cls.__module__, cls.__name__) == name), None)


def defer_figures(trainer: Any) -> Figures | None:
    """Put off the reads of a constructed ``SFTTrainer`` whose loss and log are TRL's own.

    Args:
        trainer: A trainer.

    Returns:
        What was put off; None for other trainers, for a subclass that replaces ``compute_loss`` or ``log``, and with a
        loss function of the user's, whose own reads must give numbers.
    """
    stock: Any = sft_trainer(trainer)
    if stock is None or getattr(trainer, "compute_loss_func", None) is not None:
        return None
    if type(trainer).compute_loss is not stock.compute_loss or type(trainer).log is not stock.log:
        return None
    if not hasattr(trainer, "_metrics") or not hasattr(trainer, "_total_train_tokens"):
        return None
    compute_loss, log = trainer.compute_loss, trainer.log

    def settle(others: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        lists = [values for metrics in trainer._metrics.values() for values in metrics.values()]
        pending = [value for values in lists for value in values]
        total = trainer._total_train_tokens
        if not others and not any(isinstance(value, Deferred) for value in pending):
            return []
        numbers = read([*pending, total, *map(Deferred, others)])
        if not (isinstance(total, Deferred) and total.tensor.device.type == "xla"):
            # There a running total stays on the device: begun again from a number, it would be another program.
            trainer._total_train_tokens = numbers[len(pending)]
        remaining = iter(numbers)
        for values in lists:
            values[:] = [next(remaining) for _ in values]
        return [torch.tensor(number) for number in numbers[len(pending) + 1 :]]

    @functools.wraps(compute_loss)
    def deferring(*args: Any, **kwargs: Any) -> Any:
        accelerator = trainer.accelerator
        gather = accelerator.gather_for_metrics
        # With outputs, which only an evaluation asks for, the model runs once more after the figures.
        alone = not (args[2] if len(args) > 2 else kwargs.get("return_outputs", False))

        def gather_for_metrics(data: Any, *rest: Any, **options: Any) -> Any:
            nonlocal alone
            if alone:
                # The forward is done, and what is left of the method is figures.
                figures.enter_context(_Written())
                alone = False
            gathered = gather(data, *rest, **options)
            return Deferred(gathered) if isinstance(gathered, torch.Tensor) else gathered

        with contextlib.ExitStack() as figures, _replaced(accelerator, "gather_for_metrics", gather_for_metrics):
            result = compute_loss(*args, **kwargs)
        if any(len(values) >= _MOST_PENDING for metrics in trainer._metrics.values() for values in metrics.values()):
            settle()
        return result

    @functools.wraps(log)
    def logging(*args: Any, **kwargs: Any) -> Any:
        settle()
        return log(*args, **kwargs)

    trainer.compute_loss, trainer.log = deferring, logging
    return Figures(settle)

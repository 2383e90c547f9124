"""Trainers, at the path that scripts import them from."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError
from .parallel.xla import MultiTPUConfig
from .training.distributed import PantheraMLDistributedTrainer
from .training.tpu_trainer import PantheraMLTPUTrainer
from .training.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

__all__ = [
    "MultiTPUConfig",
    "PantheraMLTPUTrainer",
    "PatchDPOTrainer",
    "PatchFastRL",
    "PatchKTOTrainer",
    "PantheraMLDistributedTrainer",
    "PantheraMLTrainer",
    "PantheraMLTrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "pantheraml_train",
    "unsloth_train",
]

UnslothTrainer = PantheraMLTrainer
UnslothTrainingArguments = PantheraMLTrainingArguments


def pantheraml_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Train: the same as ``trainer.train(*args, **kwargs)``.

    Scripts call it for the loss over accumulated batches, which ``train()`` itself normalises by tokens.

    Args:
        trainer: Any trainer.
        *args: As for ``train``.
        **kwargs: As for ``train``.

    Returns:
        What ``train`` returns.

    Raises:
        ArgumentError: ``trainer`` is no trainer.
    """
    if not hasattr(trainer, "train"):
        raise ArgumentError(f"{type(trainer).__name__} is no trainer", where="pantheraml_train")
    return trainer.train(*args, **kwargs)


unsloth_train = pantheraml_train


def _patch_trl_trainer() -> None:
    """Do nothing: TRL's trainers take the older keywords already. Kept for scripts that call it."""


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:  # noqa: N802
    """Do nothing: TRL's reinforcement trainers take adapted models as they are. Kept for scripts that call it.

    Args:
        algorithm: Ignored by design; every trainer of TRL is served.
        FastLanguageModel: Ignored by design; nothing is patched.
    """


def PatchDPOTrainer() -> None:  # noqa: N802
    """Do nothing: TRL's ``DPOTrainer`` takes the older keywords already. Kept for scripts that call it."""


def PatchKTOTrainer() -> None:  # noqa: N802
    """Do nothing: TRL's ``KTOTrainer`` takes the older keywords already. Kept for scripts that call it."""

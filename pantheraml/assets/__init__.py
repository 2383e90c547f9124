"""The embedded demo: a tiny language model with its tokenizer, a data set, and the settings of its fine-tune.

``pantheraml/assets/build`` made all of it; ``README.md`` beside this file says how and under which licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, ModelNotFoundError

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The fine-tune of the demo, found by trying; it is the same on every device.

    Attributes:
        r: Rank of the LoRA matrices on all seven projections.
        lora_alpha: LoRA scale numerator.
        learning_rate: Peak learning rate of AdamW.
        lr_scheduler_type: Name of the learning-rate schedule in transformers.
        warmup_steps: Steps of linear warm-up.
        max_steps: Optimizer steps.
        per_device_train_batch_size: Rows in one step.
        max_seq_length: Longest row in tokens; the longest of the data set fits.
        max_new_tokens: Tokens generated for one answer; the longest of the data set fits.
        seed: Seed of the adapter's initial weights and of the order of the rows.
    """

    r: int = 16
    lora_alpha: int = 16
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 10
    max_steps: int = 200
    per_device_train_batch_size: int = 16
    max_seq_length: int = 128
    max_new_tokens: int = 56
    seed: int = 3407


DEMO = DemoSettings()


def _existing(name: str, kind: str) -> Path:
    # The package is installed as plain files (its wheel is not imported from a zip archive), so the resource is a path.
    path = Path(str(files(__name__).joinpath(name)))
    if not path.exists():
        raise ModelNotFoundError(
            f"the demo's {kind} is missing",
            where=str(path),
            why="the package was installed without its data files",
            hint="install PantheraML again, from a wheel or a clone",
        )
    return path


def demo_model_dir() -> Path:
    """Folder of the demo's base model and tokenizer, in the layout of ``transformers``."""
    return _existing("demo/model", "model")


def demo_data(split: Literal["train", "test"]) -> Path:
    """JSON-lines file of the demo's data set.

    Args:
        split: ``"train"`` or ``"test"``; no person or place occurs in both.

    Returns:
        Path of a file whose rows have the strings ``prompt`` and ``completion``.

    Raises:
        ConfigError: There is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", where="argument split", hint=f"use one of {', '.join(SPLITS)}")
    return _existing(f"demo/{split}.jsonl", "data set")

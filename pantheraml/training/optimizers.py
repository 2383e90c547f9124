"""The optimizers of a trainer whose update ``pantheraml.kernels`` has: the same under a class of ours."""

from __future__ import annotations

import functools
import sys
from typing import Any


def install(trainer: Any) -> None:
    """Let this trainer create PantheraML's form of the optimizer that its arguments name, where there is one.

    Args:
        trainer: A constructed trainer. An optimizer or a class that was given to it stays as it is.
    """
    original = trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        chosen, options = original(*args, **kwargs)
        return _ours(chosen, options), options

    trainer.get_optimizer_cls_and_kwargs = choose


def _ours(chosen: Any, options: dict[str, Any]) -> Any:
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None or chosen is not bitsandbytes.optim.AdamW or options.get("optim_bits") != 8:
        return chosen
    from .bitsandbytes_adamw import AdamW

    return AdamW

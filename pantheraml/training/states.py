"""A trainer's model is in training state inside ``train()`` and in inference state before and after."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ..models.activations import mode_of, set_activation_plan
from ..models.inference import for_inference, for_training
from .defaults import set_checkpointing
from .traversal import quick_traversal

_ENABLERS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def install(
    trainer: Any, mode: bool | str | None, *, before: Callable[[], None], after: Callable[[BaseException | None], None]
) -> None:
    """Put state changes around ``train()`` of this trainer.

    Args:
        trainer: A constructed trainer.
        mode: How activations are recomputed, or None to leave it to transformers as the arguments say.
        before: Called when training is asked for, before anything else happens.
        after: Called when training ended, with the exception that ended it or None.
    """
    original = trainer.train

    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        before()
        with _training_state(trainer, mode):
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                after(error)
                raise
            after(None)
            return result

    trainer.train = train
    _enter_inference(trainer)


def _tokenizer(trainer: Any) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def _enter_inference(trainer: Any) -> None:
    """Inference state, but padding as training needs it: the trainer's own batches are made from now on."""
    for_inference(trainer.model)
    if hasattr(_tokenizer(trainer), "padding_side"):
        _tokenizer(trainer).padding_side = "right"


@contextlib.contextmanager
def _training_state(trainer: Any, mode: bool | str | None) -> Iterator[None]:
    model, tokenizer = trainer.model, _tokenizer(trainer)
    side = getattr(tokenizer, "padding_side", None)
    was_training = model.training
    for_training(model, use_gradient_checkpointing=mode is not False)
    if side is not None:
        tokenizer.padding_side = "right"
    with contextlib.ExitStack() as stack:
        stack.enter_context(quick_traversal(model))
        if mode is not None:
            stack.enter_context(_planned(trainer, mode))
        try:
            yield
        finally:
            if not was_training:
                for_inference(model)
            if side is not None:
                tokenizer.padding_side = side


@contextlib.contextmanager
def _planned(trainer: Any, mode: bool | str) -> Iterator[None]:
    """Let the model's activation plan answer when transformers switches checkpointing on."""
    model = trainer.model
    set_activation_plan(model, mode)
    set_checkpointing(trainer.args, mode_of(mode) != "keep")

    def enable(*args: Any, **kwargs: Any) -> None:
        set_activation_plan(model, mode)

    shadowed = {name: vars(model).get(name) for name in _ENABLERS}
    for name in _ENABLERS:
        object.__setattr__(model, name, enable)
    try:
        yield
    finally:
        for name, previous in shadowed.items():
            vars(model).pop(name, None)
            if previous is not None:
                object.__setattr__(model, name, previous)

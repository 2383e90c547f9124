"""Rows of a batch put one after the other instead of padded to one length, where nothing else changes by it.

TRL's own collator does it; here is decided when. TRL also refuses to together with ``max_length``, which it applies to
the data set all the same, so the collator is switched over after the trainer has been constructed.
"""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset

from .. import log
from ..device import get_device
from ..errors import ConflictError, UnsupportedError
from ..models import attention
from ..models.checkpointing import inner_model
from .isolation import check_isolation, is_like_alone, is_measurable

# What the trainer's arguments hold while it is constructed.
_WISH = "_pantheraml_padding_free"
# Attention that computes what documents cost alone. Others isolate them by a mask of all tokens of the batch squared.
_ATTENTION = frozenset({attention.NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4"})
_COLLATORS = "trl.trainer.sft_trainer"


def settle(trainer: Any, arguments: dict[str, Any], explicit: frozenset[str]) -> None:
    """Before the construction: note whether padding is unwanted, and keep TRL from refusing it.

    Args:
        trainer: The instance that is about to be constructed.
        arguments: Its keyword arguments.
        explicit: Names of the options that the user chose.

    Raises:
        ConflictError: ``padding_free=True`` beside a collator of the user's.
    """
    args = arguments["args"]
    if getattr(args, "packing", None) is not False or not hasattr(args, "padding_free"):
        return
    wish = args.padding_free if "padding_free" in explicit else None
    if wish is None and arguments.get("data_collator") is not None:
        return
    if wish and arguments.get("data_collator") is not None:
        raise ConflictError(
            "padding_free=True and data_collator are both given",
            where=type(args).__name__,
            why="the collator decides whether rows are padded",
            hint="leave one of them out",
        )
    vars(trainer)[_WISH] = wish
    args.padding_free = False


def complete(trainer: Any) -> None:
    """After the construction: switch the collator over where that was asked for, or changes nothing but the time.

    Raises:
        UnsupportedError: it was asked for, and cannot be.
    """
    settled = _WISH in vars(trainer)
    wish = vars(trainer).pop(_WISH, False)
    if not settled or wish is False:
        return
    if wish:
        trainer.args.padding_free = True
    obstacle = _obstacle(trainer) or (None if wish else _objection(trainer))
    if obstacle is not None and wish:
        raise UnsupportedError(
            f"rows cannot be joined without padding: {obstacle}",
            where="argument padding_free",
            hint="leave padding_free out",
        )
    if obstacle is not None:
        return
    collator = trainer.data_collator
    collator.padding_free = trainer.padding_free = True
    if wish:
        check_isolation(trainer)
    elif is_measurable(trainer.model) and is_like_alone(trainer):
        log.info("rows of a batch are joined instead of padded (padding_free=False pads them)")
    else:
        if is_measurable(trainer.model):
            log.info("rows of a batch are padded: this model computes joined rows otherwise than each alone")
        collator.padding_free = trainer.padding_free = False


def _obstacle(trainer: Any) -> str | None:
    """Why the rows of this trainer's batches cannot be joined."""
    collator, args = trainer.data_collator, trainer.args
    loaders = trainer.accelerator.dataloader_config
    if type(collator).__module__ != _COLLATORS or getattr(collator, "padding_free", None) is not False:
        return f"{type(collator).__name__} pads them"
    if get_device().type == "xla":
        return "a TPU needs batches of one shape"
    if args.n_gpu > 1:
        return "several GPUs share each batch"
    streams = any(isinstance(part, IterableDataset) for part in (trainer.train_dataset, trainer.eval_dataset))
    if args.world_size > 1 and (loaders.split_batches or loaders.dispatch_batches or streams):
        return "several processes share each batch"
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    if plan is not None and (getattr(plan, "cp_enabled", False) or getattr(plan, "sp_enabled", False)):
        return "several processes share each sequence"
    if trainer.model.config.is_encoder_decoder:
        return "the model has an encoder"
    return None


def _objection(trainer: Any) -> str | None:
    """Why rows are not joined unless the user says so."""
    args, model = trainer.args, inner_model(trainer.model)
    config: Any = model.config
    if max(args.per_device_train_batch_size, args.per_device_eval_batch_size) == 1:
        return "there is nothing to join"
    if trainer.compute_metrics is not None or trainer.preprocess_logits_for_metrics is not None:
        return "metrics are computed of rows"
    if args.neftune_noise_alpha is not None:
        return "the noise of NEFTune depends on the length of the rows"
    if config.get_text_config() is not config:
        return "the model takes more than text"
    if config._attn_implementation not in _ATTENTION:
        return "its attention would take the time of one long row"
    return None

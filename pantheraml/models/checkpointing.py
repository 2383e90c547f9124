"""Switching activation checkpointing on a model, the same way at loading, training and inference."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import log
from .activations import mode_of, set_activation_plan
from .record import record_of

# Marks that the cache was switched off by checkpointing, so that for_inference may switch it on again.
_CACHE_ATTRIBUTE = "_pantheraml_use_cache"


def check_mode(mode: Any) -> bool | str:
    """Return ``use_gradient_checkpointing`` in its normal form.

    Args:
        mode: True, False, ``"unsloth"``, ``"pantheraml"``, ``"auto"`` or ``"offload"``; ``"true"``, ``"false"`` and
            None too.

    Raises:
        ConfigError: an unknown mode.
    """
    mode_of(mode)
    value = mode.lower() if isinstance(mode, str) else False if mode is None else mode
    return value == "true" if value in ("true", "false") else value


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT and DDP wrappers."""
    inner: Any = model.module if type(model).__name__ in ("DistributedDataParallel", "DataParallel") else model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any layer of ``model`` recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def set_checkpointing(model: nn.Module, mode: bool | str) -> None:
    """Switch activation checkpointing on or off, as ``models.activations`` plans it.

    The key-value cache is off while checkpointing is on.

    Args:
        model: A transformers model, or a PEFT or DDP wrapper of one.
        mode: As ``check_mode`` returns it.
    """
    inner: Any = inner_model(model)
    config: Any = getattr(inner, "config", None)
    if mode is False:
        if is_checkpointing(inner):
            set_activation_plan(inner, False)
        if hasattr(inner, _CACHE_ATTRIBUTE):
            config.use_cache = getattr(inner, _CACHE_ATTRIBUTE)
            delattr(inner, _CACHE_ATTRIBUTE)
        return
    if not getattr(inner, "supports_gradient_checkpointing", False):
        log.once(f"{type(inner).__name__} does not support activation checkpointing: all activations are kept")
        return
    set_activation_plan(inner, mode)
    if not hasattr(inner, _CACHE_ATTRIBUTE) and hasattr(config, "use_cache"):
        object.__setattr__(inner, _CACHE_ATTRIBUTE, config.use_cache)
        config.use_cache = False


def cache_setting(model: nn.Module) -> bool | None:
    """The configuration's ``use_cache`` as it is without checkpointing; None for a model that has none."""
    inner: Any = inner_model(model)
    return getattr(inner, _CACHE_ATTRIBUTE, getattr(getattr(inner, "config", None), "use_cache", None))


def configured_mode(model: nn.Module) -> bool | str:
    """The mode the model was loaded or adapted with; True for a model that PantheraML did not load."""
    record = record_of(model)
    return True if record is None else record.gradient_checkpointing

"""Methods that loaded models and tokenizers carry, bound late so that models never import what stands above them."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

from ..device import get_device
from ..parallel.fsdp import whole

# Method name -> "module:function". The function's first parameter is the model.
MODEL_METHODS: dict[str, str] = {
    "for_inference": "pantheraml.models.inference:for_inference",
    "for_training": "pantheraml.models.inference:for_training",
    "save_pretrained_merged": "pantheraml.save:save_pretrained_merged",
    "push_to_hub_merged": "pantheraml.save:push_to_hub_merged",
    "save_pretrained_gguf": "pantheraml.save:save_pretrained_gguf",
    "push_to_hub_gguf": "pantheraml.save:push_to_hub_gguf",
    "save_pretrained_ggml": "pantheraml.save:save_pretrained_ggml",
    "push_to_hub_ggml": "pantheraml.save:push_to_hub_ggml",
    "save_pretrained_torchao": "pantheraml.save:save_pretrained_torchao",
    "save_lora": "pantheraml.save:save_lora",
    "fast_generate": "pantheraml.models.inference:fast_generate",
}

# Methods that write a model.
_WRITERS = ("save_pretrained", "push_to_hub", *(name for name in MODEL_METHODS if name.startswith(("save_", "push_"))))
_WHOLE = "_pantheraml_writes_whole"

XLA_METHODS = {"save_pretrained": "pantheraml.parallel.xla:save_pretrained"}


def resolve(target: str) -> Callable[..., Any]:
    """Return the function that ``"module:function"`` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _late(name: str, target: str) -> Callable[..., Any]:
    @functools.wraps(_late, assigned=())
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return resolve(target)(self, *args, **kwargs)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"See ``{target.replace(':', '.')}``."
    return method


def attach_methods(model: Any) -> None:
    """Give ``model`` the methods of ``MODEL_METHODS``; PEFT wrappers need it again, since they are another object."""
    table = MODEL_METHODS | (XLA_METHODS if get_device().type == "xla" else {})
    for name, target in table.items():
        object.__setattr__(model, name, types.MethodType(_late(name, target), model))


def write_whole(model: Any) -> None:
    """Let the methods that write a model of shards gather it first. Every rank has to call them then."""
    for name in _WRITERS:
        method = getattr(model, name, None)
        if method is not None and not hasattr(method, _WHOLE):
            object.__setattr__(model, name, _gathering(model, name, method))


def _gathering(model: Any, name: str, method: Any) -> Any:
    @functools.wraps(method)
    def write(*args: Any, **kwargs: Any) -> Any:
        adapters = hasattr(model, "peft_config") and name in ("save_pretrained", "save_lora")
        with whole(model, trained_only=adapters) as here:
            return method(*args, **kwargs) if here else None

    setattr(write, _WHOLE, True)
    return write

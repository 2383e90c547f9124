"""PEFT's LoRA on parameters that bitsandbytes keeps in 4 bits: read through a parametrisation, they are none to PEFT.

It finds those by full names alone, nests its wrappers in another order than for plain parameters, so that the adapter
fits no 16-bit base, does not find them again for a second adapter, and reads each whole to learn its shape. Its forward
takes the bytes for a parameter that may be trained and leaves its update on them, and its merge goes into what the
parameter dequantises to, which is lost at once.

Goes when PEFT's ``LoraModel`` and ``ParamWrapper`` can do all of that; those of 0.21 cannot.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import cached, type_before_parametrizations

from ..errors import UnsupportedError

_LISTS = "parametrizations"


@contextlib.contextmanager
def shown(model: nn.Module) -> Iterator[None]:
    """Inside, parameters in 4 bits look like plain ones of their shape, dtype and device, which take no memory."""
    hidden = []
    for module in model.modules():
        lists: Any = module._modules.get(_LISTS)
        if lists is None or not all(hasattr(entry[0], "quant_state") for entry in lists.values()):
            continue
        hidden.append((module, type(module), lists, module._parameters))
        looks = {name: _look(entry[0].quant_state, entry.original.device) for name, entry in lists.items()}
        del module._modules[_LISTS]
        module._parameters = {**looks, **module._parameters}
        module.__class__ = type_before_parametrizations(module)
    try:
        yield
    finally:
        for module, kind, lists, parameters in hidden:
            module.__class__, module._parameters = kind, parameters
            module._modules[_LISTS] = lists


def _look(state: Any, device: torch.device) -> nn.Parameter:
    # Whoever computes with it all the same is to see it.
    nothing = torch.full((1,), torch.nan, dtype=state.dtype, device=device)
    return nn.Parameter(nothing.expand(state.shape), requires_grad=False)


def prepare(model: Any) -> None:
    """Let a PEFT model run adapters over its parameters in 4 bits, put on more of them, and merge none."""
    tuner = model.base_model
    if not any(_LISTS in module._modules for module in model.modules()):
        return
    for method in (_inject_parameters, merge_adapter, _unload_and_optionally_merge):
        if hasattr(tuner, method.__name__):
            tuner.__dict__[method.__name__] = types.MethodType(method, tuner)
    _prepare_wrappers(tuner)


def _inject_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
    with shown(self):
        names = type(self)._inject_parameters(self, *args, **kwargs)
    _prepare_wrappers(self)
    return names


def _prepare_wrappers(model: nn.Module) -> None:
    """Let each LoRA wrapper of a parameter in 4 bits run over it, and refuse to merge into it."""
    from peft.tuners.lora.layer import ParamWrapper  # PEFT is loaded where there is an adapter

    for module in model.modules():
        if not isinstance(module, ParamWrapper):
            continue
        lists: Any = module.get_base_layer()._modules.get(_LISTS, ())
        if module.parameter_name in lists and hasattr(lists[module.parameter_name][0], "quant_state"):
            for name, method in (("get_param", _get_param), ("_activate_lora", _activate_lora), ("merge", _merge)):
                module.__dict__[name] = types.MethodType(method, module)


def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
    """Merge, unless that would stop halfway."""
    _refuse_merge(self)
    type(self).merge_adapter(self, *args, **kwargs)


def _unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    if merge:
        _refuse_merge(self)
    return type(self)._unload_and_optionally_merge(self, merge, *args, **kwargs)


def _refuse_merge(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if getattr(vars(module).get("merge"), "__func__", None) is _merge:
            raise UnsupportedError(
                "LoRA on experts that are held in 4 bits cannot be merged into them",
                where=path,
                why="the merged weights would have to be rounded to 4 bits again, in place",
                hint="save_pretrained_merged writes the merged model, in 16 bit",
            )


class _Added(nn.Module):
    """A parameter with an update on it."""

    def __init__(self, update: torch.Tensor) -> None:
        super().__init__()
        self.update = update

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter + self.update


def _get_param(self: Any) -> nn.Parameter:
    """For shape, dtype and device."""
    module = self.get_base_layer()
    if self.parameter_name in module._parameters:  # while it is shown
        return module._parameters[self.parameter_name]
    entry = module.parametrizations[self.parameter_name]
    return _look(entry[0].quant_state, entry.original.device)


@contextlib.contextmanager
def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
    """Inside, reading the parameter gives it with the adapters' updates."""
    updates = [self.get_delta_weight(name) for name in active_adapters if name in self.lora_A]
    if not updates:
        yield
        return
    module, name = self.get_base_layer(), self.parameter_name
    first, *more = updates
    entry = module.parametrizations[name]
    entry.append(_Added(sum(more, first)))
    try:
        with cached():
            yield
    finally:
        del entry[-1]


def _merge(self: Any, *_: Any, **__: Any) -> None:
    _refuse_merge(self)

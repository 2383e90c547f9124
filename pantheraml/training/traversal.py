"""What a trainer asks its model at every step, answered by a quick walk over the modules.

transformers calls ``train()`` before every micro-batch, counts the parameters after it, and lists them for every
clipping and every ``zero_grad()``. torch's own methods visit a model of a thousand modules through generators and
recursive calls, several milliseconds each time. The methods that are put on the instance here do the same in one loop.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_PLAIN = nn.Module
_COUNTS = "_pantheraml_counts"


def set_mode(model: nn.Module, mode: bool = True) -> nn.Module:
    """Do what ``nn.Module.train`` does: set every module's mode, through its own ``train`` where it has one.

    Args:
        model: The root; its own ``train`` is not asked for.
        mode: True for training, False for evaluation.

    Returns:
        The model.

    Raises:
        ValueError: ``mode`` is no bool.
    """
    if not isinstance(mode, bool):
        raise ValueError("training mode is expected to be boolean")
    model.training = mode
    plain: dict[type, bool] = {}
    pending = list(model._modules.values())
    for module in pending:
        if module is None:
            continue
        cls = type(module)
        if cls not in plain:
            plain[cls] = cls.train is _PLAIN.train and cls.__setattr__ is _PLAIN.__setattr__
        state = module.__dict__
        if not plain[cls] or "train" in state:
            module.train(mode)
            continue
        state["training"] = mode
        if children := state["_modules"]:
            # Grows while it is walked.
            pending.extend(children.values())
    return model


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """List what ``model.parameters()`` yields, in its order: each once, as the modules come."""
    # torch compares modules and parameters by identity too: neither class has an equality of its own.
    found: dict[nn.Parameter, None] = {}
    seen: set[nn.Module] = set()
    plain: set[type] = set()
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is None or module in seen:
            continue
        if type(module) not in plain:
            if type(module).named_modules is not _PLAIN.named_modules:
                # A module that decides by itself which modules it shows.
                return list(_PLAIN.parameters(model))
            plain.add(type(module))
        seen.add(module)
        state = module.__dict__
        if members := state["_parameters"]:
            for parameter in members.values():
                if parameter is not None:
                    found[parameter] = None
        if children := state["_modules"]:
            pending.extend(reversed(children.values()))
    return list(found)


def _parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    return iter(parameters_of(self)) if recurse else _PLAIN.parameters(self, recurse=False)


def _num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    counts, key = vars(self)[_COUNTS], (only_trainable, exclude_embeddings)
    if key not in counts:
        method = getattr(type(self), "num_parameters", None)
        # PEFT's wrapper has no such method: it asks the model inside.
        count = type(self).__getattr__(self, "num_parameters") if method is None else types.MethodType(method, self)
        counts[key] = count(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
    return counts[key]


def _is_plain(model: nn.Module, *names: str) -> bool:
    """Whether the methods are torch's own, and nothing was put on the instance."""
    return all(getattr(type(model), name) is getattr(_PLAIN, name) and name not in vars(model) for name in names)


def _roots(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what is right below modules whose class has its own ``train``, such as transformers' models."""
    pending = [(model, True)]
    while pending:
        module, is_root = pending.pop()
        plain = _is_plain(module, "train")
        if plain and is_root and module._modules:
            yield module
        pending += [(child, not plain) for child in module._modules.values() if child is not None]


@contextlib.contextmanager
def quick_traversal(model: nn.Module) -> Iterator[None]:
    """Give a model instance quick ``train``, ``parameters`` and ``num_parameters`` while it is trained.

    ``train`` and ``parameters`` see every change of the modules; a class that has its own keeps it, and what is below
    such a class gets the quick one. The number of
    parameters, which transformers multiplies with the tokens of every batch for its estimate of the work, is counted
    once.

    Args:
        model: The model that the trainer holds, a PEFT wrapper or a transformers model.
    """
    methods: list[tuple[nn.Module, str, Any]] = [(module, "train", set_mode) for module in _roots(model)]
    if _is_plain(model, "parameters", "named_parameters", "named_modules"):
        methods.append((model, "parameters", _parameters))
    if hasattr(model, "num_parameters") and "num_parameters" not in vars(model):
        methods.append((model, "num_parameters", _num_parameters))
    # Bound methods, so that a deep copy of the model gets its own.
    installed: list[tuple[nn.Module, str, Any]] = [
        (m, name, types.MethodType(function, m)) for m, name, function in methods
    ]
    installed.append((model, _COUNTS, {}))
    for module, name, value in installed:
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for module, name, value in installed:
            if vars(module).get(name) is value:
                object.__delattr__(module, name)

"""PEFT asks a model whether it recomputes activations by a name that transformers has retired, and every rank warns.

Goes when PEFT's ``PeftModel`` asks for ``is_activation_checkpointing``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

OLD, NEW = "is_gradient_checkpointing", "is_activation_checkpointing"


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """Inside, the model answers to the old name as to the new one; its class is left alone."""
    cls = type(model)
    if not hasattr(cls, NEW):  # older than the new name
        yield
        return
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, OLD: getattr(cls, NEW)})
    try:
        yield
    finally:
        model.__class__ = cls

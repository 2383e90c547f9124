"""Data: sources, formats, mixtures and conversations; knows no model class. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mixture import mix as mix

__all__ = ["mix"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .mixture import mix

    return mix

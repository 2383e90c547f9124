"""Rank-aware messages. Choices made for the user are told once, on the main rank, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any

from . import env

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_told: set[str] = set()


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever ``sys.stderr`` is at the time, so that redirection and test capture work."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr


def get_logger() -> logging.Logger:
    """Return the package's logger, with a plain handler on standard error unless the application set one."""
    logger = logging.getLogger("pantheraml")
    if not logger.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("PantheraML: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(_LEVELS.get(env.log_level(), logging.INFO))
        logger.propagate = False
    return logger


def info(message: str) -> None:
    """Tell something on the main rank."""
    if env.rank() == 0:
        get_logger().info(message)


def warning(message: str) -> None:
    """Warn on the main rank."""
    if env.rank() == 0:
        get_logger().warning(message)


def once(message: str, *, key: str | None = None, warn: bool = False) -> None:
    """Tell something once in the life of the process; ``key`` identifies it when the wording varies."""
    if (key or message) not in _told:
        _told.add(key or message)
        (warning if warn else info)(message)

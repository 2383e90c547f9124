"""A metrics logger that fails (no network, no login, a bug) does not end the training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .. import log

_EVENT = "on_"
_INTEGRATIONS = "transformers.integrations"


class _Tolerated:
    """Lets an error of a logger pass with one warning. Whatever a third-party service raises belongs here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failed = False

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self.failed:
            log.warning(f"{self.name} failed and is off from now on; training goes on ({type(error).__name__})")
        self.failed = True
        return True


def isolate_loggers(trainer: Any) -> None:
    """Wrap the events of the logging integrations of this trainer; the user's own callbacks are left as they are."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith(_INTEGRATIONS):
            tolerated = _Tolerated(type(callback).__name__)
            for name in dir(callback):
                if name.startswith(_EVENT):
                    setattr(callback, name, _guarded(getattr(callback, name), tolerated))


def _guarded(event: Callable[..., Any], tolerated: _Tolerated) -> Callable[..., Any]:
    @functools.wraps(event)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if tolerated.failed:
            return None
        with tolerated:
            return event(*args, **kwargs)

    return guarded

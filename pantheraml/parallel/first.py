"""The main process prepares first, and no wait for it ends with the collectives' timeout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from accelerate import PartialState

from .process_group import main_process_first, meet
from .ranks import get_world_size, is_grouped

_SHADOWED = ("main_process_first", "local_main_process_first")


@contextlib.contextmanager
def patient(*, ordered: bool) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Let work inside take as long as it takes, Accelerate's own "main process first" included.

    Accelerate's waits inside a barrier, which ends with the group's timeout: tokenising that takes longer than that
    would end the launch. Inside this block its process state waits at the ranks' store instead. No class is changed.

    Args:
        ordered: Whether the main process has to be first, because it leaves results in a cache on disk; otherwise all
            work at once.

    Yields:
        What makes the context in which the main process is first.
    """
    if not is_grouped() or get_world_size() == 1:
        yield contextlib.nullcontext
        return
    turn: Callable[[], AbstractContextManager[None]] = main_process_first if ordered else contextlib.nullcontext
    # All instances share this dict as their attributes.
    state: dict[str, Any] = PartialState._shared_state
    state["main_process_first"] = turn
    state["local_main_process_first"] = contextlib.nullcontext
    try:
        yield turn
    finally:
        for name in _SHADOWED:
            state.pop(name, None)
    meet()

"""SIGTERM to any rank: all of them finish the same step, write one checkpoint and end.

Schedulers announce with SIGTERM that they take a machine away. The ranks tell one another with the figures that they
exchange before every optimizer step anyway, so that nothing is sent for it and none is a step ahead.

torchrun sends the same signal to the other ranks when one has failed. They wait for it inside a collective then, where
no Python handler runs; a thread hears of the signal and ends the process at once. Other launchers may leave them
waiting: so the thread asks now and then too.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

from transformers import TrainerCallback

from .. import log
from ..parallel.process_group import some_rank_failed
from .guards import NonFiniteGuard

# What a shell reports of a process that SIGTERM ended.
EXIT_CODE = 128 + signal.SIGTERM
FAILED = 1
# How long after the signal a failure of another rank is looked for; torchrun kills after 30 s.
_GRACE_S = 25.0
_INTERVAL_S = 0.2
# How often it is looked for without a signal.
_LOOK_S = 5.0


class Preemption(TrainerCallback):
    """Turns SIGTERM into a checkpoint and the end of training.

    Args:
        guard: What exchanges figures between the ranks at every step.

    Attributes:
        stopped: The step after which training stopped for a signal, or None.
    """

    def __init__(self, guard: NonFiniteGuard) -> None:
        self.stopped: int | None = None
        self._guard = guard
        self._before: Any = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._descriptor = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen, where that is possible: signals reach the main thread only."""
        self.stopped = None
        self._guard.stop_asked = self._guard.stop_agreed = False
        if threading.current_thread() is threading.main_thread() and self._ends is None:
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._descriptor = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._ends[0],), daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, on every rank after the same step."""
        if self._guard.stop_agreed:
            self.stopped = state.global_step
            control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._ends is not None:
            signal.set_wakeup_fd(self._descriptor)
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
            ends, self._ends = self._ends, None
            # Ends the thread's reading.
            ends[1].close()

    def end(self, args: Any) -> None:
        """End the process as the signal would have, now that the checkpoint is written; void without a signal.

        Raises:
            SystemExit: training stopped for a signal.
        """
        if self.stopped is None:
            if self._guard.stop_asked:
                log.warning("SIGTERM came after the last step: training is over, and the script goes on while it may")
            return
        log.info(
            f"stopped by SIGTERM after step {self.stopped}; {args.output_dir}/checkpoint-{self.stopped} goes on with "
            "train(resume_from_checkpoint=True)"
        )
        raise SystemExit(EXIT_CODE)

    def _note(self, *_: Any) -> None:
        self._guard.stop_asked = True

    def _watch(self, end: socket.socket) -> None:
        """In a thread: end the process when another rank has failed, at once if it is signalled."""
        with end:
            end.settimeout(_LOOK_S)
            while numbers := self._heard(end):
                deadline = time.monotonic() + _GRACE_S
                while signal.SIGTERM in numbers and self._ends is not None and time.monotonic() < deadline:
                    if some_rank_failed():
                        os._exit(EXIT_CODE)
                    time.sleep(_INTERVAL_S)

    def _heard(self, end: socket.socket) -> bytes:
        """The numbers of signals, or nothing when this shall end."""
        failed_since: float | None = None
        while True:
            try:
                return end.recv(64)
            except TimeoutError:
                if self._ends is None or not some_rank_failed():
                    failed_since = None
                    continue
            now = time.monotonic()
            failed_since = failed_since or now
            if now - failed_since >= _GRACE_S:
                # What waits for it raises at best when the collectives' time is over.
                log.get_logger().error("another rank has failed, and this one, which waits for it, ends too")
                os._exit(FAILED)

"""Where errors become a message and an exit code."""

from __future__ import annotations

import sys
from types import TracebackType

from .. import env
from ..errors import PantheraMLError
from .output import printable

EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "unexpected error"),
    (2, "usage, configuration, or something that this machine or release cannot do"),
    (3, "data that cannot be read, or holds nothing to train on"),
    (4, "out of memory"),
    (5, "a checkpoint or export could not be written, read or verified"),
    (6, "a loss or gradient is not finite"),
    (7, "the ranks could not reach each other in time"),
    (8, "a process of a launch failed"),
    (130, "interrupted from the keyboard"),
    (143, "ended by SIGTERM, after a checkpoint"),
)
_INTERRUPTED = 130
_OUT_OF_MEMORY = 4
_MEMORY_HINT = (
    "  next:  use --load_in_4bit, a smaller --per_device_train_batch_size with more --gradient_accumulation_steps,\n"
    "         or a smaller --max_seq_length"
)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _tell(text: str) -> None:
    if env.world_size() > 1:
        text = f"[rank {env.rank()}] {text}"
    sys.stderr.write(printable(text).rstrip() + "\n")
    sys.stderr.flush()


class Boundary:
    """Context manager that lets no exception out: it tells the user and sets ``exit_code``.

    Args:
        debug: Let the interpreter's traceback be shown besides the message.
    """

    def __init__(self, *, debug: bool = False) -> None:
        self.debug = debug
        self.exit_code = 1

    def __enter__(self) -> Boundary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            return True
        if isinstance(error, SystemExit):
            self.exit_code = error.code if isinstance(error.code, int) else 2 if error.code else 0
            return True
        if isinstance(error, GeneratorExit):
            return False
        if self.debug:
            sys.excepthook(type(error), error, traceback)
        self.exit_code = self._report(error)
        return True

    def _report(self, error: BaseException) -> int:
        if isinstance(error, KeyboardInterrupt):
            _tell("interrupted")
            return _INTERRUPTED
        if isinstance(error, PantheraMLError):
            _tell(f"error: {error}")
            return error.exit_code
        if _is_out_of_memory(error):
            _tell(f"error: out of memory\n  why:   {_first_line(error)}\n{_MEMORY_HINT}")
            return _OUT_OF_MEMORY
        if isinstance(error, BrokenPipeError):
            # The reader of our output left (`pantheraml doctor | head`); the interpreter would complain while flushing.
            sys.stdout = None  # type: ignore[assignment]
            return 1
        _tell(f"error: unexpected {type(error).__name__}: {_first_line(error)}")
        if not self.debug:
            _tell("  next:  --debug shows the traceback")
        return 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"

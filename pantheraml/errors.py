"""Every error that PantheraML raises on purpose.

Each error says what happened, where, why, and what to do next, and also derives from the built-in exception that a
caller would naturally catch. ``exit_code`` is what the command line returns for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PantheraMLError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence saying what cannot be done.
        where: The file, line, argument or module concerned.
        why: The cause, as far as it is known.
        hint: The next step for the user.
    """

    exit_code: int = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.why:
            parts.append(f"  why:   {self.why}")
        if self.hint:
            parts.append(f"  next:  {self.hint}")
        return "\n".join(parts)


class ConfigError(PantheraMLError, ValueError):
    """An option has a value that cannot be used."""

    exit_code = 2


class ArgumentError(PantheraMLError, TypeError):
    """An argument is unknown or has the wrong type."""

    exit_code = 2


class ConflictError(PantheraMLError, RuntimeError):
    """Two options contradict each other."""

    exit_code = 2


class MissingDependencyError(PantheraMLError, ImportError):
    """An optional package is needed and not installed."""

    exit_code = 2


class UnsupportedError(PantheraMLError, NotImplementedError):
    """Something that cannot be done on this device, with this model or in this release."""

    exit_code = 2


class ModelNotFoundError(PantheraMLError, FileNotFoundError):
    """A model, adapter or tokenizer could not be found."""

    exit_code = 2


class UnknownArchitectureError(PantheraMLError, ValueError):
    """The installed transformers does not know the model's architecture."""

    exit_code = 2


class DataError(PantheraMLError, ValueError):
    """A data set cannot be read or holds nothing to train on."""

    exit_code = 3


class DeviceMemoryError(PantheraMLError, MemoryError):
    """A device ran out of memory."""

    exit_code = 4


class CheckpointError(PantheraMLError, RuntimeError):
    """A checkpoint or an export could not be written, read or verified."""

    exit_code = 5


class NonFiniteError(PantheraMLError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 6


class CommunicationError(PantheraMLError, TimeoutError):
    """Ranks could not reach each other in time."""

    exit_code = 7


class RankError(PantheraMLError, RuntimeError):
    """A process of a launch failed."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_arguments(names: Iterable[str], known: Iterable[str], *, where: str) -> ArgumentError:
    """Build the error for keyword arguments that ``where`` does not take, naming the nearest known one of each."""
    known = sorted(known)
    described = []
    for name in sorted(names):
        close = nearest(name, known)
        described.append(f"{name!r}" + (f" (did you mean {close!r}?)" if close else ""))
    return ArgumentError(
        f"unknown argument {', '.join(described)}",
        where=where,
        hint=f"the arguments are: {', '.join(known)}",
    )

"""The only reader of ``os.environ`` in the package. PantheraML sets no variable, and takes back those of ``as_it_was``.

| variable | default | effect |
|---|---|---|
| ``PANTHERAML_DEVICE``, ``PANTHERAML_DEVICE_TYPE`` | detected | ``cuda``, ``hip``, ``xpu``, ``xla``, ``mps``, ``cpu`` |
| ``PANTHERAML_TRL_SHIM`` | ``1`` | ``0`` leaves TRL's constructors untouched |
| ``PANTHERAML_LOG`` | ``info`` | ``debug``, ``info``, ``warning``, ``error`` |
| ``PANTHERAML_KERNELS`` | ``auto`` | ``reference`` forces the eager ops, ``triton`` refuses to run without Triton |

Set by launchers and read here: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``SLURM_PROCID``, ``SLURM_LOCALID``,
``SLURM_NTASKS``, ``TORCHELASTIC_RESTART_COUNT``, ``PJRT_DEVICE``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def text(name: str) -> str | None:
    """Return the variable's value with surrounding space removed, or None when unset or empty."""
    value = os.environ.get(name, "").strip()
    return value or None


def integer(name: str) -> int | None:
    """Return the variable as an int, or None when unset or not a number."""
    value = text(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _first_integer(*names: str, default: int) -> int:
    for name in names:
        value = integer(name)
        if value is not None:
            return value
    return default


def rank() -> int:
    """Global rank given by the launcher, 0 without one."""
    return _first_integer("RANK", "SLURM_PROCID", default=0) if world_size() > 1 else 0


def local_rank() -> int:
    """Rank on this host given by the launcher, 0 without one."""
    return _first_integer("LOCAL_RANK", "SLURM_LOCALID", default=0) if world_size() > 1 else 0


def world_size() -> int:
    """Number of ranks given by the launcher, 1 without one.

    SLURM variables count only under ``srun`` (which sets ``SLURM_STEP_ID``): a batch script itself is one process.
    """
    if text("SLURM_STEP_ID") is not None:
        return _first_integer("WORLD_SIZE", "SLURM_NTASKS", default=1)
    return _first_integer("WORLD_SIZE", default=1)


def restarts() -> int:
    """How often torchrun has started the ranks of this launch again after a failure."""
    return _first_integer("TORCHELASTIC_RESTART_COUNT", default=0)


def device() -> str | None:
    """The device the user asks for, lower case, or None."""
    value = text("PANTHERAML_DEVICE") or text("PANTHERAML_DEVICE_TYPE")
    return value.lower() if value else None


def pjrt_device() -> str | None:
    """The PJRT device the user asks for, which makes torch_xla the backend when it is installed."""
    return text("PJRT_DEVICE")


def trl_shim() -> bool:
    """Whether TRL's constructors accept the keywords of older TRL versions."""
    return text("PANTHERAML_TRL_SHIM") != "0"


def kernels() -> str:
    """``auto``, ``reference`` or ``triton``."""
    return (text("PANTHERAML_KERNELS") or "auto").lower()


def log_level() -> str:
    """Log level name, lower case."""
    return (text("PANTHERAML_LOG") or "info").lower()


def path() -> str:
    """The search path for executables."""
    return os.environ.get("PATH", "")


@contextlib.contextmanager
def as_it_was(*names: str) -> Iterator[None]:
    """Undo at the end what a library writes into variables inside, so that nothing later is told by them."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

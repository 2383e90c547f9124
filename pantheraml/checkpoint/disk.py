"""Free space: asked for before writing, and named when it runs out while writing."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def parse_size(size: int | str, *, where: str = "argument max_shard_size") -> int:
    """Return a size in bytes.

    Args:
        size: Bytes as an int, or text such as ``"5GB"`` (powers of 1000) or ``"5GiB"`` (powers of 1024).
        where: What to name in the error.

    Raises:
        ConfigError: the text is no size, or the size is not positive.
    """
    value = 0
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", size.strip().upper())
        if match and match.group(2) in _UNITS:
            value = int(float(match.group(1)) * _UNITS[match.group(2)])
    elif not isinstance(size, bool):
        value = int(size)
    if value <= 0:
        raise ConfigError(f"{size!r} is no size in bytes", where=where, hint="use for example '5GB', '500MB' or 10**9")
    return value


def human(size: int) -> str:
    """Return ``size`` bytes as text, with the exact count when it is small."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the file system that holds ``path`` or will hold it."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed: int, *, what: str) -> None:
    """Refuse to begin when ``needed`` bytes do not fit.

    Raises:
        CheckpointError: with the needed and the free bytes.
    """
    free = free_bytes(path)
    if free < needed:
        raise CheckpointError(
            f"not enough disk space to write {what}",
            where=str(path),
            why=f"{human(needed)} ({needed} bytes) are needed and {human(free)} ({free} bytes) are free",
            hint="free some space or write to another disk; nothing was written",
        )


@contextlib.contextmanager
def disk_errors(path: Path, needed: int, *, what: str) -> Iterator[None]:
    """Turn a full disk or a missing permission inside the block into a ``CheckpointError`` that gives the figures."""
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            free = free_bytes(path)
            raise CheckpointError(
                f"the disk became full while writing {what}",
                where=str(path),
                why=f"{human(needed)} ({needed} bytes) are needed and {human(free)} ({free} bytes) are free now",
                hint="free some space or write to another disk; what was half written has been removed",
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise CheckpointError(f"cannot write {what}", where=str(path), why=str(error)) from error
        raise

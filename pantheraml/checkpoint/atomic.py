"""Directories that appear whole or not at all.

Everything is written to a hidden sibling ``.tmp-<name>-<host>-<pid>-<random>``, flushed to the disk, and renamed. A
process that is killed leaves at most such a sibling; the next write of the same name on the same host removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError

_LONGEST_STEM = 96  # bytes of the final name kept in a temporary one; file systems allow 255 in all


def _stem(name: str) -> str:
    """The part of a temporary name that tells which directory it belongs to; long names are cut and told by a hash."""
    raw = name.encode()
    if len(raw) <= _LONGEST_STEM:
        return name
    return raw[: _LONGEST_STEM - 9].decode(errors="ignore") + f"-{zlib.crc32(raw):08x}"


def _host() -> str:
    """Hash of the host name: a pid means something only on its own host, and folders may be shared by hosts."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f".{kind}-{_stem(final.name)}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _leftovers(final: Path, kind: str) -> list[Path]:
    """Siblings of this kind that processes of this host, dead by now, left behind."""
    pattern = re.compile(rf"\.{kind}-{re.escape(_stem(final.name))}-{_host()}-(\d+)-[0-9a-f]{{8}}")
    found = []
    for entry in final.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match.group(1))):
            found.append(entry)
    return found


def clean_leftovers(final: Path) -> list[Path]:
    """Remove what dead runs left beside ``final``, and put back a directory whose replacement died half way.

    Args:
        final: The directory whose temporaries are meant. Those of running processes and of other hosts stay.

    Returns:
        The paths removed.
    """
    if not final.parent.is_dir():
        return []
    previous = _leftovers(final, "old")
    if previous and not final.exists():
        # The run died between moving the old directory away and moving the new one in.
        newest = max(previous, key=lambda path: path.stat().st_mtime)
        os.rename(newest, final)
        previous.remove(newest)
    removed = [*_leftovers(final, "tmp"), *previous]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk (a no-op where directories cannot be opened)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.is_symlink():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))


def _link(source: str, target: str) -> None:
    """Hard link, or copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _carry_over(old: Path, new: Path, keep: Callable[[str], bool]) -> None:
    """Give ``new`` the entries of ``old`` that it does not have and that ``keep`` accepts."""
    for entry in old.iterdir():
        target = new / entry.name
        if os.path.lexists(target) or not keep(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(target))


def _check_target(final: Path, overwrite: bool) -> None:
    if final.is_dir():
        here = Path.cwd()
        if final == here or final in here.parents:
            raise CheckpointError(
                "refusing to replace the working directory or a folder above it",
                where=str(final),
                hint="give the name of a new folder",
            )
        if not overwrite:
            raise CheckpointError(
                "the folder exists already", where=str(final), hint="choose another name, or allow overwriting"
            )
    elif final.exists():
        raise CheckpointError("a file is in the way of the folder to write", where=str(final))


@contextlib.contextmanager
def atomic_directory(
    final: str | os.PathLike[str], *, overwrite: bool = True, keep: Callable[[str], bool] | None = None
) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``final`` when the block succeeds.

    On success every file and the directory are flushed to the disk and the directory is renamed into place. An existing
    ``final`` is moved aside first and removed only after the new one is there. On any exception, ``KeyboardInterrupt``
    included, the temporary is removed and an existing ``final`` stays as it was. A symbolic link is followed: what it
    points to is replaced, the link stays.

    Args:
        final: The directory to make. Missing parents are made.
        overwrite: Whether an existing directory may be replaced.
        keep: Of an existing directory, the top-level entries (told by name) that the new one takes over unless the
            block wrote its own; None takes over nothing.

    Yields:
        The temporary directory, in the same parent, with the permissions that the umask gives.

    Raises:
        CheckpointError: the target cannot be made, exists while ``overwrite`` is False, is a file, or is the working
            directory.
    """
    target = Path(os.path.realpath(final))
    _check_target(target, overwrite)
    temporary = _sibling(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError("cannot make the folder", where=str(target), why=str(error)) from error
    try:
        yield temporary
        _fsync_tree(temporary)
        if target.is_dir() and keep is not None:
            _carry_over(target, temporary, keep)
            fsync_directory(temporary)
        _swap_in(temporary, target, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap_in(temporary: Path, final: Path, overwrite: bool) -> None:
    _check_target(final, overwrite)
    previous: Path | None = None
    try:
        if final.exists():
            previous = _sibling(final, "old")
            os.rename(final, previous)
        os.rename(temporary, final)
    except BaseException as error:
        if previous is not None and previous.exists() and not final.exists():
            os.rename(previous, final)
        if isinstance(error, OSError):
            raise CheckpointError("cannot move the folder into place", where=str(final), why=str(error)) from error
        raise
    try:
        fsync_directory(final.parent)
    finally:
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)

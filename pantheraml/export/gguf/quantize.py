"""K-quants and importance-weighted types, which llama.cpp's own ``llama-quantize`` makes from a file written here."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from ...errors import CheckpointError, ConfigError
from .types import FileType

_NAME = "llama-quantize"
_PLACES = ("", "build/bin", "bin")  # in a checkout of llama.cpp
_LAST_LINES = 15


def find_tool(given: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the ``llama-quantize`` to use.

    Args:
        given: The program, or a folder of llama.cpp that holds it; None looks on PATH.

    Returns:
        Its absolute path, or None when none was given and PATH has none.

    Raises:
        ConfigError: what was given is not there or cannot be run.
    """
    if given is None:
        found = shutil.which(_NAME)
        return Path(found).absolute() if found else None
    path = Path(given).expanduser().absolute()
    candidates = [path / place / _NAME for place in _PLACES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise ConfigError(
        f"there is no program {_NAME} at {str(given)!r}",
        where="argument llama_quantize",
        hint="give the program, or the folder of a built llama.cpp",
    )


def check_imatrix(wanted: FileType, imatrix: str | bool | os.PathLike[str] | None) -> Path | None:
    """Return the importance matrix to use for a type.

    Raises:
        ConfigError: the type needs one, the file is missing, or one is to be downloaded, which is not done.
    """
    if imatrix is True:
        raise ConfigError(
            "an importance matrix is not looked for on the hub",
            where="argument imatrix_file",
            hint="download it, and give its path",
        )
    if not imatrix:
        if wanted.needs_imatrix:
            raise ConfigError(
                f"the type {wanted.name!r} needs an importance matrix",
                where="argument imatrix_file",
                hint="make one with llama.cpp's llama-imatrix, and give its path",
            )
        return None
    path = Path(imatrix).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"there is no file {str(imatrix)!r}", where="argument imatrix_file")
    return path


def arguments(
    tool: str | Path, source: Path, target: Path, wanted: FileType, imatrix: Path | None, *, requantize: bool = False
) -> list[str]:
    """Return the command. Paths are absolute, so none of them begins with a dash and passes for an option."""
    command = [str(tool), *(("--allow-requantize",) if requantize else ())]
    if imatrix is not None:
        command += ["--imatrix", str(imatrix)]
    return [*command, *wanted.options, str(source.absolute()), str(target.absolute()), str(wanted.external)]


def shown(command: list[str]) -> str:
    """The command as one types it into a shell."""
    return shlex.join(command)


def run(tool: Path, source: Path, target: Path, wanted: FileType, imatrix: Path | None) -> None:
    """Make ``target`` from ``source``.

    Raises:
        CheckpointError: the program fails, or writes nothing.
    """
    command = arguments(tool, source, target, wanted, imatrix)
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise CheckpointError(f"cannot run {_NAME}", where=str(tool), why=str(error)) from error
    if done.returncode != 0 or not target.is_file():
        raise CheckpointError(
            f"{_NAME} failed with exit code {done.returncode}",
            where=shown(command),
            why=last_lines(done),
        )


def last_lines(done: subprocess.CompletedProcess[bytes]) -> str:
    """The end of what a program said, for an error."""
    lines = (done.stdout + b"\n" + done.stderr).decode(errors="replace").strip().splitlines()
    return "\n         ".join(lines[-_LAST_LINES:]) or "it wrote nothing"

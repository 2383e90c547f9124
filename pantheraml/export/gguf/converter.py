"""Families that are not written here, by ``convert_hf_to_gguf.py`` of the user's own checkout of llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ...checkpoint.safetensors_io import SafetensorsFolder
from ...errors import CheckpointError, ConfigError
from ..verify import agreement, quiet_transformers
from . import quantize
from .check import HELD, FileCheck
from .types import FileType

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0")  # those that the script writes; further ones are made from them


def find_script(given: str | os.PathLike[str]) -> Path:
    """Return the script.

    Args:
        given: The script, or the folder that holds it.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(given).expanduser().absolute()
    path = path / SCRIPT if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"there is no {SCRIPT} at {str(given)!r}",
            where="argument converter",
            hint="give the script, or the folder of your checkout of llama.cpp",
        )
    return path


def check_types(types: tuple[FileType, ...], tool: Path | None) -> None:
    """Refuse types that the script does not write, where there is no ``llama-quantize`` to make them.

    Raises:
        ConfigError: there is such a type.
    """
    for entry in types:
        if entry.name == "mxfp4" or (entry.name not in TYPES and tool is None):
            raise ConfigError(
                f"{SCRIPT} does not write {entry.name!r}",
                where="argument quantization_method",
                hint=f"use one of {', '.join(TYPES)}, or give llama_quantize as well",
            )


def write_file(
    script: Path, folder: Path, target: Path, entry: FileType, first: FileType, tool: Path | None, imatrix: Path | None
) -> None:
    """Write one type.

    Args:
        script: What ``find_script`` gave.
        folder: The merged model.
        target: File to write.
        entry: Its type.
        first: Type of the file that ``llama-quantize`` starts from.
        tool: The ``llama-quantize`` to use.
        imatrix: Importance matrix for it.

    Raises:
        CheckpointError: a program fails, or writes nothing.
    """
    if entry.name in TYPES:
        _run(script, folder, target, entry.name)
        return
    assert tool is not None
    base = target.with_name("first.tmp.gguf")
    _run(script, folder, base, first.name)
    quantize.run(tool, base, target, replace(entry, external=entry.external or entry.name.upper()), imatrix)
    base.unlink()


def _run(script: Path, folder: Path, target: Path, kind: str) -> None:
    paths = str(folder.absolute()), "--outfile", str(target.absolute())
    command = [sys.executable, str(script), *paths, "--outtype", kind]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0 or not target.is_file():
        raise CheckpointError(
            f"{SCRIPT} failed with exit code {done.returncode}",
            where=quantize.shown(command),
            why=quantize.last_lines(done),
            hint="it has to know the architecture and the tokenizer, and needs the packages that its folder lists",
        )


def adds_bos(path: Path) -> bool:
    """Whether a file makes the runtime put a bos in front."""
    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def check(path: Path, folder: Path, entry: FileType) -> FileCheck:
    """Load what was written, where transformers knows the architecture, and compare it with the merged model.

    Raises:
        CheckpointError: the file cannot be read, lacks tensors, or computes something else.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError("the written file cannot be read", where=path.name, why=str(error)) from error
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    source = SafetensorsFolder(folder)
    due = max(source.spec(name).nbytes // source.spec(name).dtype.itemsize for name in source.names())
    if held < due:
        raise CheckpointError("the file holds less than the model's largest tensor", where=path.name)
    if psutil.virtual_memory().available < 4 * HELD * held:
        return FileCheck("opened", len(reader.tensors), 0.0, note="there is not enough memory to load it")
    here = {"gguf_file": path.name, "local_files_only": True}
    with quiet_transformers():
        try:
            AutoConfig.from_pretrained(str(path.parent), **here)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            return FileCheck("opened", len(reader.tensors), 0.0, note=f"transformers does not load it: {error}")
        # Its loader reads a part of the settings; the model is given its own.
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), config=config, dtype=torch.float32, **here)
        except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                "transformers cannot load the file", where=path.name, why=str(error), hint="verify=False skips this"
            ) from error
        reference = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    found = agreement(model, reference, reference, budget=entry.logits, note=entry.name)
    if found.problem is not None:
        raise CheckpointError("the model in the file computes something else", where=path.name, why=found.problem)
    return FileCheck("reload", len(reader.tensors), 0.0, found.deviation, found.tokens)

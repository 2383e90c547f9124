"""From a trained model, or a merged folder, to a folder of verified GGUF files."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ... import log
from ...checkpoint.atomic import atomic_directory
from ...checkpoint.disk import disk_errors, human, require_free
from ...checkpoint.safetensors_io import SafetensorsFolder
from ...errors import CheckpointError, ConfigError, UnsupportedError
from .. import ollama
from ..merge import merged_size, save_merged
from . import converter as outside_converter
from . import quantize
from .check import Checker, FileCheck
from .families import Family, family_of, rope
from .tensors import PlannedTensor, plan
from .tokenizer import GGUFTokenizer, read_tokenizer, text_tokenizer
from .types import FILE_TYPES, FileType, resolve_types
from .writer import bytes_at_least, model_metadata, planned_bytes, write_file

_ROOM = 16 * 10**6  # bytes for metadata
_MERGED = "merged.tmp"


@dataclass(frozen=True, slots=True)
class GGUFReport:
    """What was written.

    Attributes:
        directory: Folder of the files.
        files: The files, in the order of the types asked for.
        modelfile: Ollama's ``Modelfile``; None when the chat template is none that it can state.
        types: Types that were written, in the order of ``files``.
        checks: What was verified, by file name; empty with ``verify=False``.
        kept: By file name, the tensors that did not get the file's type, with the reason.
        seconds: Wall time.
    """

    directory: Path
    files: tuple[Path, ...]
    modelfile: Path | None
    types: tuple[str, ...]
    checks: dict[str, FileCheck]
    kept: dict[str, dict[str, str]]
    seconds: float


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be written, checked before any work is done.

    Attributes:
        types: File types, each once; those for ``llama-quantize`` only where there is one.
        later: Types that need a ``llama-quantize`` which is not there.
        tool: The ``llama-quantize`` to use.
        imatrix: Importance matrix by type name.
        first: Type of the file that ``llama-quantize`` starts from.
        verify: Whether files are read back and compared.
        script: llama.cpp's converter, for families that are not written here.
    """

    types: tuple[FileType, ...]
    later: tuple[FileType, ...]
    tool: Path | None
    imatrix: dict[str, Path | None]
    first: FileType
    verify: bool
    script: Path | None = None


def request(
    quantization_method: str | Sequence[str] | None,
    *,
    dtype: str,
    first_conversion: str | None = None,
    imatrix_file: str | bool | os.PathLike[str] | None = None,
    llama_quantize: str | os.PathLike[str] | None = None,
    converter: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> Request:
    """Return what the arguments of ``save_pretrained_gguf`` ask for.

    Args:
        quantization_method: Type or types.
        dtype: Type that holds the model's dtype: ``"f32"``, ``"f16"`` or ``"bf16"``.
        first_conversion: Type of the file that ``llama-quantize`` starts from; None means ``dtype``.
        imatrix_file: Importance matrix for ``llama-quantize``.
        llama_quantize: The program or its folder; None looks on PATH.
        converter: llama.cpp's converter or its folder, for families that are not written here.
        verify: Whether files are read back and compared.

    Raises:
        ConfigError: an argument has no such value.
    """
    wanted = resolve_types(quantization_method, unquantized=dtype)
    first = resolve_types(first_conversion or dtype, unquantized=dtype)[0]
    if first.external is not None:
        raise ConfigError(
            f"{first.name!r} cannot be the first conversion",
            where="argument first_conversion",
            hint="use 'f32', 'bf16', 'f16' or 'q8_0'",
        )
    outside = [entry for entry in wanted if entry.external is not None]
    if imatrix_file and not outside:
        raise ConfigError(
            f"an importance matrix makes no difference to {', '.join(entry.name for entry in wanted)}",
            where="argument imatrix_file",
            hint="leave it out, or choose a K-quant or an IQ type",
        )
    imatrix = {entry.name: quantize.check_imatrix(entry, imatrix_file) for entry in outside}
    tool = quantize.find_tool(llama_quantize) if outside or llama_quantize is not None else None
    later = tuple(outside) if tool is None else ()
    kept = [entry for entry in wanted if entry not in later]
    if later:
        kept.append(FILE_TYPES["q8_0"])
    script = outside_converter.find_script(converter) if converter is not None else None
    return Request(tuple(dict.fromkeys(kept)), later, tool, imatrix, first, verify, script)


def _family(config: Any, wanted: Request) -> Family | None:
    """The model's row, or None where the converter that was given has to write it."""
    try:
        family = family_of(config)
    except UnsupportedError:
        if wanted.script is None:
            raise
        outside_converter.check_types(wanted.types, wanted.tool)
        return None
    check_types(family, wanted)
    return family


def check_types(family: Family, wanted: Request) -> None:
    """Refuse types that the family has nothing to put in.

    Raises:
        ConfigError: experts are to be quantised, and there are none.
    """
    if not family.has_experts and any(entry.name == "mxfp4" for entry in wanted.types):
        raise ConfigError(
            f"mxfp4 is for mixtures of experts, and {family.model_type} models are none",
            where="argument quantization_method",
            hint="use 'q4_0', or 'q4_k_m' with llama-quantize",
        )


def _written(wanted: Request) -> list[FileType]:
    """The types by which space is counted: what ``llama-quantize`` makes is at most as large as what it starts from."""
    outside = [entry for entry in wanted.types if entry.external is not None]
    return [entry for entry in wanted.types if entry not in outside] + [wanted.first] * (len(outside) + bool(outside))


def export_gguf(
    model: Any,
    directory: Path,
    tokenizer: Any,
    wanted: Request,
    *,
    name: str,
    keep_merged: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> GGUFReport:
    """Merge a model and write it as GGUF files.

    Args:
        model: With or without adapters; it is not changed.
        directory: Folder for the files; other files in it stay.
        tokenizer: Its tokenizer or processor.
        wanted: What ``request`` gave.
        name: Stem of the file names.
        keep_merged: Where to leave the merged folder; None removes it.
        finish: Called with the folder before it gets its name.

    Raises:
        ConfigError, UnsupportedError: the model or the tokenizer cannot be written.
        CheckpointError: merging, writing or verification failed; nothing is left under a final name.
    """
    inner = text_tokenizer(tokenizer)
    if _family(model.config, wanted) is not None:  # before the work
        read_tokenizer(inner, model.get_input_embeddings().weight.shape[0])
    weights, needed = merged_size(model)
    needed += sum(bytes_at_least(weights, entry) for entry in _written(wanted))
    require_free(directory, needed, what="the merged model and the GGUF files that are made of it")
    with atomic_directory(directory, overwrite=True, keep=lambda entry: True) as temporary:
        merged = keep_merged or temporary / _MERGED
        save_merged(model, merged, tokenizer, verify=wanted.verify, announce=False)
        report = _write(merged, temporary, inner, wanted, name=name, final=directory)
        if keep_merged is None:
            shutil.rmtree(merged)
        if finish is not None:
            finish(temporary)
    return _tell(report, directory, wanted)


def convert_folder(folder: Path, directory: Path, tokenizer: Any, wanted: Request, *, name: str) -> GGUFReport:
    """Write a merged folder as GGUF files; see ``export_gguf``."""
    inner = text_tokenizer(tokenizer)
    with atomic_directory(directory, overwrite=True, keep=lambda entry: True) as temporary:
        report = _write(folder, temporary, inner, wanted, name=name, final=directory)
    return _tell(report, directory, wanted)


@dataclass(slots=True)
class _Source:
    """A merged folder, opened."""

    config: Any
    family: Family
    tensors: list[PlannedTensor]
    tokenizer: GGUFTokenizer


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("the folder holds no model", where=str(folder), why=str(error)) from error


def _open(folder: Path, config: Any, family: Family, tokenizer: Any) -> _Source:
    if rope(config).get("truncate") is False:
        log.info("llama.cpp rounds the ends of yarn's ramp to whole dimensions, which this model does not")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = window and (not kinds or "sliding_attention" in kinds)
    if windowed and not family.window_period and "phi3" not in family.fields:
        log.warning(f"llama.cpp attends to the whole context where this model attends to the last {window} tokens")
    tensors = plan(SafetensorsFolder(folder), config, family)
    return _Source(config, family, tensors, read_tokenizer(tokenizer, config.vocab_size))


def _write(folder: Path, target: Path, tokenizer: Any, wanted: Request, *, name: str, final: Path) -> GGUFReport:
    start = time.monotonic()
    config = _config(folder)
    family = _family(config, wanted)
    if family is None:
        return _write_by_converter(folder, target, tokenizer, wanted, name=name, final=final)
    source = _open(folder, config, family, tokenizer)
    needed = sum(planned_bytes(source.tensors, entry) for entry in _written(wanted))
    needed += _ROOM if needed > _ROOM else needed
    checker = Checker(folder, source.config, source.family, source.tensors, tokenizer, source.tokenizer)
    require_free(target, needed, what="the GGUF files")
    metadata = model_metadata(source.config, source.family, source.tokenizer, name=name)
    checks: dict[str, FileCheck] = {}
    kept: dict[str, dict[str, str]] = {}
    files: list[Path] = []
    base: Path | None = None
    with disk_errors(final, needed, what="the GGUF files"):
        for entry in wanted.types:
            path = target / f"{name}.{entry.name.upper()}.gguf"
            if entry.external is None:
                written = write_file(path, source.tensors, entry, source.family.arch, metadata)
                kept[path.name] = written.kept
            else:
                if base is None:
                    base = target / "first.tmp.gguf"
                    write_file(base, source.tensors, wanted.first, source.family.arch, metadata)
                assert wanted.tool is not None
                quantize.run(wanted.tool, base, path, entry, wanted.imatrix[entry.name])
            if wanted.verify:
                checks[path.name] = checker.check(path, entry)
            files.append(path)
        if base is not None:
            base.unlink()
        modelfile = ollama.write_modelfile(target, files[0].name, tokenizer, adds_bos=source.tokenizer.add_bos)
    return GGUFReport(
        final,
        tuple(final / path.name for path in files),
        final / modelfile.name if modelfile is not None else None,
        tuple(entry.name for entry in wanted.types),
        checks,
        kept,
        time.monotonic() - start,
    )


def _write_by_converter(
    folder: Path, target: Path, tokenizer: Any, wanted: Request, *, name: str, final: Path
) -> GGUFReport:
    start = time.monotonic()
    assert wanted.script is not None
    # A type is at most as large as 32-bit floats; the converter alone knows what it will be.
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 2 * len(wanted.types) + _ROOM
    require_free(target, needed, what="the GGUF files")
    checks: dict[str, FileCheck] = {}
    files = [target / f"{name}.{entry.name.upper()}.gguf" for entry in wanted.types]
    with disk_errors(final, needed, what="the GGUF files"):
        for path, entry in zip(files, wanted.types, strict=True):
            imatrix = wanted.imatrix.get(entry.name)
            outside_converter.write_file(wanted.script, folder, path, entry, wanted.first, wanted.tool, imatrix)
            if wanted.verify:
                checks[path.name] = outside_converter.check(path, folder, entry)
        adds_bos = outside_converter.adds_bos(files[0])
        modelfile = ollama.write_modelfile(target, files[0].name, tokenizer, adds_bos=adds_bos)
    return GGUFReport(
        final,
        tuple(final / path.name for path in files),
        final / modelfile.name if modelfile is not None else None,
        tuple(entry.name for entry in wanted.types),
        checks,
        {},
        time.monotonic() - start,
    )


def _tell(report: GGUFReport, directory: Path, wanted: Request) -> GGUFReport:
    for path in report.files:
        check = report.checks.get(path.name)
        verified = check.summary() if check is not None else "not verified"
        log.info(f"saved {path}: {human(path.stat().st_size)}, {verified}")
        odd = report.kept.get(path.name)
        if odd:
            first = next(iter(odd))
            log.info(f"{len(odd)} tensors of {path.name} have another type: {first}, since {odd[first]}")
    source = directory / next((p.name for p, t in zip(report.files, report.types, strict=True) if t == "q8_0"), "")
    for entry in wanted.later:
        target = directory / source.name.replace(".Q8_0.gguf", f".{entry.name.upper()}.gguf")
        command = quantize.arguments(
            "llama-quantize", source, target, entry, wanted.imatrix[entry.name], requantize=True
        )
        log.warning(
            f"{entry.name} needs llama.cpp's llama-quantize, which is not on PATH, so q8_0 was written; "
            f"with it, run: {quantize.shown(command)}"
        )
    return report

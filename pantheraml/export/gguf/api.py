"""The GGUF functions of the public interface. The package ``gguf`` is looked for when one of them is called."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import env, log
from ...device import require
from ...errors import ConfigError, UnsupportedError
from ...models.record import record_of
from ...parallel.fsdp import is_sharded
from ..hub import HubTarget, create_repo, upload, write_card
from .types import ADAPTER_TYPES, ALIASES, FILE_TYPES, FileType, resolve_types

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FULL_PRECISION = {"f32", "f16", "bf16"}
_MERGE_METHODS = (None, "merged_16bit", "gguf", "lora")
_GGML_DEFAULT = "f16"

AnyPath = str | os.PathLike[str]


def save_pretrained_gguf(
    model: Any,
    save_directory: AnyPath,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    first_conversion: str | None = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    save_function: Callable[..., Any] | None = None,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool | None = True,
    variant: str | None = None,
    save_peft_format: bool = True,
    tags: Iterable[str] | None = None,
    temporary_location: AnyPath | None = None,
    maximum_memory_usage: float = 0.85,
    save_method: str | None = None,
    imatrix_file: AnyPath | bool | None = None,
    merge_is_disposable: bool = True,
    *,
    llama_quantize: AnyPath | None = None,
    converter: AnyPath | None = None,
    verify: bool = True,
) -> dict[str, Any] | None:
    """Merge the trained model and write it as GGUF files, which are read back and compared before they get their names.

    Args:
        model: The model, with or without adapters; it is not changed.
        save_directory: The files go to ``<save_directory>_gguf``, and are named after its last part.
        tokenizer: Tokenizer or processor of the model; needed, since a GGUF file holds it.
        quantization_method: A type or several: ``"fast_quantized"`` (q8_0; None means it), ``"not_quantized"`` (the
            model's dtype), ``"quantized"`` (q4_k_m), or any name that ``print_quantization_methods`` lists, in any
            case. K-quants and IQ types are made by llama.cpp's ``llama-quantize``; where there is none, q8_0 is
            written and the command is told.
        first_conversion: Type of the file that ``llama-quantize`` starts from; None means the model's dtype.
        push_to_hub: Raises; see ``push_to_hub_gguf``.
        token: Belongs to ``push_to_hub_gguf``.
        private: Belongs to ``push_to_hub_gguf``.
        is_main_process: False on ranks that are not to write.
        state_dict: Cannot be honoured; anything but None raises.
        save_function: Cannot be honoured; anything but None or ``torch.save`` raises.
        max_shard_size: Makes no difference: a type is one file.
        safe_serialization: Only True.
        variant: Cannot be honoured; anything but None raises.
        save_peft_format: Only True.
        tags: Tags for a model card, which is written when there are any.
        temporary_location: Makes no difference: the merged model lies beside the files until they are done.
        maximum_memory_usage: Makes no difference: tensors are written one at a time.
        save_method: None or ``"merged_16bit"``; ``"lora"`` writes the adapter alone, for llama.cpp's ``--lora``, as
            ``f32``, ``f16``, ``bf16`` or ``q8_0``, and needs no tokenizer.
        imatrix_file: Importance matrix for ``llama-quantize``; IQ types need one.
        merge_is_disposable: False keeps the merged folder, under ``save_directory``.
        llama_quantize: The program ``llama-quantize``, or a folder of llama.cpp that holds it; None looks on PATH.
        converter: ``convert_hf_to_gguf.py`` of your own checkout of llama.cpp, or its folder, which is run for models
            that are not written here.
        verify: Read the files back and compare tensors, settings, tokenizer and logits with the model.

    Returns:
        ``save_directory``, ``gguf_directory``, ``gguf_files`` (paths, the types asked for in their order),
        ``modelfile_location`` (None when Ollama cannot state the chat template), ``want_full_precision`` (no type loses
        bits on purpose), ``is_vlm`` (False) and ``fix_bos_token`` (False: the template is written as it is); None on
        ranks that do not write.

    Raises:
        ConfigError: an argument has no such value, or the tokenizer is missing.
        UnsupportedError: the architecture, or an argument, cannot be honoured.
        CheckpointError: nothing was written under a final name; the message says why.
    """
    if push_to_hub:
        raise ConfigError(
            "GGUF files are pushed by a call of their own",
            where="argument push_to_hub",
            hint="leave it out, and call push_to_hub_gguf(repo_id, tokenizer, ...)",
        )
    _check_unused(
        state_dict=state_dict,
        save_function=None if save_function is torch.save else save_function,
        variant=variant,
        save_peft_format=None if save_peft_format else False,
        safe_serialization=None if safe_serialization in (True, None) else False,
        token=token,
        private=private,
    )
    _tell_unused(max_shard_size, temporary_location, maximum_memory_usage, 0.85)
    directory = Path(save_directory)
    tag_list = [tags] if isinstance(tags, str) else list(tags or ())
    finish = (lambda folder: write_card(model, folder, tags=[*tag_list, "gguf"], datasets=None)) if tag_list else None
    if _only_adapter(save_method):
        _check_unused(
            first_conversion=first_conversion,
            imatrix_file=imatrix_file or None,
            llama_quantize=llama_quantize,
            converter=converter,
        )
        return _save_adapter(
            model,
            directory,
            _gguf_folder(directory),
            quantization_method,
            is_main_process=is_main_process,
            verify=verify,
            finish=finish,
        )
    wanted = _request(
        model,
        tokenizer,
        quantization_method,
        first_conversion=first_conversion,
        imatrix_file=imatrix_file,
        llama_quantize=llama_quantize,
        converter=converter,
        verify=verify,
    )
    if not is_main_process or env.rank() != 0:
        return None
    from .convert import export_gguf

    report = export_gguf(
        model,
        _gguf_folder(directory),
        tokenizer,
        wanted,
        name=directory.absolute().name,
        keep_merged=None if merge_is_disposable else directory,
        finish=finish,
    )
    return _result(directory, report)


def save_pretrained_ggml(
    model: Any,
    save_directory: AnyPath,
    tokenizer: Any = None,
    temporary_location: AnyPath | None = None,
    maximum_memory_usage: float = 0.85,
    outtype: str = _GGML_DEFAULT,
    *,
    is_main_process: bool = True,
    verify: bool = True,
) -> dict[str, Any] | None:
    """Write the adapter alone as ``<save_directory>/<name>.F16-LoRA.gguf``, which llama.cpp applies to its base model.

    Args:
        model: A PEFT model; it is not changed.
        save_directory: Folder to write; other files in it stay.
        tokenizer: Makes no difference: the base model's file holds it.
        temporary_location: Makes no difference.
        maximum_memory_usage: Makes no difference.
        outtype: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``.
        is_main_process: False on ranks that are not to write.
        verify: Read the file back, and compare the updates that it gives with those of the adapter.

    Returns:
        As ``save_pretrained_gguf``; None on ranks that do not write.

    Raises:
        ConfigError: no such type.
        ConflictError: the model has no adapter that is enabled.
        UnsupportedError: the adapter is more than LoRA on linear layers and embeddings.
        CheckpointError: nothing was written under a final name; the message says why.
    """
    del tokenizer
    _tell_unused("5GB", temporary_location, maximum_memory_usage, 0.85)
    directory = Path(save_directory)
    return _save_adapter(
        model,
        directory,
        directory,
        outtype,
        is_main_process=is_main_process,
        verify=verify,
        argument="outtype",
    )


def push_to_hub_ggml(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    use_temp_dir: bool | None = None,
    commit_message: str | None = "Trained with PantheraML",
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str = "",
    tags: Iterable[str] | None = None,
    temporary_location: AnyPath | None = None,
    maximum_memory_usage: float = 0.85,
    datasets: Iterable[str] | None = None,
    outtype: str = _GGML_DEFAULT,
    *,
    is_main_process: bool = True,
    verify: bool = True,
) -> str | None:
    """Write the adapter alone as a GGUF file, as ``save_pretrained_ggml`` does, and upload it with a model card.

    The arguments are those of ``push_to_hub_gguf`` and ``save_pretrained_ggml``, and so are the errors.

    Returns:
        The repository's full name; None on ranks that do not write.
    """
    return push_to_hub_gguf(
        model,
        repo_id,
        tokenizer,
        outtype,
        use_temp_dir=use_temp_dir,
        commit_message=commit_message,
        private=private,
        token=token,
        create_pr=create_pr,
        revision=revision,
        commit_description=commit_description,
        tags=tags,
        temporary_location=temporary_location,
        maximum_memory_usage=maximum_memory_usage,
        datasets=datasets,
        save_method="lora",
        is_main_process=is_main_process,
        verify=verify,
    )


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    first_conversion: str | None = None,
    use_temp_dir: bool | None = None,
    commit_message: str | None = "Trained with PantheraML",
    private: bool | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str = "5GB",
    create_pr: bool = False,
    safe_serialization: bool | None = True,
    revision: str | None = None,
    commit_description: str = "",
    tags: Iterable[str] | None = None,
    temporary_location: AnyPath | None = None,
    maximum_memory_usage: float = 0.85,
    datasets: Iterable[str] | None = None,
    save_method: str | None = None,
    imatrix_file: AnyPath | bool | None = None,
    *,
    is_main_process: bool = True,
    llama_quantize: AnyPath | None = None,
    converter: AnyPath | None = None,
    verify: bool = True,
) -> str | None:
    """Write GGUF files of the trained model as ``save_pretrained_gguf`` does, and upload them with a model card.

    Args:
        model: The model; it is not changed.
        repo_id: ``"owner/name"``, or ``"name"`` under the token's owner.
        tokenizer: Tokenizer or processor of the model; needed.
        quantization_method: A type or several.
        first_conversion: As in ``save_pretrained_gguf``.
        use_temp_dir: False keeps the files, in ``<name>_gguf`` in the working directory.
        commit_message: Title of the commit.
        private: Whether a new repository is private; None means the owner's default.
        token: Hub token; None means the one stored by ``hf auth login``.
        max_shard_size: Makes no difference: a type is one file.
        create_pr: Open a pull request in place of committing.
        safe_serialization: Only True.
        revision: Branch to commit to.
        commit_description: Body of the commit.
        tags: Further tags for the model card.
        temporary_location: Folder in which the temporary folder is made; None means the system's.
        maximum_memory_usage: Makes no difference.
        datasets: Hub ids of data sets for the model card.
        save_method: As in ``save_pretrained_gguf``.
        imatrix_file: As in ``save_pretrained_gguf``.
        is_main_process: False on ranks that are not to write.
        llama_quantize: As in ``save_pretrained_gguf``.
        converter: As in ``save_pretrained_gguf``.
        verify: Check the files before they are uploaded.

    Returns:
        The repository's full name; None on ranks that do not write.

    Raises:
        ConfigError, UnsupportedError: an argument cannot be honoured.
        CheckpointError: writing, verification or the upload failed.
    """
    _check_unused(safe_serialization=None if safe_serialization in (True, None) else False)
    _tell_unused(max_shard_size, None, maximum_memory_usage, 0.85)
    alone = _only_adapter(save_method)
    wanted: Any
    if alone:
        _check_unused(
            first_conversion=first_conversion,
            imatrix_file=imatrix_file or None,
            llama_quantize=llama_quantize,
            converter=converter,
        )
        wanted = check_adapter_types(quantization_method)
        require("gguf", what="writing GGUF files")
    else:
        wanted = _request(
            model,
            tokenizer,
            quantization_method,
            first_conversion=first_conversion,
            imatrix_file=imatrix_file,
            llama_quantize=llama_quantize,
            converter=converter,
            verify=verify,
        )
    if not is_main_process or env.rank() != 0:
        return None
    message = commit_message or "Trained with PantheraML"
    target = HubTarget(repo_id, token, private, message, commit_description or "", create_pr, revision)
    create_repo(target)
    name = repo_id.rpartition("/")[2]
    tag_list = [tags] if isinstance(tags, str) else list(tags or ())
    data = [datasets] if isinstance(datasets, str) else list(datasets or ())

    def finish(path: Path) -> None:
        write_card(model, path, tags=[*tag_list, "gguf", "llama.cpp"], datasets=data)

    with tempfile.TemporaryDirectory(dir=temporary_location) as scratch:
        folder = _gguf_folder(Path(name) if use_temp_dir is False else Path(scratch, name))
        if alone:
            from .lora import export_lora

            export_lora(model, folder, wanted, name=name, verify=verify, finish=finish)
        else:
            from .convert import export_gguf

            export_gguf(model, folder, tokenizer, wanted, name=name, finish=finish)
        return upload(folder, target)


def save_to_gguf(
    model_directory: AnyPath,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    first_conversion: str | None = None,
    imatrix_file: AnyPath | bool | None = None,
    *,
    output_directory: AnyPath | None = None,
    llama_quantize: AnyPath | None = None,
    converter: AnyPath | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Write a merged folder, or any folder with a transformers model of a known family, as GGUF files.

    Args:
        model_directory: Folder with config and safetensors files.
        tokenizer: Its tokenizer; None loads the folder's.
        quantization_method: As in ``save_pretrained_gguf``.
        first_conversion: As in ``save_pretrained_gguf``.
        imatrix_file: As in ``save_pretrained_gguf``.
        output_directory: Folder for the files; None means ``<model_directory>_gguf``.
        llama_quantize: As in ``save_pretrained_gguf``.
        converter: As in ``save_pretrained_gguf``.
        verify: As in ``save_pretrained_gguf``.

    Returns:
        As ``save_pretrained_gguf``.

    Raises:
        ConfigError, UnsupportedError, CheckpointError: as ``save_pretrained_gguf``.
    """
    require("gguf", what="writing GGUF files")
    from transformers import AutoConfig, AutoTokenizer

    from .convert import convert_folder, request

    folder = Path(model_directory)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the folder holds no model with its tokenizer", where=f"argument model_directory: {folder}", why=str(error)
        ) from error
    wanted = request(
        quantization_method,
        dtype=_DTYPES.get(getattr(config, "dtype", None) or torch.float16, "f16"),
        first_conversion=first_conversion,
        imatrix_file=imatrix_file,
        llama_quantize=llama_quantize,
        converter=converter,
        verify=verify,
    )
    target = _gguf_folder(folder) if output_directory is None else Path(output_directory)
    return _result(folder, convert_folder(folder, target, tokenizer, wanted, name=folder.absolute().name))


def print_quantization_methods() -> None:
    """Tell the names that ``quantization_method`` takes."""
    aliases = {alias: name or "the model's dtype" for alias, name in ALIASES.items()}
    lines = [f"  {alias:16} {meaning}" for alias, meaning in aliases.items()]
    for entry in FILE_TYPES.values():
        needs = " [llama-quantize]" if entry.external else ""
        needs += " [imatrix_file]" if entry.needs_imatrix else ""
        lines.append(f"  {entry.name:16} {entry.about}{needs}")
    log.info("GGUF types:\n" + "\n".join(lines))


def _request(
    model: Any,
    tokenizer: Any,
    quantization_method: str | Sequence[str] | None,
    *,
    first_conversion: str | None,
    imatrix_file: AnyPath | bool | None,
    llama_quantize: AnyPath | None,
    converter: AnyPath | None,
    verify: bool,
) -> Any:
    if tokenizer is None:
        raise ConfigError(
            "a GGUF file holds its tokenizer, and none was given",
            where="argument tokenizer",
            hint="pass the tokenizer that the model was trained with",
        )
    if is_sharded(model):
        raise UnsupportedError(
            "GGUF files are not written from a model that is sharded over ranks",
            where="argument model",
            hint="call save_pretrained_merged(folder, tokenizer) on every rank, then save_to_gguf(folder) on one",
        )
    require("gguf", what="writing GGUF files")
    from .convert import request

    record = record_of(model)
    dtype = record.dtype if record is not None else getattr(model, "dtype", torch.float16)
    return request(
        quantization_method,
        dtype=_DTYPES.get(dtype, "f16"),
        first_conversion=first_conversion,
        imatrix_file=imatrix_file,
        llama_quantize=llama_quantize,
        converter=converter,
        verify=verify,
    )


def _only_adapter(save_method: str | None) -> bool:
    """Whether ``save_method`` asks for the adapter alone."""
    method = None if save_method is None else str(save_method).lower().strip()
    if method not in _MERGE_METHODS:
        raise UnsupportedError(
            f"GGUF files of save_method={save_method!r} are not written",
            where="argument save_method",
            hint="leave it out for the merged model, or use 'lora' for the adapter alone",
        )
    return method == "lora"


def check_adapter_types(value: Any, *, argument: str = "quantization_method") -> tuple[FileType, ...]:
    """Return the types for an adapter alone.

    Raises:
        ConfigError: adapters are not written in one of them.
    """
    wanted = resolve_types(value)
    for entry in wanted:
        if entry.name not in ADAPTER_TYPES:
            raise ConfigError(
                f"adapters are not written as {entry.name!r}",
                where=f"argument {argument}",
                hint=f"use one of {', '.join(ADAPTER_TYPES)}",
            )
    return wanted


def _save_adapter(
    model: Any,
    save_directory: Path,
    target: Path,
    types: str | Sequence[str] | None,
    *,
    is_main_process: bool,
    verify: bool,
    argument: str = "quantization_method",
    finish: Callable[[Path], None] | None = None,
) -> dict[str, Any] | None:
    wanted = check_adapter_types(types, argument=argument)
    require("gguf", what="writing GGUF files")
    if not is_main_process or env.rank() != 0:
        return None
    from .lora import export_lora

    name = save_directory.absolute().name
    return _result(save_directory, export_lora(model, target, wanted, name=name, verify=verify, finish=finish))


def _check_unused(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{name} cannot be honoured", where=f"argument {name}", hint="leave it out")


def _tell_unused(shard_size: int | str, location: AnyPath | None, memory: float, default: float) -> None:
    if shard_size != "5GB" or location is not None or memory != default:
        log.once(
            "max_shard_size, temporary_location and maximum_memory_usage make no difference to GGUF files: a type is "
            "one file, written one tensor at a time",
            key="gguf-buffers",
        )


def _gguf_folder(directory: Path) -> Path:
    return directory.with_name(f"{directory.absolute().name}_gguf")


def _result(directory: Path, report: Any) -> dict[str, Any]:
    return {
        "save_directory": str(directory),
        "gguf_directory": str(report.directory),
        "gguf_files": [str(path) for path in report.files],
        "modelfile_location": str(report.modelfile) if report.modelfile is not None else None,
        "want_full_precision": set(report.types) <= _FULL_PRECISION,
        "is_vlm": False,
        "fix_bos_token": False,
    }

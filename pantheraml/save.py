"""Saving and sharing: the functions that models carry as methods, with the signatures that Unsloth users know."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import env, log
from .errors import ConfigError, UnsupportedError, unknown_arguments
from .export.adapter import save_adapter
from .export.gguf.api import (
    print_quantization_methods,
    push_to_hub_ggml,
    push_to_hub_gguf,
    save_pretrained_ggml,
    save_pretrained_gguf,
    save_to_gguf,
)
from .export.hub import HubTarget, create_repo, upload, write_card
from .export.merge import MergeOnto, save_merged
from .export.report import MergeReport
from .models.methods import attach_methods
from .models.qat import scheme_of
from .models.qat import torchao_config as scheme_config

__all__ = [
    "create_huggingface_repo",
    "patch_saving_functions",
    "print_quantization_methods",
    "push_to_hub_ggml",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "save_lora",
    "save_pretrained_ggml",
    "save_pretrained_gguf",
    "save_pretrained_merged",
    "save_pretrained_torchao",
    "save_to_gguf",
    "unsloth_save_model",
]

# Arguments of the API that only matter for methods or formats that are not there: name -> default.
_UNUSED_DEFAULTS: dict[str, Any] = {
    "state_dict": None,
    "variant": None,
    "save_peft_format": True,
    "calibration_dataset": None,
    "num_calibration_samples": 512,
    "max_seq_length": 2048,
}


def _check_unused(given: dict[str, Any], *, where: str) -> None:
    unknown = set(given) - set(_UNUSED_DEFAULTS)
    if unknown:
        raise unknown_arguments(unknown, _UNUSED_DEFAULTS, where=where)
    for name, value in given.items():
        default = _UNUSED_DEFAULTS[name]
        if value is not default and value != default:
            raise UnsupportedError(
                f"{name}={value!r} cannot be honoured" if not isinstance(value, dict) else f"{name} cannot be honoured",
                where=f"argument {name}",
                hint="leave it out",
            )


def _check_format(safe_serialization: bool | None, save_function: Callable[..., Any] | None) -> None:
    if safe_serialization is False:
        raise ConfigError(
            "only safetensors files are written: pickled weights can run code when they are loaded",
            where="argument safe_serialization",
            hint="leave it at True",
        )
    if save_function not in (None, torch.save):
        raise UnsupportedError(
            "a save_function cannot be honoured", where="argument save_function", hint="leave it out"
        )


def save_pretrained_merged(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    save_function: Callable[..., Any] | None = None,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool | None = True,
    variant: str | None = None,
    save_peft_format: bool = True,
    tags: Iterable[str] | None = None,
    temporary_location: str | os.PathLike[str] | None = None,
    maximum_memory_usage: float = 0.75,
    datasets: Iterable[str] | None = None,
    calibration_dataset: Any = None,
    num_calibration_samples: int = 512,
    max_seq_length: int = 2048,
    *,
    verify: bool = True,
    dtype: torch.dtype | None = None,
    merge_onto: MergeOnto = "auto",
) -> MergeReport | None:
    """Save the trained model as a folder that plain transformers loads, and check that it holds the trained model.

    Args:
        model: The model; it is not changed.
        save_directory: Folder to write; with ``push_to_hub`` also the name of the repository.
        tokenizer: Tokenizer or processor to write along, padding on the left.
        save_method: ``"merged_16bit"`` (None means it), ``"lora"``, ``"merged_4bit_forced"`` (bitsandbytes' nf4), or a
            format of compressed-tensors or torchao: ``"fp8"``, ``"int8"``, ``"int4"``, ``"torchao_int8"``, ... (the
            error for an unknown one lists them).
        push_to_hub: Upload the folder after it was written.
        token: Hub token.
        is_main_process: False on ranks that are not to write.
        state_dict: Cannot be honoured; anything but None raises.
        save_function: Cannot be honoured; anything but None or ``torch.save`` raises.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.
        safe_serialization: Only True: weights are written as safetensors.
        variant: Cannot be honoured; anything but None raises.
        save_peft_format: Only True.
        tags: Tags for the model card (``README.md``), which is written when there are any.
        temporary_location: Not needed: tensors are merged and written one at a time. Said once when given.
        maximum_memory_usage: Not needed, likewise.
        datasets: Hub ids of data sets for the model card.
        calibration_dataset: Cannot be honoured; belongs to quantised formats.
        num_calibration_samples: Belongs to quantised formats.
        max_seq_length: Belongs to quantised formats.
        verify: Reload what was written and compare it with ``model``.
        dtype: Dtype to write; None means the dtype the model was loaded in.
        merge_onto: For a model loaded in 4 or 8 bit: ``"auto"``, ``"base"`` (the original weights) or
            ``"dequantized"`` (the weights in memory).

    Returns:
        What was done; None on ranks that do not write.

    Raises:
        ConfigError, UnsupportedError: an argument cannot be honoured.
        CheckpointError: nothing was written under the final name; the message says why.
    """
    _check_format(safe_serialization, save_function)
    _check_unused(
        {
            "state_dict": state_dict,
            "variant": variant,
            "save_peft_format": save_peft_format,
            "calibration_dataset": calibration_dataset,
            "num_calibration_samples": num_calibration_samples,
            "max_seq_length": max_seq_length,
        },
        where="save_pretrained_merged",
    )
    if not 0.0 < maximum_memory_usage <= 0.95:
        raise ConfigError(
            f"{maximum_memory_usage!r} is no share of the memory",
            where="argument maximum_memory_usage",
            hint="use 0.75",
        )
    if temporary_location is not None or maximum_memory_usage != 0.75:
        log.once(
            "temporary_location and maximum_memory_usage make no difference: tensors are written one at a time",
            key="save-buffers",
        )
    tags, datasets = _names(tags), _names(datasets)
    target = HubTarget(str(save_directory), token) if push_to_hub else None
    writes = is_main_process and env.rank() == 0
    if target is not None and writes:
        create_repo(target)  # before the work, so that a bad name or token costs nothing

    def finish(folder: Path) -> None:
        write_card(model, folder, tags=tags, datasets=datasets)

    report = save_merged(
        model,
        save_directory,
        tokenizer,
        save_method=save_method,
        max_shard_size=max_shard_size,
        verify=verify,
        dtype=dtype,
        merge_onto=merge_onto,
        is_main_process=is_main_process,
        finish=finish if tags or datasets or push_to_hub else None,
    )
    if target is not None and report is not None:
        upload(report.directory, target)
    return report


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
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
    temporary_location: str | os.PathLike[str] | None = None,
    maximum_memory_usage: float = 0.75,
    datasets: Iterable[str] | None = None,
    *,
    is_main_process: bool = True,
    verify: bool = True,
    dtype: torch.dtype | None = None,
    merge_onto: MergeOnto = "auto",
    **unused: Any,
) -> str | None:
    """Merge, verify and upload the trained model to the Hugging Face hub.

    Args:
        model: The model; it is not changed.
        repo_id: ``"owner/name"``, or ``"name"`` under the token's owner.
        tokenizer: Tokenizer or processor to upload along.
        save_method: As in ``save_pretrained_merged``.
        use_temp_dir: False keeps the merged folder, named after the repository, in the working directory.
        commit_message: Title of the commit.
        private: Whether a new repository is private; None means the owner's default.
        token: Hub token; None means the one stored by ``hf auth login``.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.
        create_pr: Open a pull request in place of committing.
        safe_serialization: Only True.
        revision: Branch to commit to.
        commit_description: Body of the commit.
        tags: Further tags for the model card.
        temporary_location: Folder in which the temporary merged folder is made; None means the system's.
        maximum_memory_usage: Not needed: tensors are merged and written one at a time.
        datasets: Hub ids of data sets for the model card.
        is_main_process: False on ranks that are not to write.
        verify: Check the merged folder before it is uploaded.
        dtype: Dtype to write; None means the dtype the model was loaded in.
        merge_onto: As in ``save_pretrained_merged``.
        **unused: Arguments that belong to other formats; they raise unless they have their default.

    Returns:
        The repository's full name; None on ranks that do not write.

    Raises:
        ConfigError, UnsupportedError: an argument cannot be honoured.
        CheckpointError: merging, verification or the upload failed.
    """
    _check_format(safe_serialization, unused.pop("save_function", None))
    _check_unused(unused, where="push_to_hub_merged")
    if not is_main_process or env.rank() != 0:
        return None
    target = HubTarget(
        repo_id,
        token,
        private,
        commit_message or "Trained with PantheraML",
        commit_description or "",
        create_pr,
        revision,
    )
    create_repo(target)
    tags, datasets = _names(tags), _names(datasets)
    with tempfile.TemporaryDirectory(dir=temporary_location) as scratch:
        folder = Path(repo_id.rpartition("/")[2] if use_temp_dir is False else Path(scratch, "model"))
        save_merged(
            model,
            folder,
            tokenizer,
            save_method=save_method,
            max_shard_size=max_shard_size,
            verify=verify,
            dtype=dtype,
            merge_onto=merge_onto,
            finish=lambda path: write_card(model, path, tags=tags, datasets=datasets),
        )
        return upload(folder, target)


def _names(values: Iterable[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or ())


def save_pretrained_torchao(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    torchao_config: Any = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    *,
    max_shard_size: int | str = "5GB",
    is_main_process: bool = True,
    verify: bool = True,
) -> MergeReport | None:
    """Merge the trained model, quantise it with torchao, and save that as a folder that transformers and vLLM load.

    Args:
        model: The model; it is not changed.
        save_directory: Folder to write; with ``push_to_hub`` also the name of the repository.
        tokenizer: Tokenizer or processor to write along.
        torchao_config: A configuration of ``torchao.quantization``, such as ``Int8WeightOnlyConfig(version=2)``; None
            means that of the ``qat_scheme`` which the model was trained with.
        push_to_hub: Upload the folder after it was written.
        token: Hub token.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.
        is_main_process: False on ranks that are not to write.
        verify: Reload what was written and compare its logits with the model's.

    Returns:
        What was done; None on ranks that do not write.

    Raises:
        ConfigError: there is no configuration.
        MissingDependencyError: torchao is not installed.
        UnsupportedError: torchao cannot quantise this model so on this device.
        CheckpointError: nothing was written under the final name; the message says why.
    """
    scheme = scheme_of(model)
    if torchao_config is None and scheme is not None:
        torchao_config = scheme_config(scheme)
    if torchao_config is None:
        raise ConfigError(
            "no configuration of torchao was given",
            where="argument torchao_config",
            why="the model was not trained with a qat_scheme, from which one would be known",
            hint="for example torchao.quantization.Int8WeightOnlyConfig(version=2)",
        )
    target = HubTarget(str(save_directory), token) if push_to_hub else None
    if target is not None and is_main_process and env.rank() == 0:
        create_repo(target)
    report = save_merged(
        model,
        save_directory,
        tokenizer,
        max_shard_size=max_shard_size,
        verify=verify,
        is_main_process=is_main_process,
        finish=(lambda folder: write_card(model, folder, tags=None, datasets=None)) if push_to_hub else None,
        torchao_config=torchao_config,
    )
    if target is not None and report is not None:
        upload(report.directory, target)
    return report


def save_lora(model: Any, save_directory: str | os.PathLike[str]) -> MergeReport | None:
    """Save the adapter alone, as a folder that plain PEFT loads.

    Args:
        model: A PEFT model.
        save_directory: Folder to write.

    Returns:
        What was written; None on ranks that do not write.

    Raises:
        ConfigError: the model has no adapter.
    """
    return save_adapter(model, save_directory) if env.rank() == 0 else None


def unsloth_save_model(
    model: Any,
    tokenizer: Any,
    save_directory: str | os.PathLike[str],
    save_method: str | None = "lora",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    **kwargs: Any,
) -> MergeReport | None:
    """Save under the older name and order of arguments; see ``save_pretrained_merged``."""
    return save_pretrained_merged(model, save_directory, tokenizer, save_method, push_to_hub, token, **kwargs)


def create_huggingface_repo(
    model: Any,
    save_directory: str,
    token: str | bool | None = None,
    private: bool | None = False,
) -> str:
    """Make the repository ``save_directory`` on the hub if it is missing, and return its full name."""
    return create_repo(HubTarget(save_directory, token, private))


def patch_saving_functions(model: Any, vision: bool = False) -> Any:
    """Give a model the saving methods, as every model that PantheraML loads has them.

    Args:
        model: A transformers or PEFT model that was loaded elsewhere.
        vision: Makes no difference; kept for scripts that pass it.

    Returns:
        The model.
    """
    attach_methods(model)
    return model

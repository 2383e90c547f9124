"""Merged models in formats to which transformers itself quantises while it loads: bitsandbytes' and torchao's."""

from __future__ import annotations

import copy
import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .. import log
from ..checkpoint.atomic import atomic_directory
from ..checkpoint.disk import disk_errors, require_free
from ..device import get_device, require
from ..errors import ArgumentError, CheckpointError, UnsupportedError
from ..models.quantize import Flags, resolve_quantization
from .compressed import refuse_experts
from .files import SMALL_FILES, all_but, write_tokenizer
from .methods import BNB_4BIT, TORCHAO
from .parameters import stacked_experts
from .report import MergeReport
from .verify import ROUNDING, Verification, quiet_transformers, verify_behaviour

_DENSE = "merged.tmp"
# Largest relative RMS deviation of the logits, as for compressed-tensors: of what surely has 8 bits, and of others.
_LOGIT_BUDGET_8_BITS, _LOGIT_BUDGET = 0.3, 0.8


def check_torchao_config(torchao_config: Any) -> None:
    """Refuse what is no configuration of torchao.

    Raises:
        MissingDependencyError: torchao is not installed.
        ArgumentError: it is of another type.
    """
    require("torchao", what="save_pretrained_torchao")
    from torchao.core.config import AOBaseConfig

    if not isinstance(torchao_config, AOBaseConfig):
        raise ArgumentError(
            f"torchao_config must be a configuration of torchao, got {type(torchao_config).__name__}",
            where="argument torchao_config",
            hint="for example torchao.quantization.Int8WeightOnlyConfig(version=2)",
        )


def quantization_config(method: str, base: PreTrainedModel, dtype: torch.dtype, torchao_config: Any = None) -> Any:
    """Return what transformers quantises by.

    Args:
        method: ``"merged_4bit_forced"``, one of ``methods.TORCHAO``, or anything else with ``torchao_config``.
        base: The model.
        dtype: Dtype of what stays unquantised.
        torchao_config: A configuration of torchao.

    Raises:
        MissingDependencyError: the package is not installed.
        UnsupportedError: the model has experts, which torchao's own formats leave as they are.
    """
    if method == BNB_4BIT:
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        wanted = resolve_quantization(
            Flags(load_in_4bit=True), name=method, config=config, given=None, dtype=dtype, device=get_device()
        )
        return wanted.config
    require("torchao", what=f"save_method={method!r}")
    import torchao.quantization

    if torchao_config is None:
        refuse_experts(base)
        name, arguments = TORCHAO[method]
        torchao_config = getattr(torchao.quantization, name)(**arguments)
    return transformers.TorchAoConfig(torchao_config)


def save_requantized(
    write_dense: Callable[[Path], MergeReport],
    dense_bytes: int,
    model: Any,
    base: PreTrainedModel,
    directory: Path,
    tokenizer: Any,
    quantization: Any,
    *,
    method: str,
    replaced: tuple[str, ...],
    shard_size: int,
    verify: bool,
    overwrite: bool,
    finish: Callable[[Path], None] | None,
) -> MergeReport:
    """Merge to 16 bit, load that quantised, and save it; the folder appears only when it is complete.

    Args:
        write_dense: Writes the merged 16-bit folder.
        dense_bytes: Its size.
        model: The trained model, with its adapters.
        base: The transformers model inside it.
        directory: Folder to write; other files of an existing folder stay.
        tokenizer: Tokenizer or processor to write along.
        quantization: What ``quantization_config`` gave.
        method: Name of the format, for the report.
        replaced: Patterns of file names that a save replaces.
        shard_size: Largest file, in bytes.
        verify: Reload what was written and compare its logits with the model's.
        overwrite: Whether an existing folder may be replaced.
        finish: Called with the folder before it gets its name.

    Raises:
        UnsupportedError: the package cannot quantise this model on this device.
        CheckpointError: nothing was written under the final name; the message says why.
    """
    start = time.monotonic()
    needed = 2 * dense_bytes + SMALL_FILES
    kind: Any = getattr(transformers, type(base).__name__, type(base))
    device = next(base.parameters()).device
    with (
        disk_errors(directory, needed, what=f"the {method} model"),
        atomic_directory(directory, overwrite=overwrite, keep=all_but(*replaced)) as temporary,
    ):
        require_free(temporary, needed, what=f"the {method} model and the 16-bit one that it is made of")
        dense = write_dense(temporary / _DENSE)
        options = {"local_files_only": True, "use_safetensors": True, "device_map": {"": device}}
        try:
            with quiet_transformers():
                quantised = kind.from_pretrained(
                    str(temporary / _DENSE), quantization_config=quantization, dtype=dense.dtype, **options
                )
                quantised.save_pretrained(str(temporary), max_shard_size=shard_size)
        except (RuntimeError, ValueError, ImportError, AssertionError, NotImplementedError) as error:
            raise UnsupportedError(
                f"this model cannot be quantised to {method} on {device}", why=str(error), hint="use 'merged_16bit'"
            ) from error
        _tell_experts(quantised)
        del quantised
        gc.collect()
        shutil.rmtree(temporary / _DENSE)
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)
        if finish is not None:
            finish(temporary)
        files = tuple(sorted(path.name for path in temporary.iterdir() if "safetensors" in path.name))
        nbytes = sum((temporary / name).stat().st_size for name in files)
        verification = None
        if verify:
            budget = _LOGIT_BUDGET_8_BITS if method in TORCHAO else _LOGIT_BUDGET
            verification = _verify(kind, temporary, model, base, options, budget)
    return replace(
        dense,
        directory=directory,
        save_method=method,
        files=files,
        nbytes=nbytes,
        verification=verification,
        seconds=time.monotonic() - start,
    )


def _tell_experts(quantised: PreTrainedModel) -> None:
    """Say what share of a mixture of experts was not quantised."""
    left = sum(size for name, size in stacked_experts(quantised).items() if _is_plain(quantised, name))
    if left:
        log.warning(f"experts are not quantised by this format: {left:,} weights stay in {quantised.dtype}")


def _is_plain(model: PreTrainedModel, name: str) -> bool:
    return type(model.get_parameter(name)) is nn.Parameter


def _verify(
    kind: Any, folder: Path, model: Any, base: PreTrainedModel, options: dict[str, Any], budget: float
) -> Verification:
    try:
        with quiet_transformers():
            reloaded = kind.from_pretrained(str(folder), dtype="auto", **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError("transformers cannot load what was written", why=str(error)) from error
    return verify_behaviour(
        folder, model, base, reloaded, compared=len(reloaded.state_dict()), budget=budget, note=ROUNDING
    )

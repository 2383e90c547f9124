"""Saving the adapter alone, in the form that plain PEFT loads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..checkpoint.atomic import atomic_directory
from ..checkpoint.disk import disk_errors, require_free
from ..errors import ConfigError
from .files import SMALL_FILES, all_but, write_tokenizer
from .report import MergeReport

_ADAPTER_FILES = ("adapter_model.*", "adapter_config.json")


def save_adapter(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = True,
    finish: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write a PEFT model's adapters; the folder appears only when it is complete.

    Args:
        model: A PEFT model.
        directory: Folder to write. Other files of an existing folder stay.
        tokenizer: Tokenizer or processor to write along, padding on the left.
        overwrite: Whether an existing folder may be replaced.
        finish: Called with the folder before it gets its name, to add files to it.

    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: it cannot be written.
    """
    start = time.monotonic()
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "there is no adapter to save: the model is not a PEFT model",
            where="argument model",
            hint="use save_method='merged_16bit' to save the whole model",
        )
    directory = Path(directory)
    needed = SMALL_FILES + sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with (
        disk_errors(directory, needed, what="the adapter"),
        atomic_directory(directory, overwrite=overwrite, keep=all_but(*_ADAPTER_FILES)) as temporary,
    ):
        require_free(temporary, needed, what="the adapter")
        model.save_pretrained(str(temporary))
        if tokenizer is not None:
            write_tokenizer(tokenizer, temporary)
        if finish is not None:
            finish(temporary)
        files = tuple(sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*.safetensors")))
        nbytes = sum((temporary / name).stat().st_size for name in files)
    return MergeReport(directory, "lora", 0, "", None, files, nbytes, False, None, time.monotonic() - start)

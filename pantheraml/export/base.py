"""The 16-bit weights behind a model that was quantised while it loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download

from ..checkpoint.safetensors_io import SafetensorsFolder
from ..errors import CheckpointError
from .dense import QuantizedWeight
from .layout import CheckpointLayout
from .parameters import Parameter

_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
# Initialisations that leave the base weights alone, so that W + BA on the original base is what was trained.
_BASE_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")
# Relative Frobenius distance between a weight and its quantised form: about 0.10 (nf4, blocks of 64), 0.15 (fp4), 0.01
# (int8) for Gaussian weights; another model's weights are at about 1.4.
_QUANTIZATION_BUDGET = 0.35


class BaseUnavailableError(CheckpointError):
    """The original 16-bit weights cannot be used; the message says why."""


def open_base(name: str, *, revision: str | None, token: str | None, load_kwargs: dict[str, Any]) -> SafetensorsFolder:
    """Open the folder of a model's original weights: a local folder, the hub's cache, or a download, in this order.

    Args:
        name: Folder or hub id.
        revision: Revision of the hub repository.
        token: Hub token.
        load_kwargs: What the model was loaded with; ``subfolder``, ``cache_dir`` and ``local_files_only`` matter.

    Raises:
        BaseUnavailableError: it is not there, is no safetensors checkpoint, or is quantised itself.
    """
    subfolder = load_kwargs.get("subfolder") or ""
    local = Path(name).expanduser()
    if local.is_dir():
        return _dense_folder(local / subfolder)
    if local.is_absolute() or name.startswith((".", "~")):
        raise BaseUnavailableError(f"the folder {name} is not there any more")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _FILES]
    offline = constants.HF_HUB_OFFLINE or bool(load_kwargs.get("local_files_only"))
    reason = ""
    for cached in (True,) if offline else (True, False):
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=load_kwargs.get("cache_dir"),
                allow_patterns=patterns,
                local_files_only=cached,
            )
            return _dense_folder(Path(folder) / subfolder)
        except CheckpointError as error:
            reason = error.what
        except (OSError, ValueError) as error:
            reason = f"{name} is not in the hub's cache" if cached else f"{name} cannot be downloaded: {error}"
    raise BaseUnavailableError(reason + (" and offline mode is on" if offline else ""))


def _dense_folder(folder: Path) -> SafetensorsFolder:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseUnavailableError(f"{folder} has no readable config.json") from error
    if config.get("quantization_config"):
        raise BaseUnavailableError(f"the weights in {folder} are quantised themselves")
    try:
        return SafetensorsFolder(folder)
    except CheckpointError as error:
        raise BaseUnavailableError(f"{folder} cannot be read: {error.what}") from error


def check_adapters(model: Any) -> None:
    """Raise ``BaseUnavailableError`` when the adapters belong to the weights in memory and to no others."""
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            raise BaseUnavailableError("an adapter is already merged into the quantised weights in memory")
    for name, config in getattr(model, "peft_config", {}).items():
        init = getattr(config, "init_lora_weights", True)
        if init not in _BASE_UNCHANGED or getattr(config, "loftq_config", None):
            raise BaseUnavailableError(f"the adapter {name!r} was initialised ({init!r}) against the quantised weights")


class DenseWeights:
    """Gives the dense form of quantised weights: dequantised, or read from the original checkpoint.

    Attributes:
        folder: The original checkpoint, or None to dequantise.
    """

    def __init__(self) -> None:
        self.folder: SafetensorsFolder | None = None
        self._layout: CheckpointLayout | None = None

    def use(self, folder: SafetensorsFolder, entries: Iterable[Parameter], layout: CheckpointLayout) -> None:
        """Read the original weights from ``folder`` from now on.

        Args:
            folder: The checkpoint.
            entries: All parameters of the model.
            layout: What of the checkpoint becomes which parameter.

        Raises:
            BaseUnavailableError: a quantised weight is not in it, or has another shape.
        """
        for entry in entries:
            if entry.quantized is None:
                continue
            for due in layout.stored(entry.spec.name):
                if due.name not in folder:
                    raise BaseUnavailableError(f"{entry.spec.name} has no counterpart in {folder.folder}")
                found = folder.spec(due.name)
                if found.shape != due.shape or not found.dtype.is_floating_point or found.dtype.itemsize < 2:
                    raise BaseUnavailableError(
                        f"{due.name} in {folder.folder} is {found.shape} {found.dtype}, and {due.shape} was loaded"
                    )
        self.folder, self._layout = folder, layout

    def __call__(self, name: str, quantized: QuantizedWeight) -> torch.Tensor:
        """Return the dense weight in the checkpoint's orientation."""
        dequantized = quantized.dequantize()
        if self.folder is None or self._layout is None:
            return dequantized
        original = self._layout.assembled(name, self.folder.read).to(dequantized.device)
        reference = original.float()
        distance = float((dequantized.float() - reference).norm() / reference.norm().clamp_min(1e-12))
        if not distance <= _QUANTIZATION_BUDGET:
            raise CheckpointError(
                "the base weights on disk are not those that were loaded",
                where=f"{self._layout.stored(name)[0].name} in {self.folder.folder}",
                why=f"they differ by {distance:.0%} from the quantised weights in memory; quantisation explains "
                f"{_QUANTIZATION_BUDGET:.0%} at most",
                hint="restore the base model, or pass merge_onto='dequantized'",
            )
        return original

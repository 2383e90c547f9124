"""``PantheraMLTrainer`` with its use of several GPUs said in one object, and the memory of every rank's device."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from .. import log
from ..device import get_device, get_gpu_memory_stats
from ..errors import ConflictError
from ..models.record import record_of
from ..parallel.config import MultiGPUConfig
from ..parallel.parts import in_parts
from ..parallel.process_group import check_count, gather_objects, setup_distributed_training
from ..parallel.ranks import get_rank
from . import ranks
from .trainer import PantheraMLTrainer, PantheraMLTrainingArguments

_GIB = 1024**3


class PantheraMLDistributedTrainer(PantheraMLTrainer):
    """``PantheraMLTrainer`` that takes a ``MultiGPUConfig``.

    Every trainer uses all processes of its launch rightly; this one also checks what was asked for and applies it.
    A backend, address or timeout has to be known before the training arguments are made, which join the process group:
    call ``setup_distributed_training(config)`` first where you choose one.

    Args:
        *args: As for ``trl.SFTTrainer``.
        multi_gpu_config: How several GPUs are used, default what the model was loaded with, else ``MultiGPUConfig()``.
        auto_setup_distributed: Whether to join the process group of the launch here, default True.
        **kwargs: As for ``trl.SFTTrainer``, and the older keywords that ``PantheraMLTrainer`` takes.

    Raises:
        ConfigError: ``num_gpus`` is another number than there is.
        ConflictError: the config contradicts the launch, the model or the arguments.
    """

    def __init__(
        self,
        *args: Any,
        multi_gpu_config: MultiGPUConfig | None = None,
        auto_setup_distributed: bool = True,
        **kwargs: Any,
    ) -> None:
        model = args[0] if args else kwargs.get("model")
        record = record_of(model)
        loaded = None if record is None else record.multi_gpu_config
        config = multi_gpu_config or loaded or MultiGPUConfig()
        if auto_setup_distributed:
            setup_distributed_training(config)
        else:
            check_count(config)
        self.multi_gpu_config = config
        _check_model(model, config)
        if len(args) < 2 and kwargs.get("args") is None:
            kwargs["args"] = PantheraMLTrainingArguments()
        ranks.apply_config(args[1] if len(args) > 1 else kwargs["args"], config)
        super().__init__(*args, **kwargs)

    def get_model_memory_usage(self) -> dict[str, dict[str, float]]:
        """Memory of the device of every rank, in GiB. Every rank has to call it.

        Returns:
            For each rank (in one process: for each GPU) under ``gpu_0``, ``gpu_1`` and so on (``cpu_0`` on a CPU):
            ``allocated`` by tensors, ``cached`` by the allocator, and the most that was ``max_allocated``. On a CPU
            they are those of the process.
        """
        merged: dict[str, dict[str, float]] = {}
        for part in gather_objects(_memory_here(spread=self.args.world_size == 1)):
            merged |= part
        return merged

    def print_memory_stats(self) -> None:
        """Tell the memory of every rank's device in one table, on the main process. Every rank has to call it."""
        usage = self.get_model_memory_usage()
        width = max(map(len, usage))
        lines = [
            f"  {name:<{width}}  {row['allocated']:9.2f}  {row['cached']:6.2f}  {row['max_allocated']:13.2f}"
            for name, row in usage.items()
        ]
        log.info("\n".join([f"memory in GiB\n  {'':<{width}}  allocated  cached  max_allocated", *lines]))


def _check_model(model: Any, config: MultiGPUConfig) -> None:
    spread = ranks.devices_of(model) if model is not None else 1
    if spread > 1 and (not config.auto_device_map or config.strategy in ("ddp", "fsdp")):
        raise ConflictError(
            f"the model is spread over {spread} devices, and the config wants it on one",
            where="MultiGPUConfig",
            hint="load it with device_map={'': 0}, or leave auto_device_map and strategy out",
        )
    if spread == 1 and config.strategy == "device_map":
        raise ConflictError(
            "strategy='device_map', and the model is on one device",
            where="MultiGPUConfig",
            hint="load it with device_map='balanced'",
        )
    if config.strategy in ("ddp", "device_map") and isinstance(model, nn.Module) and in_parts(model):
        raise ConflictError(
            f"strategy={config.strategy!r}, and the model was loaded in shards",
            where="MultiGPUConfig",
            hint="give the trainer strategy='fsdp' or no config at all, or load the model without multi_gpu_config",
        )


def _memory_here(*, spread: bool) -> dict[str, dict[str, float]]:
    device = get_device()
    if device.type not in ("cuda", "hip", "xpu"):
        resident = psutil.Process().memory_info().rss / _GIB
        peak = max(get_gpu_memory_stats()[1], resident)
        return {f"{device.type}_{get_rank()}": {"allocated": resident, "cached": resident, "max_allocated": peak}}
    backend = getattr(torch, device.torch_type)
    here = range(device.count) if spread else [device.index]
    return {
        f"gpu_{index if spread else get_rank()}": {
            "allocated": backend.memory_allocated(index) / _GIB,
            "cached": backend.memory_reserved(index) / _GIB,
            "max_allocated": backend.max_memory_allocated(index) / _GIB,
        }
        for index in here
    }

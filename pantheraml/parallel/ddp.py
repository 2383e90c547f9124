"""A copy of the model on each rank, gradients averaged: torch's DistributedDataParallel and what it should be told."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler

from ..device import get_device
from .config import MultiGPUConfig
from .ranks import get_rank, get_world_size, is_grouped

# Fields of a text configuration that say how many experts a token chooses from.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MIB = 2**20
# Up to here one message takes less time than the launches of several; larger ones are sent while backward goes on.
_ONE_BUCKET_MB = 32


def may_leave_weights_unused(model: nn.Module) -> bool:
    """Whether a step may not reach every trained weight: experts no token chose, or a tower that had no input."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    text = config.get_text_config()
    return text is not config or any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


def ddp_options(model: nn.Module, config: MultiGPUConfig | None = None) -> dict[str, Any]:
    """What ``DistributedDataParallel`` should be told about a model.

    Args:
        model: The model to train.
        config: ``find_unused_parameters=True`` holds; False decides by the model.

    Returns:
        ``find_unused_parameters``; ``broadcast_buffers``, which is for buffers that training changes; and
        ``bucket_cap_mb`` where the gradients are small enough to travel at once.
    """
    asked = config is not None and config.find_unused_parameters
    options: dict[str, Any] = {
        "find_unused_parameters": asked or may_leave_weights_unused(model),
        "broadcast_buffers": any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
    }
    size = -(-sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) // _MIB)
    if 0 < size <= _ONE_BUCKET_MB:
        options["bucket_cap_mb"] = size
    return options


def wrap_model_for_distributed(
    model: nn.Module, config: MultiGPUConfig | None = None, device_ids: list[int] | None = None
) -> nn.Module:
    """Wrap a model in ``DistributedDataParallel`` for a training loop of your own; trainers do it by themselves.

    Args:
        model: A model on this rank's device, with its adapters.
        config: Default ``MultiGPUConfig()``.
        device_ids: The one GPU of this rank; default the device of this process.

    Returns:
        The wrapped model; the model itself without a launch, and when it is wrapped already.
    """
    if not is_grouped() or get_world_size() == 1 or isinstance(model, DistributedDataParallel):
        return model
    device = get_device()
    if device_ids is None and device.is_gpu:
        device_ids = [device.index]
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, **ddp_options(model, config)
    )


def get_sampler_for_distributed(dataset: Dataset[Any], shuffle: bool = True) -> DistributedSampler[Any] | None:
    """A sampler that gives each rank its share of a data set; None without a launch.

    Call its ``set_epoch(epoch)`` before each epoch, or every epoch has the same order.

    Args:
        dataset: A data set with a length.
        shuffle: Whether the order is random, default True.
    """
    if get_world_size() == 1:
        return None
    return DistributedSampler(dataset, num_replicas=get_world_size(), rank=get_rank(), shuffle=shuffle)

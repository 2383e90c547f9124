"""Several GPUs, at the path that scripts import it from."""

from __future__ import annotations

from .parallel.config import MultiGPUConfig
from .parallel.ddp import get_sampler_for_distributed, wrap_model_for_distributed
from .parallel.device_map import create_device_map, get_optimal_device_map
from .parallel.process_group import (
    all_reduce_scalar,
    barrier,
    broadcast_object,
    cleanup_distributed_training,
    cleanup_multi_gpu,
    distributed_context,
    setup_distributed_training,
    setup_multi_gpu,
)
from .parallel.ranks import get_local_rank, get_rank, get_world_size, is_distributed_available, is_main_process

__all__ = [
    "MultiGPUConfig",
    "all_reduce_scalar",
    "barrier",
    "broadcast_object",
    "cleanup_distributed_training",
    "cleanup_multi_gpu",
    "create_device_map",
    "distributed_context",
    "get_local_rank",
    "get_optimal_device_map",
    "get_rank",
    "get_sampler_for_distributed",
    "get_world_size",
    "is_distributed_available",
    "is_main_process",
    "setup_distributed_training",
    "setup_multi_gpu",
    "wrap_model_for_distributed",
]

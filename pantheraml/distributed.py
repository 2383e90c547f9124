"""Several GPUs or TPU cores, at the path that scripts import it from."""

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
from .parallel.xla import (
    MultiTPUConfig,
    cleanup_multi_tpu,
    cleanup_tpu_training,
    get_tpu_device,
    get_tpu_memory_info,
    get_tpu_rank,
    get_tpu_status,
    get_tpu_world_size,
    is_tpu_available,
    is_tpu_main_process,
    optimize_tpu_memory,
    setup_multi_tpu,
    setup_tpu_training,
    synchronize_tpu,
    tpu_context,
)

__all__ = [
    "MultiGPUConfig",
    "MultiTPUConfig",
    "all_reduce_scalar",
    "barrier",
    "broadcast_object",
    "cleanup_distributed_training",
    "cleanup_multi_gpu",
    "cleanup_multi_tpu",
    "cleanup_tpu_training",
    "create_device_map",
    "distributed_context",
    "get_local_rank",
    "get_optimal_device_map",
    "get_rank",
    "get_sampler_for_distributed",
    "get_tpu_device",
    "get_tpu_memory_info",
    "get_tpu_rank",
    "get_tpu_status",
    "get_tpu_world_size",
    "get_world_size",
    "is_distributed_available",
    "is_main_process",
    "is_tpu_available",
    "is_tpu_main_process",
    "optimize_tpu_memory",
    "setup_distributed_training",
    "setup_multi_gpu",
    "setup_multi_tpu",
    "setup_tpu_training",
    "synchronize_tpu",
    "tpu_context",
    "wrap_model_for_distributed",
]

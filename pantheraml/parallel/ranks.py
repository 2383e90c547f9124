"""Which of the processes of a launch this one is: what torch.distributed says once it runs, else the launcher."""

from __future__ import annotations

import torch.distributed as dist

from .. import env


def is_distributed_available() -> bool:
    """Whether this torch can connect processes (with NCCL, or with Gloo on a CPU)."""
    return dist.is_available()


def is_grouped() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number among all processes of the launch, from 0; 0 without a launch."""
    return dist.get_rank() if is_grouped() else env.rank()


def get_world_size() -> int:
    """Number of processes of the launch, 1 without one."""
    return dist.get_world_size() if is_grouped() else env.world_size()


def get_local_rank() -> int:
    """This process's number on its host, which is the index of its device; 0 without a launch."""
    return env.local_rank()


def is_main_process() -> bool:
    """Whether this is the process that logs and saves: rank 0."""
    return get_rank() == 0

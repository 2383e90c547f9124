"""Start a Python module in several processes of this host, by torchrun's own interface."""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .. import env, log
from ..device import get_device
from ..errors import ConfigError, UnsupportedError

AUTO = "auto"
# What shells add to the number of a signal that ended a process.
_SIGNALLED = 128


def processes_for(gpus: int | str) -> int:
    """How many processes a wish for GPUs means on this host.

    Args:
        gpus: A number, or ``"auto"`` for every GPU that this process sees.

    Returns:
        The number of processes, 1 for none besides this one.

    Raises:
        ConfigError: there are fewer GPUs.
        UnsupportedError: there is no GPU, and CPU ranks were not asked for by ``PANTHERAML_DEVICE=cpu``.
    """
    device = get_device()
    if gpus == AUTO:
        return device.count if device.is_gpu else 1
    count = int(gpus)
    if count == 1:
        return 1
    if not device.is_gpu and not (device.type == "cpu" and env.device() == "cpu"):
        raise UnsupportedError(
            f"{count} GPUs were asked for, and this machine computes on {device.type}",
            hint="leave --gpus out; PANTHERAML_DEVICE=cpu tries several processes out on a CPU",
        )
    if device.is_gpu and count > device.count:
        raise ConfigError(
            f"{count} GPUs were asked for, and this process sees {device.count}",
            hint=f"give {device.count}, or 'auto'; CUDA_VISIBLE_DEVICES may hide the others",
        )
    return count


def launch_module(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m module arguments`` in several processes of one process group, and wait for them.

    When one ends with an error the others are stopped.

    Args:
        module: A module that runs as a program.
        arguments: Its arguments.
        processes: How many processes.

    Returns:
        0, or the exit code of the process that failed first (128 and the signal's number for one that was killed).
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else _SIGNALLED - failure.exitcode
        log.warning(f"rank {rank} of {processes} ended with exit code {code}, and the others were stopped")
        return code
    except SignalException as stopped:
        if stopped.sigval is signal.SIGINT:
            raise KeyboardInterrupt from stopped
        return _SIGNALLED + int(stopped.sigval)
    return 0

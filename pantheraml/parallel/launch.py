"""Start a Python module or a function in several processes of this host, by torchrun's own interface."""

from __future__ import annotations

import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dill
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .. import env, log
from ..device import get_device
from ..errors import ConfigError, RankError, UnsupportedError
from .called import CALL, FAILURE, RESULT

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


def launch(function: Callable[..., Any], num_gpus: int | str = AUTO, /, *args: Any, **kwargs: Any) -> Any:
    """Run a function in one process for each GPU of this host, from a notebook or a script, and wait for it.

    Each process is a fresh interpreter and a rank of one launch, so the function imports what it needs, loads its model
    and trains, as a script under torchrun would. It may be defined in a notebook; what it refers to travels with it.

    Args:
        function: What every rank runs.
        num_gpus: How many GPUs, or ``"auto"`` (default) for all that this process sees. With 1 the function is called
            here.
        *args: For the function; they have to be picklable.
        **kwargs: Likewise.

    Returns:
        What the function returned on rank 0, which has to be picklable.

    Raises:
        ConfigError: there are fewer GPUs, or this process is a rank of a launch itself.
        RankError: a rank failed.
    """
    if env.world_size() > 1:
        raise ConfigError(
            "launch() was called in a process of a launch",
            where="launch",
            hint="call the function itself under torchrun",
        )
    processes = processes_for(num_gpus)
    if processes == 1:
        return function(*args, **kwargs)
    # Of this process's own making and for its own children, in a folder that only this user can read.
    with tempfile.TemporaryDirectory(prefix="pantheraml-launch-") as folder:
        path = Path(folder)
        with (path / CALL).open("wb") as file:
            # By value, as the ranks cannot import a notebook.
            dill.dump((function, args, kwargs), file, recurse=True)
        code = launch_module("pantheraml.parallel.called", [folder], processes)
        if code != 0:
            told = (path / FAILURE).read_text() if (path / FAILURE).exists() else None
            raise RankError(
                f"a rank of {processes} ended with exit code {code}",
                where=getattr(function, "__name__", "the function"),
                why=told,
                hint="its traceback is above",
            )
        with (path / RESULT).open("rb") as file:
            return dill.load(file)  # noqa: S301  (a rank that this process started wrote it)


def launch_module(module: str, arguments: Sequence[str], processes: int, *, max_restarts: int = 0) -> int:
    """Run ``python -m module arguments`` in several processes of one process group, and wait for them.

    When one ends with an error the others are stopped, and all start again as often as that is allowed.

    Args:
        module: A module that runs as a program.
        arguments: Its arguments.
        processes: How many processes.
        max_restarts: How often all are started again after a failure, default 0. Trainers then go on from the newest
            checkpoint of their output folder.

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
        max_restarts=max_restarts,
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

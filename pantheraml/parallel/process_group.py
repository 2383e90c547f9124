"""The process group of a launch: joined once, left once, and the few things that ranks say to one another directly."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions have the group of the moment of their import as a default, and would keep one from being destroyed.
import torch.distributed.nn.functional
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from .. import env
from ..device import Device, get_device
from ..errors import CommunicationError, ConfigError, ConflictError, UnsupportedError
from .config import DEFAULT_TIMEOUT_MINUTES, MultiGPUConfig
from .ranks import get_rank, get_world_size, is_distributed_available, is_grouped

T = TypeVar("T")

_BACKENDS = {"cuda": "nccl", "hip": "nccl", "xpu": "xccl"}
# Long work of one rank (tokenising, downloading) is waited for this long; a rank that died ends the launch sooner.
PATIENCE = datetime.timedelta(days=7)
_LOOK = datetime.timedelta(seconds=2)
_meetings = itertools.count()
# Of a group of Gloo's, which take the exchanges from one queue.
_GLOO_THREADS = 2
_joined = itertools.count()
# Where the ranks met, when the caller said so.
_address: str | None = None
# The group of all ranks, and that of theirs which exchanges host memory.
_host_groups: dict[Any, Any] = {}


def setup_distributed_training(config: MultiGPUConfig | None = None) -> MultiGPUConfig:
    """Join the process group of the launch. Without a launch, and when it is joined already, nothing more happens.

    Trainers do this by themselves; call it first to choose the backend, the address or the timeout.

    Args:
        config: The choices, default ``MultiGPUConfig()``.

    Returns:
        The config.

    Raises:
        ConfigError: ``num_gpus`` is another number than the launch has, or a rank has no GPU of its own.
        ConflictError: a group with another backend or address was joined already.
        UnsupportedError: this torch cannot do it.
        CommunicationError: the other ranks did not come in time.
    """
    global _address
    config = config or MultiGPUConfig()
    check_count(config)
    if env.world_size() == 1 and not is_grouped():
        return config
    if is_grouped():
        _adopt(config)
        return config
    if not is_distributed_available():
        raise UnsupportedError("this torch was built without torch.distributed", hint="install torch from PyPI")
    device = get_device()
    backend = config.backend or _BACKENDS.get(device.type, "gloo")
    check_local_device(device)
    if not dist.is_backend_available(backend):
        raise UnsupportedError(
            f"this torch has no backend {backend!r}", where="argument backend", hint="leave it out, or use 'gloo'"
        )
    if backend == "nccl" and not device.is_gpu:
        raise ConfigError(
            f"the backend 'nccl' connects GPUs, and this process computes on {device.type}",
            where="argument backend",
            hint="leave it out, or use 'gloo'",
        )
    if device.is_gpu:
        getattr(torch, device.torch_type).set_device(device.index)
    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    try:
        dist.init_process_group(
            backend,
            **_meeting_place(config.init_method, timeout),
            rank=env.rank(),
            world_size=env.world_size(),
            timeout=timeout,
            device_id=device.torch_device if backend == "nccl" else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError) as error:
        raise CommunicationError(
            f"rank {env.rank()} could not meet the other {env.world_size() - 1}",
            where=config.init_method or "the launcher's address (MASTER_ADDR and MASTER_PORT)",
            why=str(error).strip().splitlines()[0],
            hint="see that every rank was started and that the address can be reached",
        ) from error
    except ValueError as error:
        # torch says which of the launcher's variables is missing.
        raise ConfigError(
            "the ranks do not know where to meet",
            why=str(error).strip().splitlines()[0],
            hint="start with torchrun, or pass init_method='tcp://host:port'",
        ) from error
    _address = config.init_method
    return config


def _meeting_place(init_method: str | None, timeout: datetime.timedelta) -> dict[str, Any]:
    """Where the ranks meet, as ``init_process_group`` takes it.

    torchrun's ranks keep their store when they are started again and when they leave a group to join another, with the
    addresses of the former ones in it, which a rank would try to reach if it came before the others had written theirs.
    So every group gets keys of its own.
    """
    before = next(_joined)
    if before == 0 and (init_method is not None or env.restarts() == 0):
        return {"init_method": init_method or "env://"}
    store, _, _ = next(iter(rendezvous(init_method or "env://", env.rank(), env.world_size(), timeout=timeout)))
    return {"store": dist.PrefixStore(f"pantheraml/restart_{env.restarts()}/group_{before}", store)}


def join_after_restart() -> None:
    """Join the group before anything else does, where the launch was started again; see ``_meeting_place``."""
    if env.restarts() > 0:
        setup_distributed_training()


def cleanup_distributed_training() -> None:
    """Leave the process group; without one nothing happens."""
    _host_groups.clear()
    if is_grouped():
        dist.destroy_process_group()


setup_multi_gpu = setup_distributed_training
cleanup_multi_gpu = cleanup_distributed_training


@contextlib.contextmanager
def distributed_context(config: MultiGPUConfig | None = None) -> Iterator[MultiGPUConfig]:
    """Join the process group inside a ``with`` block, and leave it if it was joined there.

    Args:
        config: As for ``setup_distributed_training``.

    Yields:
        The config.
    """
    was_grouped = is_grouped()
    yield setup_distributed_training(config)
    if not was_grouped:
        # Not after an exception: ranks that still wait for this one would be waited for in turn.
        cleanup_distributed_training()


def check_count(config: MultiGPUConfig) -> None:
    """Refuse ``num_gpus`` or a strategy that the launch does not have.

    Raises:
        ConfigError: the number of processes is another one.
        ConflictError: the strategy needs a launch, or does without one.
    """
    ranks = get_world_size()
    if config.strategy == "device_map" and ranks > 1:
        raise ConflictError(
            f"strategy='device_map' is for one process, and this launch has {ranks}",
            where="MultiGPUConfig",
            hint="start the script with plain python, or use strategy='ddp' or 'fsdp'",
        )
    if config.strategy in ("ddp", "fsdp") and ranks == 1:
        raise ConflictError(
            f"strategy={config.strategy!r} takes one process for each GPU, and this is a single process",
            where="MultiGPUConfig",
            hint=launch_hint(config.num_gpus or get_device().count),
        )
    single = ranks == 1 and config.strategy == "device_map"
    found = get_device().count if single else ranks
    if config.num_gpus is not None and config.num_gpus != found:
        raise ConfigError(
            f"num_gpus={config.num_gpus}, and this {'process sees' if single else 'launch has'} {found}",
            where="MultiGPUConfig",
            hint=launch_hint(config.num_gpus),
        )


def launch_hint(processes: int) -> str:
    """The command that uses ``processes`` devices."""
    return f"torchrun --nproc_per_node={max(processes, 2)} {sys.argv[0] or 'script.py'}"


def check_local_device(device: Device) -> None:
    """Refuse two ranks on one GPU.

    Raises:
        ConfigError: this rank's number on its host is beyond the host's GPUs.
    """
    if device.is_gpu and env.local_rank() >= device.count:
        raise ConfigError(
            f"local rank {env.local_rank()} has no GPU: the process sees {device.count}",
            where=f"rank {env.rank()} of {env.world_size()}",
            hint="start as many processes on a host as it has GPUs",
        )


def _adopt(config: MultiGPUConfig) -> None:
    """Apply to a group that was joined already what can still be applied; refuse the rest."""
    joined = dist.get_backend()
    hint = "call setup_distributed_training(config) before anything else, the training arguments included"
    if config.backend is not None and config.backend not in joined:
        raise ConflictError(
            f"backend={config.backend!r}, and the ranks are connected by {joined!r} already",
            where="MultiGPUConfig",
            hint=hint,
        )
    if config.init_method not in (None, _address):
        raise ConflictError(
            f"init_method={config.init_method!r}, and the ranks have met elsewhere already",
            where="MultiGPUConfig",
            hint=hint,
        )
    if config.timeout_minutes != DEFAULT_TIMEOUT_MINUTES:
        # Not public, and the only way to change it; torch's own device meshes do the same.
        for group in (None, *_host_groups.values()):
            distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=config.timeout_minutes), group)


def barrier() -> None:
    """Wait until every rank is here; without a launch nothing happens."""
    if is_grouped() and dist.get_world_size() > 1:
        dist.barrier()


def meet(*, patience: datetime.timedelta = PATIENCE) -> None:
    """Wait until every rank is here, however long the slowest one takes.

    A barrier is a collective and ends with the group's timeout, which is for hangs. This one only looks at the ranks'
    common store, so that work whose length nobody knows (tokenising, downloading) can come before it.

    Raises:
        CommunicationError: a rank failed meanwhile.
    """
    if not is_grouped() or dist.get_world_size() == 1:
        return
    number = next(_meetings)
    store = _store()
    key = f"pantheraml/meeting/{number}"
    if store.add(key, 1) == dist.get_world_size():
        store.set(f"{key}/open", b"1")
    _wait(f"{key}/open", patience)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run a block on the main process, then on the others, however long it takes.

    What the main process leaves in a cache the others find there, and no two write to it at a time.

    Raises:
        CommunicationError: a rank failed meanwhile.
    """
    if not is_grouped() or dist.get_world_size() == 1:
        yield
        return
    key = f"pantheraml/first/{next(_meetings)}"
    if get_rank() == 0:
        yield
        _store().set(key, b"1")
    else:
        _wait(key, PATIENCE)
        yield
    meet()


def _wait(key: str, patience: datetime.timedelta) -> None:
    """Wait for a key of the store, and look now and then whether it can still come."""
    end = time.monotonic() + patience.total_seconds()
    while True:
        try:
            _store().wait([key], min(_LOOK, datetime.timedelta(seconds=max(0.001, end - time.monotonic()))))
            return
        except dist.DistNetworkError as error:
            raise _left_alone("the main process has gone") from error
        except dist.DistStoreError:
            if some_rank_failed():
                raise _left_alone("another rank failed") from None
            if time.monotonic() >= end:
                raise


def _left_alone(what: str) -> CommunicationError:
    return CommunicationError(
        f"{what} while this one waited for it",
        where=f"rank {get_rank()} of {dist.get_world_size()}",
        hint="its own message, in the log of the launch, says why",
    )


def _store() -> Any:
    return distributed_c10d._get_default_store()


def broadcast_object(obj: T, src: int = 0) -> T:
    """Give every rank the object of rank ``src``; without a launch, the object itself.

    Objects travel pickled, between processes of one launch that trust one another.

    Args:
        obj: Any object that can be pickled; those of other ranks than ``src`` are not looked at.
        src: The rank whose object is taken, default 0.
    """
    if not is_grouped() or dist.get_world_size() == 1:
        return obj
    held = [obj]
    dist.broadcast_object_list(held, src=src, device=_carrier())
    return held[0]


def gather_objects(obj: T) -> list[T]:
    """The objects of all ranks, in the order of the ranks, on every rank."""
    if not is_grouped() or dist.get_world_size() == 1:
        return [obj]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, obj)
    return held


def tell_number(name: str, number: float) -> list[float]:
    """Put a number where all ranks see it, and look at what they have put there; nobody waits for anybody.

    Args:
        name: What the number is.
        number: This rank's.

    Returns:
        On the main process the last number of every rank, in their order, once all have told one; else nothing.
    """
    if not is_grouped() or dist.get_world_size() == 1:
        return [number]
    try:
        store, keys = _store(), [f"pantheraml/{name}/{rank}" for rank in range(dist.get_world_size())]
        store.set(keys[get_rank()], repr(number))
        return [float(store.get(key)) for key in keys] if get_rank() == 0 and store.check(keys) else []
    except (dist.DistStoreError, dist.DistNetworkError):  # the host of the store is gone
        return []


def all_reduce_scalar(scalar: float | torch.Tensor, average: bool = True) -> float:
    """The mean (or the sum) of a number over all ranks, in float64; without a launch, the number itself.

    Args:
        scalar: This rank's number.
        average: True (default) for the mean, False for the sum.
    """
    value = float(scalar)
    if not is_grouped() or dist.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_carrier())
    dist.all_reduce(total)
    return float(total) / (dist.get_world_size() if average else 1)


def all_reduce_sums(numbers: Sequence[float]) -> list[float]:
    """The sums of as many numbers over all ranks, in float64; without a launch, the numbers themselves."""
    if not is_grouped() or dist.get_world_size() == 1:
        return list(numbers)
    totals = torch.tensor(numbers, dtype=torch.float64, device=_carrier())
    dist.all_reduce(totals)
    return totals.tolist()


def _carrier() -> torch.device:
    """Where tensors have to be for the group's backend."""
    return get_device().torch_device if "gloo" not in dist.get_backend() else torch.device("cpu")


def host_group() -> Any:
    """All ranks, for exchanges of host memory, which wait for no device. All have to ask for it first at once."""
    world: Any = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()
        if "gloo" in dist.get_backend():
            _host_groups[world] = world
        else:
            # Not public, like what sets it.
            timeout = world._get_backend(get_device().torch_device).options._timeout
            _host_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _host_groups[world]


class _Ending:
    """How this process is about to end."""

    arranged = False
    failed = False


def leave_at_exit() -> None:
    """Leave the process group when the interpreter ends in peace. A second call is void."""
    if not _Ending.arranged:
        _Ending.arranged = True
        atexit.register(_leave)


def fail() -> None:
    """Note that this process ends with an error, so that it does not wait for the other ranks, nor they for it."""
    if not _Ending.failed:
        _Ending.failed = True
        _count_failures(1)


def go_on() -> None:
    """Take ``fail`` back: the error was caught, and this process begins something new."""
    if _Ending.failed:
        _Ending.failed = False
        _count_failures(-1)


def some_rank_failed() -> bool:
    """Whether a rank has called ``fail`` and did not go on; may be asked from any thread."""
    return _count_failures(0) > 0


def _count_failures(more: int) -> int:
    if not is_grouped() or dist.get_world_size() == 1:
        return 0
    try:
        return _store().add(_failure_key(), more)
    except (dist.DistStoreError, dist.DistNetworkError):  # the host of the store is gone
        return 1


def _failure_key() -> str:
    return f"pantheraml/failed/{env.restarts()}"


def _leave() -> None:
    # After an uncaught exception the others are still inside a collective: leaving would wait for them.
    if _Ending.failed or hasattr(sys, "last_value"):
        return
    # The main process may still be saving; the host of the store may be gone first when nobody is.
    try:
        meet()
        _settle()
    except CommunicationError as error:
        if not isinstance(error.__cause__, dist.DistNetworkError):
            return
    except (dist.DistStoreError, dist.DistNetworkError):
        pass
    cleanup_distributed_training()


def _settle() -> None:
    """Let Gloo's threads drop the tensors of the last exchanges, now that all ranks are here and say so at once.

    Models that a script still holds keep the group and its threads. A thread that had no time to drop a tensor would do
    so while the interpreter ends, when it can no longer take the interpreter's lock, and abort the process.
    """
    if not is_grouped():
        return
    world: Any = dist.group.WORLD
    for group in {*([world] if "gloo" in dist.get_backend() else []), *_host_groups.values()}:
        for _ in range(_GLOO_THREADS):
            dist.barrier(group)

"""torch_xla, and everything that PantheraML asks of it. No other module imports torch_xla.

One process drives all XLA devices of its host, and on a pod slice all hosts run the same program (SPMD: tensors are
global, the compiler divides them, see https://arxiv.org/abs/2105.04663). A successor of torch_xla replaces this file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'pantheraml[tpu]'"
# For each axis of a tensor the mesh axis that divides it, or several, or None for one that stays whole.
Spec = tuple[str | tuple[str, ...] | None, ...]


def is_installed() -> bool:
    """Whether torch_xla can be imported, without importing it."""
    return importlib.util.find_spec("torch_xla") is not None


def _module(name: str = "") -> Any:
    if not is_installed():
        raise MissingDependencyError(
            "training on a TPU needs the package 'torch_xla', which is not installed", hint=INSTALL
        )
    return importlib.import_module(f"torch_xla.{name}" if name else "torch_xla")


def chips() -> int:
    """TPU chips of this host, without starting them; 0 where torch_xla is not installed."""
    return _module("_internal.tpu").num_available_chips() if is_installed() else 0


@functools.cache
def start() -> None:
    """Start the devices: SPMD where there are several. Again changes nothing.

    It has to come before the first backward of the process, where autograd counts its devices.
    """
    runtime = _module("runtime")
    if runtime.global_runtime_device_count() > 1 and not runtime.is_spmd():
        runtime.use_spmd()
    _module().device()


def device() -> torch.device:
    """The device that tensors are placed on: the only one, or the one that stands for all."""
    start()
    return _module().device()


def kind() -> str:
    """``"TPU"``, or ``"CPU"`` for torch_xla's CPU backend, and so on."""
    return _module("runtime").device_type() or "CPU"


def device_count() -> int:
    """XLA devices of all hosts."""
    start()
    return _module("runtime").global_runtime_device_count()


def process_index() -> int:
    """Number of this host's process."""
    start()
    return _module("runtime").process_index()


def process_count() -> int:
    """Number of processes, one a host."""
    start()
    return _module("runtime").process_count()


# ---------------------------------------------------------------- execution


def sync(*, wait: bool = False) -> None:
    """Compile (where it is new) and start all operations noted so far.

    Args:
        wait: Whether to wait until they are done.
    """
    _module().sync(wait=wait)


def pending_program() -> bytes:
    """The operations noted so far as one program, an HLO protobuf, with the tensors that they make as outputs."""
    import gc

    import torch

    backend = _module()._XLAC
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    # What has its data already would only be handed through.
    pending = [
        tensor
        for tensor in tensors
        if tensor.device.type == "xla" and "\nXLAData: None" in backend._get_xla_tensor_debug_info(tensor)
    ]
    return backend._get_xla_tensors_hlo_proto(pending)


def read(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors in host memory: what they wait for runs, then all come in one transfer.

    Divided ones are put together on the host from the parts, where this process has all of them.
    """
    if not tensors:
        return []
    sync()
    backend = _module()._XLAC
    parts = [i for i, tensor in enumerate(tensors) if process_count() == 1 and sharding(tensor)]
    whole = [i for i in range(len(tensors)) if i not in set(parts)]
    copies: dict[int, torch.Tensor] = {}
    if whole:
        copies |= zip(whole, backend._xla_get_cpu_tensors([tensors[i].detach() for i in whole]), strict=True)
    if parts:
        given = [tensors[i] for i in parts]
        places = backend._get_local_shard_replica_and_indices(given)
        for i, shards, indices in zip(parts, backend._get_local_shards(given), places, strict=True):
            copies[i] = shards[0][0].new_empty(tensors[i].shape)
            for (data, _), (_, place) in zip(shards, indices, strict=True):
                # What a device has beyond its share is padding.
                share = ... if place is ... else tuple(slice(0, part.stop - part.start) for part in place)
                copies[i][... if place is ... else tuple(place)] = data[share]
    return [copies[i] for i in range(len(tensors))]


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Send a tensor to the device as data of the programs that use it.

    ``tensor.to(device)`` makes small numbers part of the program, which is then another one for each of them.
    """
    return _module("core.xla_model").send_cpu_data_to_device([tensor], device())[0]


@dataclass(frozen=True)
class Counters:
    """What the runtime did since the process began.

    Attributes:
        compilations: Programs compiled.
        executions: Programs run.
        host_reads: Transfers from the device to the host.
        fallbacks: Names of operations that ran on the host for want of a lowering.
    """

    compilations: int
    executions: int
    host_reads: int
    fallbacks: tuple[str, ...]


def counters() -> Counters:
    """Read the runtime's counters."""
    metrics = _module("debug.metrics")

    def count(*names: str) -> int:
        return sum((metrics.metric_data(name) or (0,))[0] for name in names)

    return Counters(
        compilations=count("CompileTime"),
        executions=count("ExecuteTime", "ExecuteReplicatedTime"),
        host_reads=count("TransferFromDeviceTime"),
        fallbacks=tuple(_module()._XLAC._get_executed_fallback_ops()),
    )


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function whose activations are computed again in the backward.

    Barriers keep the compiler from joining the recomputation with the forward, which would keep the activations.
    Dropout draws the same numbers both times. Reentrant: at least one positional argument must require a gradient.
    """
    status = _module("utils.checkpoint").chkpt_status

    def run(*inputs: Any) -> Any:
        global _recomputed
        before, _recomputed = _recomputed, inputs[0] if status.in_chkpt_bwd else None
        try:
            return function(*inputs)
        finally:
            _recomputed = before

    return _module("utils.checkpoint").checkpoint(run, *args, use_reentrant=True, preserve_rng_state=True)


_recomputed: torch.Tensor | None = None


def recomputed_input() -> torch.Tensor | None:
    """First argument of the function that ``checkpoint`` runs again now; None outside the backward."""
    return _recomputed


def seed(value: int) -> None:
    """Set the seed of random numbers on the devices, which is data of the programs. Each ``sync`` draws another."""
    _module("core.xla_model").set_rng_state(value)


def memory() -> dict[str, int] | None:
    """Bytes ``used``, ``limit`` and ``peak`` of this host's first device; None where the backend does not count."""
    try:
        figures = _module("core.xla_model").get_memory_info(device())
    except (RuntimeError, NotImplementedError):
        return None
    used = int(figures["bytes_used"])
    return {"used": used, "limit": int(figures["bytes_limit"]), "peak": int(figures.get("peak_bytes_used", used))}


# ---------------------------------------------------------------- Pallas

_ahead = False


def note_for_tpu() -> None:
    """From now on programs are noted for the TPU compiler, on a machine without a TPU: they cannot run here."""
    global _ahead
    import jax

    kernels = _module("experimental.custom_kernel")

    @functools.cache
    def lowered(kernel: Any, args: tuple[Any, ...], static: tuple[Any, ...], named: tuple[Any, ...]) -> str:
        numbers, names = static
        traced = jax.jit(kernel, static_argnums=numbers, static_argnames=names).trace(*args, **dict(named))
        # What is exported is written in a version that an older libtpu reads.
        options = jax._src.interpreters.mlir.LoweringParameters(for_export=True)
        ir = traced.lower(lowering_platforms=("tpu",), _private_parameters=options).compiler_ir()
        return kernels._extract_backend_config(ir)

    def trace_pallas(
        kernel: Any,
        *args: Any,
        static_argnums: Any = None,
        static_argnames: Any = None,
        use_cache: bool = False,
        **named: Any,
    ) -> tuple[str, list[Any]]:
        import torch

        static = tuple(None if names is None else tuple(names) for names in (static_argnums, static_argnames))
        shapes = tuple(kernels.to_jax_shape_dtype_struct(arg) if torch.is_tensor(arg) else arg for arg in args)
        payload = lowered(kernel, shapes, static, tuple(named.items()))
        return payload, [arg for arg in args if torch.is_tensor(arg)]

    # The original lowers for the platform that jax runs on here.
    kernels.trace_pallas = trace_pallas
    _ahead = True


def has_flash_attention() -> bool:
    """Whether programs may hold Pallas's flash attention, which only TPUs run."""
    return (_ahead or kind() == "TPU") and importlib.util.find_spec("jax") is not None


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
    mesh: Mesh,
    spec: Spec,
) -> torch.Tensor:
    """Causal attention within segments, by Pallas's kernel for TPUs, on each device for its part.

    Args:
        query: [B, N, T, D], T a multiple of the kernel's blocks.
        key: As ``query``.
        value: As ``query``.
        segments: [B, T] int32; tokens see those of their own number.
        scale: Of the scores.
        mesh: The devices.
        spec: How ``query`` is divided over them.

    Returns:
        [B, N, T, D].
    """
    divided = {"partition_spec": spec, "mesh": mesh._mesh} if device_count() > 1 else {}
    return _module("experimental.custom_kernel").flash_attention(
        query, key, value, True, segments, segments, scale, **divided
    )


# ---------------------------------------------------------------- sharding


@dataclass(frozen=True)
class Mesh:
    """All devices in a grid with named axes.

    Attributes:
        shape: Devices along each axis, by name.
    """

    shape: Mapping[str, int]

    def __post_init__(self) -> None:
        size = 1
        for count in self.shape.values():
            size *= count
        if size != device_count():
            raise ConfigError(f"a mesh of {dict(self.shape)} has {size} devices, and there are {device_count()}")

    @functools.cached_property
    def _mesh(self) -> Any:
        import numpy as np

        spmd = _module("distributed.spmd")
        shape = tuple(self.shape.values())
        return spmd.Mesh(np.arange(device_count()), shape, tuple(self.shape))

    def shard(self, tensor: torch.Tensor, spec: Spec) -> None:
        """Divide a tensor over the devices, in place: one that is still on the host is sent in parts.

        Args:
            tensor: On the device.
            spec: For each axis of the tensor the mesh axis that divides it, or None.
        """
        if device_count() > 1:
            spmd = _module("distributed.spmd")
            spmd.clear_sharding(tensor)
            spmd.mark_sharding(tensor, self._mesh, spec)

    def constrained(self, tensor: torch.Tensor, spec: Spec, *, after: torch.Tensor | None = None) -> torch.Tensor:
        """The same values, divided so at this point of the program.

        Args:
            tensor: On the device, or what an operation makes that is noted and has not run.
            spec: As for ``shard``.
            after: What has to be there before. The values are then not those of an earlier call for the same tensor,
                which would have to be kept until here, and do not come long before they are needed.
        """
        if device_count() == 1:
            return tensor
        copy = tensor.clone()
        if after is not None:
            _module("core.xla_model").optimization_barrier_([copy, after.detach().clone()])
        _module("distributed.spmd").annotate_custom_sharding(copy, self._mesh, spec)
        return copy

    def input_sharding(self, spec: Spec) -> Any:
        """How a loader divides batches; None on one device."""
        return _module("distributed.spmd").ShardingSpec(self._mesh, spec) if device_count() > 1 else None


def sharding(tensor: torch.Tensor) -> str:
    """How a tensor is divided, as the compiler writes it; empty for one that is whole everywhere."""
    text = _module()._XLAC._get_xla_sharding_spec(tensor)
    return "" if text == "{replicated}" else text

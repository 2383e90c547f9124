"""A model whose weights are sharded over the ranks: torch's FSDP2, one decoder layer a unit, and the whole model again.

A unit's weights are gathered before its forward and its backward and freed after each, so that a layer computes on
plain tensors like everywhere else, and holds ``DTensor`` parameters in between. What a plan of memory finds room for
stays gathered from the forward to the backward. 4-bit weights are sharded as the bytes they are; their scales, a
sixteenth of them or less, stay on every rank.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .._compat.fsdp import integers_allowed
from ..device import get_device
from ..errors import ConfigError, UnsupportedError
from .parts import FOUR_BIT, STATE, allow_use, gather, in_parts, store_four_bit_plainly
from .process_group import host_group, meet
from .ranks import get_rank, get_world_size

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GATHERING = "_pantheraml_gathering"
# Of which the rate of gathering is measured at most: larger messages are not faster.
_MEASURED_BYTES = 256 * 2**20


def is_sharded(model: Any) -> bool:
    """Whether ``shard`` (or ``fully_shard``) was applied to a model as a whole."""
    return isinstance(model, FSDPModule)


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool | None = None,
    offload: OffloadPolicy | None = None,
    shard_size: int | None = None,
) -> None:
    """Shard a model over the ranks, in place. Every rank has to call it with the same weights.

    A model that was loaded in parts becomes whole a unit at a time.

    Args:
        model: The outermost module, the one that will be called.
        layers: Its decoder layers, each of which becomes a unit; the embedding becomes one, and the rest.
        compute_dtype: Dtype in which weights are gathered and computed with, for float32 weights that train in mixed
            precision; None (default) leaves every weight in its own.
        reshard_after_forward: Whether a layer's weights are freed between forward and backward. Default None: they are
            unless a plan of memory, which ``gathering_of`` serves, has room for them.
        offload: Where the shards are kept, default on the device.
        shard_size: Number of neighbouring ranks that share one model, such as those of a host; the others hold copies
            of their shards. Default all.

    Raises:
        ConfigError: ``shard_size`` does not divide the number of ranks.
        UnsupportedError: a weight has a form that cannot be sharded.
    """
    # Nobody writes to what a layer returns, which torch warns of in every layer and on every rank.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    _check(model, layers)
    store_four_bit_plainly(model)
    mesh = _mesh(shard_size or get_world_size())
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(compute_dtype, _sum_dtype(model, compute_dtype)),
        **({} if offload is None else {"offload_policy": offload}),
    }
    within = options | {"reshard_after_forward": reshard_after_forward is not False}
    for layer in layers:
        gather([layer])
        _unit(layer, **within)
    first: list[Any] = []
    outermost: Any = model
    embedding, head = outermost.get_input_embeddings(), outermost.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if not tied and type(embedding) is nn.Embedding and embedding._parameters:
        gather([embedding])
        _unit(embedding, **within)
        # The gradient of a table does not depend on it.
        table: Any = embedding
        table.set_unshard_in_backward(False)
        first = [table]
    gather([model])
    _unit(model, **options)
    allow_use(model)
    units: list[Any] = [model, *first, *layers]
    for unit, following in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    if reshard_after_forward is None and layers:
        _serve_plan(model, layers, compute_dtype, mesh, offloaded=offload is not None)


def _sum_dtype(model: nn.Module, compute_dtype: torch.dtype | None) -> torch.dtype | None:
    """Dtype in which gradients are summed over the ranks, None for their own.

    Two ranks' gradients of bfloat16 weights make one sum, which is rounded once whatever it travels in; those of more,
    and float32 weights' that are computed with in 16 bits, are added in float32.
    """
    narrow = any(p.requires_grad and p.dtype is torch.float16 for p in model.parameters())
    return None if get_world_size() == 2 and compute_dtype is None and not narrow else torch.float32


def _unit(module: nn.Module, **options: Any) -> None:
    with integers_allowed():
        fully_shard(module, **options)


def _mesh(shard_size: int) -> DeviceMesh:
    ranks = get_world_size()
    if not 1 < shard_size <= ranks or ranks % shard_size:
        raise ConfigError(
            f"{ranks} ranks cannot be divided into groups of {shard_size}",
            where="shard_size",
            hint="give a divisor of the number of ranks over 1, or leave it out",
        )
    kind = get_device().torch_type
    if shard_size == ranks:
        return init_device_mesh(kind, (ranks,))
    return init_device_mesh(kind, (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _check(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    seen: set[nn.Parameter] = set()
    for layer in layers:
        own = set(layer.parameters())
        if own & seen:
            raise UnsupportedError(
                f"decoder layers of {type(model).__name__} share weights, which cannot be sharded",
                where=type(layer).__name__,
                why="each layer's weights are gathered and freed by themselves",
                hint="let every GPU hold a copy: strategy='ddp'",
            )
        seen |= own
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            # A stack of experts in 4 bits lies beside the module that reads it.
            described = any(getattr(item, STATE, None) is not None for item in (parameter, *owner.children()))
            _check_parameter(f"{path}.{name}", parameter, described)


def _check_parameter(name: str, parameter: nn.Parameter, is_four_bit: bool) -> None:
    kind = type(parameter)
    if isinstance(parameter, DTensor) or parameter.is_meta or is_four_bit:
        return
    if kind is not nn.Parameter or parameter.dtype not in _FLOATS:
        raise UnsupportedError(
            f"{name} is stored as {str(parameter.dtype).removeprefix('torch.')}, which cannot be sharded",
            where=kind.__name__,
            hint="load in 16 bits or with load_in_4bit=True, or let every GPU hold a copy: strategy='ddp'",
        )


# ---------------------------------------------------------------- for a plan of memory


class Gathering:
    """What a plan of memory has to know about the decoder layers' units, and what it may change.

    Whether a unit gathers its weights again is a matter of all ranks: they have to plan the same.

    Args:
        layers: The layers, while they are sharded.
        compute_dtype: Dtype in which float32 weights are gathered, or None for their own.
    """

    def __init__(self, layers: Sequence[nn.Module], compute_dtype: torch.dtype | None) -> None:
        self._bytes = {id(layer): _gathered_bytes(layer, compute_dtype) for layer in layers}
        self._rate = float("inf")
        self._kept: dict[int, Any] = {}

    def measure(self, mesh: DeviceMesh, *, offloaded: bool) -> None:
        """Find out how fast weights are gathered among the ranks of a mesh. All ranks have to call it."""
        self._rate = _rate_of_gathering(mesh, min(max(self._bytes.values()), _MEASURED_BYTES), offloaded=offloaded)

    def bytes_of(self, layer: nn.Module) -> int:
        """Bytes of a layer's gathered weights."""
        return self._bytes[id(layer)]

    def seconds_of(self, layer: nn.Module) -> float:
        """How long gathering a layer's weights takes where nothing else runs."""
        return self.bytes_of(layer) / self._rate

    def keep(self, layer: Any, kept: bool) -> None:
        """Let a layer's weights stay from the following forwards to their backward, or not."""
        if kept != (id(layer) in self._kept):
            layer.set_reshard_after_forward(not kept, recurse=False)
            if kept:
                self._kept[id(layer)] = layer
            else:
                del self._kept[id(layer)]

    def release(self) -> None:
        """Keep no layer's: no backward follows."""
        for layer in list(self._kept.values()):
            self.keep(layer, kept=False)

    def agree(self, numbers: Sequence[int], *, least: bool = False) -> list[int]:
        """The same numbers on all ranks: of each the largest, or the least, that one of them has."""
        return _agree(numbers, least=least)


def gathering_of(model: nn.Module) -> Gathering | None:
    """How the layers of a model gather their weights, where it was sharded and that was left to a plan; else None."""
    return model.__dict__.get(_GATHERING)


def _gathered_bytes(layer: nn.Module, compute_dtype: torch.dtype | None) -> int:
    sizes = (
        (p.numel(), p.element_size() if compute_dtype is None or not p.is_floating_point() else compute_dtype.itemsize)
        for p in layer.parameters()
        if isinstance(p, DTensor)
    )
    return sum(count * size for count, size in sizes)


def _serve_plan(
    model: nn.Module,
    layers: Sequence[nn.Module],
    compute_dtype: torch.dtype | None,
    mesh: DeviceMesh,
    *,
    offloaded: bool,
) -> None:
    gathering = model.__dict__[_GATHERING] = Gathering(layers, compute_dtype)
    gathering.measure(mesh, offloaded=offloaded)

    def before(*_: Any) -> None:
        if not torch.is_grad_enabled():
            gathering.release()

    model.register_forward_pre_hook(before)


def _rate_of_gathering(mesh: DeviceMesh, size: int, *, offloaded: bool) -> float:
    """Bytes a second of gathering ``size`` bytes as FSDP2 does: into one row, and from there to where they are used."""
    device = get_device()
    host_group()
    if not device.is_gpu:
        return float("inf")
    place, group = device.torch_device, mesh.get_group(mesh.ndim - 1)
    share = -(-size // group.size())
    held = torch.zeros(share, dtype=torch.uint8, pin_memory=True) if offloaded else None
    own = torch.zeros(share, dtype=torch.uint8, device=place)
    row = torch.empty(share * group.size(), dtype=torch.uint8, device=place)
    used = torch.empty_like(row)
    all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older than torch 2.13
    backend = getattr(torch, device.torch_type)
    begin, end = backend.Event(enable_timing=True), backend.Event(enable_timing=True)
    # The first time connects the ranks.
    for _ in range(2):
        begin.record()
        if held is not None:
            own.copy_(held, non_blocking=True)
        all_gather(row, own, group=group)
        used.copy_(row)
        end.record()
        end.synchronize()
    (slowest,) = _agree([int(begin.elapsed_time(end) * 1e6)])
    return len(row) / (slowest / 1e9)


def _agree(numbers: Sequence[int], *, least: bool = False) -> list[int]:
    facts = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(facts, dist.ReduceOp.MIN if least else dist.ReduceOp.MAX, group=host_group())
    return facts.tolist()


# ---------------------------------------------------------------- whole again


@contextlib.contextmanager
def whole(model: nn.Module, *, trained_only: bool = False) -> Iterator[bool]:
    """Inside, the model of rank 0 is an ordinary one in host memory; the other ranks wait for it. All have to enter.

    One weight at a time is gathered, so that no device ever holds the model. Afterwards everything is as before. A
    model that is not sharded is left alone, and no rank waits.

    Args:
        model: What ``shard`` was given, or a model in parts.
        trained_only: Whether only the weights that train are gathered, and embedding and head, which PEFT writes along
            with an adapter that they concern; the others stay shards, which nothing inside may read.

    Yields:
        Whether this rank has the whole model.
    """
    if not is_sharded(model) and not in_parts(model):
        yield True
        return
    units = reshard(model)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    written = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    host: dict[int, nn.Parameter] = {}
    for parameter in list(model.parameters()):
        if isinstance(parameter, DTensor):
            if trained_only and not parameter.requires_grad and id(parameter) not in written:
                continue
            full = _gathered(parameter)
        elif trained_only or parameter.device.type == "cpu":
            continue
        else:
            # A vector of a model in parts, or an adapter that was put on one: every rank has it whole.
            full = parameter.detach()
        if get_rank() == 0:
            host[id(parameter)] = nn.Parameter(full.to("cpu"), requires_grad=parameter.requires_grad)
    try:
        if get_rank() == 0:
            with _ordinary(model, units, host, with_buffers=not trained_only):
                yield True
        else:
            yield False
    finally:
        meet()


def reshard(model: nn.Module) -> list[Any]:
    """Free the gathered weights of every unit, and return the units; evaluation leaves those of the outermost."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    return units


def _gathered(parameter: DTensor) -> torch.Tensor:
    local: Any = parameter.detach()
    if local.device.type == "cpu" and get_device().is_gpu:
        # Offloaded shards; the ranks are connected by their GPUs.
        local = local.to(get_device().torch_device)
    return local.full_tensor()


@contextlib.contextmanager
def _ordinary(
    model: nn.Module, units: list[Any], host: dict[int, nn.Parameter], *, with_buffers: bool
) -> Iterator[None]:
    """Take FSDP's classes and hooks off the units and put the weights in ``host`` in place; undo it at the end."""
    undo: list[Callable[[], None]] = []

    def put(table: dict[Any, Any], key: Any, value: Any) -> None:
        before = table.get(key)
        undo.append(lambda: table.__setitem__(key, before))
        table[key] = value

    for module in model.modules():
        state = module.__dict__
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in host:
                put(module._parameters, name, host[id(parameter)])
        if with_buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    put(module._buffers, name, buffer.to("cpu"))
        if with_buffers and FOUR_BIT in state and state.get(STATE) is not None:
            moved = _to_host(state[STATE])
            put(state, STATE, moved)
            kind, described = state[FOUR_BIT]
            stored: Any = module._parameters["weight"]
            put(module._parameters, "weight", kind(stored.data, requires_grad=False, **{STATE: moved, **described}))
    for unit in units:
        sharded = unit.__class__

        def restore(unit: Any = unit, sharded: type = sharded) -> None:
            unit.__class__ = sharded

        undo.append(restore)
        unit.__class__ = sharded.__bases__[1]
        for name in _HOOKS:
            hooks = unit.__dict__[name]
            kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_fsdps(hook))
            put(unit.__dict__, name, kept)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _to_host(state: Any) -> Any:
    """A copy of a quantisation state in host memory."""
    copied = copy.deepcopy(state)
    copied.to("cpu")
    return copied


def _is_fsdps(hook: Any) -> bool:
    """Whether a hook is a method of FSDP's state."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")

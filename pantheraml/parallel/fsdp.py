"""A model whose weights are sharded over the ranks: torch's FSDP2, one decoder layer a unit, and the whole model again.

A unit's weights are gathered before its forward and its backward and freed after each, so that a layer computes on
plain tensors like everywhere else, and holds ``DTensor`` parameters in between. 4-bit weights are sharded as the bytes
they are; their scales, a sixteenth of them or less, stay on every rank.
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
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .._compat.fsdp import integers_allowed
from ..device import get_device
from ..errors import ConfigError, UnsupportedError
from .parts import FOUR_BIT, STATE, allow_use, gather, in_parts, store_four_bit_plainly
from .process_group import meet
from .ranks import get_rank, get_world_size

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_sharded(model: Any) -> bool:
    """Whether ``shard`` (or ``fully_shard``) was applied to a model as a whole."""
    return isinstance(model, FSDPModule)


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
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
        reshard_after_forward: Whether a layer's weights are freed between forward and backward, default True.
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
    options: dict[str, Any] = {
        "mesh": _mesh(shard_size or get_world_size()),
        # Gradients of 16-bit weights are summed over the ranks in float32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        **({} if offload is None else {"offload_policy": offload}),
    }
    for layer in layers:
        gather([layer])
        _unit(layer, reshard_after_forward=reshard_after_forward, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding.weight
    if not tied and type(embedding) is nn.Embedding and embedding._parameters:
        gather([embedding])
        _unit(embedding, reshard_after_forward=reshard_after_forward, **options)
    gather([model])
    _unit(model, **options)
    allow_use(model)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


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
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or parameter.is_meta:
            continue
        kind = type(parameter)
        four_bit = getattr(parameter, STATE, None) is not None
        if not four_bit and (kind is not nn.Parameter or parameter.dtype not in _FLOATS):
            raise UnsupportedError(
                f"{name} is stored as {str(parameter.dtype).removeprefix('torch.')}, which cannot be sharded",
                where=kind.__name__,
                hint="load in 16 bits or with load_in_4bit=True, or let every GPU hold a copy: strategy='ddp'",
            )


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
        if isinstance(parameter, DTensor) and (parameter.requires_grad or id(parameter) in written or not trained_only):
            full = _gathered(parameter)
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

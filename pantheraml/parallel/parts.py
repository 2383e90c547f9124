"""Weights of which each rank holds its rows, from loading until the trainer shards the model.

A part is a ``DTensor`` parameter with the shape, dtype and device of the weight, so that adapters are put on a model of
parts as on any other. Nothing is computed with it: ``fsdp.shard`` makes one decoder layer after another whole and
divides it among the ranks as torch's FSDP2 keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..device import get_device
from ..errors import UnsupportedError
from .ranks import get_rank, get_world_size

STATE = "quant_state"
FOUR_BIT = "_pantheraml_four_bit"
# The name of the mesh tells parts from the shards of FSDP, whose mesh has others or none, also after torch has made the
# parameters anew. To PEFT it says that a layer computes with the whole weight.
_MESH = ("fsdp",)
_GUARD = "_pantheraml_parts_guard"
# What bitsandbytes keeps on a 4-bit parameter besides its state.
_DESCRIPTION = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "module")


def is_part(parameter: Any) -> bool:
    """Whether this rank holds only its rows of a weight, and no trainer has sharded it."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == _MESH


def in_parts(model: nn.Module) -> bool:
    """Whether a model was loaded in parts and no trainer has sharded it."""
    return any(is_part(parameter) for parameter in model.parameters())


def store_four_bit_plainly(model: nn.Module) -> None:
    """Move the description of every 4-bit weight from the parameter, which FSDP replaces, to its layer."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, STATE, None)
        if weight is None or state is None or is_part(weight):
            continue
        module.__dict__[STATE] = state
        module.__dict__[FOUR_BIT] = type(weight), {n: getattr(weight, n, None) for n in _DESCRIPTION}
        # In evaluation bitsandbytes would rearrange the bytes for this CPU, in place.
        module.__dict__["support_avx512bf16_for_cpu"] = False
        module._parameters["weight"] = nn.Parameter(weight.data, requires_grad=False)


def mesh() -> DeviceMesh:
    """All ranks of the launch, among which weights are divided."""
    return init_device_mesh(get_device().torch_type, (get_world_size(),), mesh_dim_names=_MESH)


def divide(model: nn.Module, names: Iterable[str], ranks: DeviceMesh) -> None:
    """Keep this rank's rows of weights and let go of the others. Weights that modules share stay shared.

    Args:
        model: The model.
        names: Names of its parameters, which may be on the meta device. Those that are divided already let go of what
            they were cut from. Vectors are left, which take no room and which adaptation looks at.
        ranks: What ``mesh`` gave.
    """
    divided: dict[int, nn.Parameter] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        packed = owner._modules.get("parametrizations")
        if packed is not None and leaf in packed._modules:  # a stack of experts in 4 bits
            owner, leaf = packed.get_submodule(leaf), "original"
        parameter = owner._parameters.get(leaf)
        if parameter is None or parameter.dim() < 2:
            continue
        if id(parameter) not in divided:
            about = dict(vars(parameter))
            if isinstance(parameter, DTensor):
                rows: Any = parameter.to_local().detach()
                if rows.untyped_storage().nbytes() <= rows.nbytes:
                    continue
            else:
                if STATE in about:
                    store_four_bit_plainly(owner)
                start, count = _rows(len(parameter))
                rows = parameter.detach().as_subclass(torch.Tensor).contiguous()[start : start + count]
            divided[id(parameter)] = _part(parameter, rows.clone(), ranks)
            # Whoever asks the parameter how it is quantised finds it there as on a whole one.
            vars(divided[id(parameter)]).update(about)
        owner._parameters[leaf] = divided[id(parameter)]


def _part(whole: nn.Parameter, rows: torch.Tensor, ranks: DeviceMesh) -> nn.Parameter:
    # The shape is given since the rows need not divide evenly.
    stride = torch.empty(whole.shape, device="meta").stride()
    part = DTensor.from_local(rows, ranks, [Shard(0)], run_check=False, shape=whole.shape, stride=stride)
    return nn.Parameter(part, requires_grad=whole.requires_grad)


def _rows(count: int) -> tuple[int, int]:
    """The first of this rank's rows, and how many it has: as ``torch.chunk`` divides them, which FSDP2 does too."""
    share = -(-count // get_world_size())
    start = min(get_rank() * share, count)
    return start, min(share, count - start)


def row_of(weight: torch.Tensor, index: int) -> torch.Tensor | None:
    """One row of a weight, to be written to; None where another rank holds it."""
    if not isinstance(weight, DTensor):
        return weight[index]
    start, count = _rows(len(weight))
    return weight.to_local()[index - start] if start <= index < start + count else None


def gather(modules: Iterable[nn.Module], *, trained_only: bool = False) -> None:
    """Make the weights in ``modules`` whole on every rank, where they are parts. All ranks have to call it.

    Args:
        modules: The modules; weights that they share stay shared.
        trained_only: Whether frozen weights stay parts, default False.
    """
    gathered: dict[int, nn.Parameter] = {}
    for module in modules:
        for owner in module.modules():
            for name, part in list(owner._parameters.items()):
                if not isinstance(part, DTensor) or not is_part(part) or (trained_only and not part.requires_grad):
                    continue
                if id(part) not in gathered:
                    gathered[id(part)] = nn.Parameter(part.detach().full_tensor(), requires_grad=part.requires_grad)
                owner._parameters[name] = gathered[id(part)]


def forbid_use(model: nn.Module) -> None:
    """Let a call of a model in parts raise, with what to do instead."""

    def refuse(called: nn.Module, _: Any) -> None:
        if not in_parts(called):  # as while it is written whole
            return
        raise UnsupportedError(
            "the model is in shards, one on each rank, and cannot run before a trainer has put them to use",
            where=type(model).__name__,
            why="it was loaded with multi_gpu_config=MultiGPUConfig(strategy='fsdp')",
            hint="make a trainer of it first, and generate after that on all ranks at once, or load it whole",
        )

    model.__dict__[_GUARD] = model.register_forward_pre_hook(refuse)


def allow_use(model: nn.Module) -> None:
    """Undo ``forbid_use``."""
    for module in model.modules():
        guard = module.__dict__.pop(_GUARD, None)
        if guard is not None:
            guard.remove()

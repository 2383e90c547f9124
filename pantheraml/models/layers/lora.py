"""PEFT's LoRA layers through the fused projections, as long as they mean plain LoRA on a frozen base.

Whether they do is asked at every call, since adapters are enabled, disabled, switched, merged and put into evaluation
while a model lives. Dropout in training is drawn layer by layer. DoRA and other variants, mixed batches, trained bases
and hooked layers run PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ... import kernels
from ...kernels.fp8_linear import Fp8Weight, Nf4Fp8Weight
from ...kernels.projections import Adapter, Projection
from ...kernels.reference.nf4 import Quantized4Bit
from ..roles import plain_tensor
from .fp8 import Fp8Linear
from .slots import Swap, stock_forward, unhooked
from .step import is_step, known, project

_PACKED = "_pantheraml_quantized"
# Classes of 4-bit layers, by name because bitsandbytes is optional, and whether they multiply in fp8.
_FOUR_BIT = {"Linear4bit": False, "Linear4bitFp8": True}


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies ``x``: autocast's where it is on, else the input's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def untouched(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but its class's forward."""
    return "forward" not in layer.__dict__ and unhooked(layer)


def base_weight(
    layer: nn.Module, *, trained: bool = False
) -> torch.Tensor | Quantized4Bit | Fp8Weight | Nf4Fp8Weight | None:
    """The weight of a linear layer, dense, 4-bit or fp8; None for other kinds, and for a trained one unless asked."""
    weight = layer._parameters.get("weight")
    if weight is None or (weight.requires_grad and not trained) or not untouched(layer):
        return None
    if type(layer) is nn.Linear:
        return weight if plain_tensor(weight) else None
    if type(layer) is Fp8Linear:
        return layer.fp8_weight() if layer.is_fp8 else weight
    # A sharded model keeps the state on the layer; the weight is its plain bytes while the layer runs.
    state = getattr(weight, "quant_state", None) or (
        layer.__dict__.get("quant_state") if plain_tensor(weight) else None
    )
    in_fp8 = _FOUR_BIT.get(type(layer).__name__)
    if in_fp8 is None or state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    cached = layer.__dict__.get(_PACKED)
    # An address alone may have been freed and given to another weight in the meantime.
    if cached is None or cached[0] is not weight or cached[1] != weight.data_ptr():
        stored = Quantized4Bit.from_quant_state(weight.data, state)
        cached = (weight, weight.data_ptr(), Nf4Fp8Weight.of(stored) if in_fp8 else stored)
        layer.__dict__[_PACKED] = cached
    return cached[2]


def projection_of(
    module: nn.Module, x: torch.Tensor, *, trained: bool = False, dropout: float = 0.0
) -> Projection | None:
    """Describe a LoRA layer, or a plain linear layer, for the fused ops.

    Args:
        module: A child of an attention or MLP block.
        x: The input it is about to be given.
        trained: Whether base weights that require a gradient are served too. Default False.
        dropout: What the caller drops of the adapters' input. Default 0.

    Returns:
        The projection; None when the module has to run its own forward to keep its meaning.
    """
    return projections_of([module], x, trained=trained, dropout=dropout)[0]


def projections_of(
    modules: Sequence[nn.Module], x: torch.Tensor, *, trained: bool = False, dropout: float = 0.0
) -> list[Projection | None]:
    """``projection_of`` of several modules that are given such an input."""
    dtype, autocast = compute_dtype(x), torch.is_autocast_enabled(x.device.type)
    return [
        _adapted(module, dtype, autocast=autocast, trained=trained, dropout=dropout)
        # An embedding and a convolution under LoRA too: what they wrap is no linear layer.
        if "lora_A" in module._modules and "scaling" in module.__dict__
        else _plain(module, dtype, trained=trained)
        for module in modules
    ]


def _adapted(layer: Any, dtype: torch.dtype, *, autocast: bool, trained: bool, dropout: float) -> Projection | None:
    """A layer of PEFT's. Every step asks this of every layer, so modules are read below ``nn.Module.__getattr__``."""
    if layer.disable_adapters or layer.merged or not unhooked(layer):
        return None
    children = layer._modules
    base = children["base_layer"]
    weight = base_weight(base, trained=trained)
    if weight is None:
        return None
    every_A, every_B = children["lora_A"]._modules, children["lora_B"]._modules
    adapters = []
    for name in layer.active_adapters:
        if name not in every_A:
            continue
        A, B = every_A[name], every_B[name]
        if name in layer.lora_variant or _dropped(layer, name) != dropout:
            return None
        if type(A) is not nn.Linear or type(B) is not nn.Linear or not (untouched(A) and untouched(B)):
            return None
        (factor_A, bias_A), (factor_B, bias_B) = ((p["weight"], p["bias"]) for p in (A._parameters, B._parameters))
        if bias_A is not None or bias_B is not None or factor_A is None or factor_B is None:
            return None
        if not plain_tensor(factor_A) or not plain_tensor(factor_B):
            return None
        # Outside autocast PEFT computes the update in the adapter's own dtype.
        if not autocast and factor_A.dtype != dtype:
            return None
        adapters.append(Adapter(factor_A, factor_B, float(layer.scaling[name])))
    return Projection(weight, tuple(adapters), base._parameters.get("bias")) if adapters else None


def _dropped(layer: Any, adapter: str) -> float | None:
    """What a layer drops of an adapter's input now; None when that is no plain dropout."""
    if not layer.training:
        return 0.0
    dropout = layer._modules["lora_dropout"]._modules[adapter]
    if isinstance(dropout, nn.Identity):
        return 0.0
    return dropout.p if type(dropout) is nn.Dropout and dropout.p < 1 and untouched(dropout) else None


def _plain(module: nn.Module, dtype: torch.dtype, *, trained: bool) -> Projection | None:
    weight = base_weight(module, trained=trained)
    # Without autocast a frozen layer of another dtype raises in torch; that is for its own forward to say.
    if weight is None or weight.dtype != dtype:
        return None
    return Projection(weight, (), getattr(module, "bias", None))


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped LoRA layer: ``x [..., in_features]`` to ``[..., out_features]``."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return stock_forward(self, *args, **kwargs)
    step, dropout = is_step(x), 0.0
    projection = _known_projection(self, x) if step else projection_of(self, x)
    if projection is None and self.training:
        # Adapters that all drop the same share.
        dropout = next((_dropped(self, name) for name in self.active_adapters if name in self.lora_A), None) or 0.0
        projection = projection_of(self, x, dropout=dropout) if dropout else None
    if projection is None:
        return stock_forward(self, x)
    # A dropped share is for the op that draws it.
    if step and not dropout and (y := project(x.to(compute_dtype(x)), projection)) is not None:
        return y
    first, *more = projection.adapters
    return kernels.lora_linear(
        x.to(compute_dtype(x)),
        projection.weight,
        first.A,
        first.B,
        first.scaling,
        bias=projection.bias,
        adapters=more,
        dropout=dropout,
    )


def _known_projection(layer: Any, x: torch.Tensor) -> Projection | None:
    """The same as ``projection_of``, found out once where nobody changes weights meanwhile."""
    kept = known()
    if kept is None:
        return projection_of(layer, x)
    # Adapters may be switched off for a single step, such as to compare with the base model.
    names = tuple(layer.active_adapters)
    told = compute_dtype(x), layer.disable_adapters, layer.merged, names, unhooked(layer)
    before = kept.projections.get(id(layer))
    if before is not None and before[1] == told:
        return before[2]
    projection = projection_of(layer, x)
    if projection is not None:
        kept.projections[id(layer)] = layer, told, projection
    return projection


def adopt(module: Any) -> None:
    """Prepare a LoRA layer for a base in fp8, where it has one; see ``fp8_adapters.adopt``."""
    if isinstance(module.base_layer, Fp8Linear):
        from .fp8_adapters import adopt as prepare  # PEFT is loaded where there is a LoRA layer

        prepare(module)


def plan(module: Any) -> Swap | str:
    """Decide whether a LoRA layer can ever take the fused path.

    Args:
        module: A LoRA layer of PEFT.

    Returns:
        What to install, or why the module keeps its forward.
    """
    base = module.base_layer
    if type(base) not in (nn.Linear, Fp8Linear) and type(base).__name__ not in _FOUR_BIT:
        return f"no fused path for LoRA on {type(base).__name__}"
    return Swap("lora", "lora_linear", None, forward)

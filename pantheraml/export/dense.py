"""One module with its adapters merged in: a dense fp32 copy on which PEFT's own ``merge`` runs.

Every adapter type that PEFT can merge (LoRA, rsLoRA, DoRA, LoRA on embeddings or expert parameters, IA3, ...) so comes
out as PEFT defines it, and the model itself is never changed. Plain LoRA on a linear layer, of which models mostly
consist, gives the same bits some rows at a time, in buffers that are used again: all terms then stay in the processor's
cache, where whole ones cost ten times as long.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers.pytorch_utils import Conv1D

from ..checkpoint.safetensors_io import AHEAD
from ..errors import CheckpointError, UnsupportedError
from ..kernels import nf4_dequantize
from ..models import stacks
from ..models.layers.fp8 import Fp8Linear
from ..models.layers.fp8_adapters import LoraOnFp8

QUANTIZED_PARAMETERS = ("Params4bit", "Int8Params")  # bitsandbytes' classes, told by name: the package is optional
BLOCK = 1 << 20  # numbers merged at a time: 4 MB in fp32
# Put on instances by other tools, and by ours.
_METHODS = ("forward", "merge", "get_delta_weight", "get_param", "_activate_lora", "_old_forward", "_hf_hook")


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that is held quantised.

    Attributes:
        module: The module that holds it.
        shape: Shape of the dense weight as its checkpoint has it.
        transposed: Whether the module holds the transpose of the checkpoint's tensor (Conv1D).
        stack: Its name in the module where it stacks the experts of a mixture; None for the weight of a layer.
    """

    module: nn.Module
    shape: tuple[int, ...]
    transposed: bool
    stack: str | None = None

    def dequantize(self) -> torch.Tensor:
        """Return the dense weight in the checkpoint's orientation, on the module's device."""
        if self.stack is not None:
            return nf4_dequantize(stacks.held(self.module, self.stack))  # type: ignore[arg-type]
        weight: Any = self.module.weight
        if isinstance(self.module, Fp8Linear):
            return self.module.dense_weight(torch.float32)
        quant_state = getattr(weight, "quant_state", None)
        if getattr(quant_state, "packing_format_for_cpu", False):
            dense = _from_cpu_packing(weight.data, quant_state)
        elif quant_state is not None:
            dense = dequantize_bnb_weight(weight).detach()
        else:
            dense = _from_int8(self.module)
        return dense.T if self.transposed else dense


def _from_cpu_packing(packed: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """Dequantise the form into which bitsandbytes brings 4-bit weights in an evaluation forward on AVX512-BF16 CPUs.

    Its own dequantisation does not know that form, and undoing it is lossy there. Rows lie in blocks of 32; each byte
    holds, for one column pair, a row's nibble (low) and that of the row 16 further (high); block scales are transposed.
    """
    rows, columns = quant_state.shape
    halves = packed.reshape(-1, 32)
    nibbles = torch.cat([halves & 0xF, halves >> 4], dim=-1).reshape(rows // 32, columns // 2, 32, 2)
    indices = nibbles.transpose(1, 2).reshape(rows, columns)
    scales = quant_state.absmax.float().T.repeat_interleave(quant_state.blocksize, dim=1)
    return (quant_state.code.float()[indices.int()] * scales).to(quant_state.original_dtype)


def _from_int8(module: Any) -> torch.Tensor:
    """Dequantise LLM.int8() weights: one scale for each row, for the value 127."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * (scales.to(module.weight.device).float() / 127.0).unsqueeze(1)


def quantized_weight(module: nn.Module, parameter: Any) -> QuantizedWeight | None:
    """Describe ``parameter`` of ``module`` when it is held quantised, else None."""
    if isinstance(module, Fp8Linear) and parameter is module.weight and module.is_fp8:
        return QuantizedWeight(module, tuple(parameter.shape), False)
    if type(parameter).__name__ not in QUANTIZED_PARAMETERS:
        return None
    transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    state = getattr(parameter, "quant_state", None)
    shape = tuple(state.shape) if state is not None else tuple(parameter.shape)
    return QuantizedWeight(module, shape[::-1] if transposed else shape, transposed)


def quantized_stacks(module: nn.Module) -> dict[str, QuantizedWeight]:
    """The stacked experts of ``module`` that are held in 4 bits, by name."""
    return {
        name: QuantizedWeight(module, tuple(entry[0].quant_state.shape), False, name)
        for name, entry in stacks.four_bit(module).items()
    }


class Buffers:
    """Memory for one block after the other; to take it anew each time costs more than what is computed in it."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.Tensor] = {}
        self._turn = 0

    def take(self, role: str | int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the shape and on the device of ``like``; it is the same memory for the same ``role``."""
        key = (role, dtype, like.device)
        if key not in self._held or self._held[key].numel() < like.numel():
            self._held[key] = torch.empty(max(BLOCK, like.numel()), dtype=dtype, device=like.device)
        return self._held[key][: like.numel()].view(like.shape)

    def result(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor to hand on, which stays until ``AHEAD`` more were taken."""
        self._turn = (self._turn + 1) % (AHEAD + 1)
        return self.take(self._turn, like, dtype)


def pending(layer: Any) -> list[str]:
    """Active adapters of a PEFT layer that it holds and that are not merged into its base yet."""
    held = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in held and name not in layer.merged_adapters]


def touches(layer: Any) -> frozenset[str]:
    """Names of the base module's parameters that merging ``layer`` may change."""
    if _plain_lora(layer):
        return frozenset(["weight"])
    parameter = getattr(layer, "parameter_name", None)  # PEFT's ParamWrapper
    return frozenset(["weight", "bias"]) if parameter is None else frozenset([parameter])


def signature(layer: Any) -> tuple[Any, ...]:
    """What two adapter modules share when they apply the same change (tied trainable tokens)."""
    deltas = getattr(layer, "trainable_tokens_delta", None)
    return (id(layer if deltas is None else deltas), *pending(layer))


@torch.no_grad()
def merged_rows(
    module: nn.Module,
    layers: tuple[Any, ...],
    dense: Callable[[str, QuantizedWeight], torch.Tensor],
    buffers: Buffers,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Iterator[torch.Tensor] | None:
    """Merge plain LoRA into the weight of a linear layer some rows at a time.

    Args:
        module: As for ``merged_copy``, and so are the others.
        layers: PEFT layers around it.
        dense: Gives the dense form of a quantised parameter.
        buffers: Memory to compute in.
        dtype: Dtype of the rows.
        device: Where to compute.

    Returns:
        Blocks of rows one after the other, each there until ``AHEAD`` more were asked for; None where the layers are
        something else.
    """
    if len(layers) != 1 or not _plain_lora(layers[0]):
        return None
    weight: Any = module.weight
    quantized = quantized_weight(module, weight)
    if quantized is not None and quantized.transposed:
        return None
    base = weight.detach() if quantized is None else dense("weight", quantized)
    return _with_products(base.to(device or weight.device), layers[0], dtype, buffers)


@torch.no_grad()
def merged_copy(
    module: nn.Module,
    layers: tuple[Any, ...],
    dense: Callable[[str, QuantizedWeight], torch.Tensor],
    *,
    where: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Return the parameters of ``module`` that ``layers`` touch, with the active adapters merged in.

    Args:
        module: The innermost base module.
        layers: PEFT layers around it, outermost first.
        dense: Gives the dense form of a quantised parameter, by the parameter's name in ``module``.
        where: Name to give in errors.
        dtype: Dtype that the merged parameters are wanted in.
        device: Where to compute; None means where each parameter is.

    Returns:
        Tensors by parameter name, in the orientation of the checkpoint: in ``dtype``, rounded once from the fp32 sum,
        or still in fp32.

    Raises:
        UnsupportedError: PEFT has no merge for this adapter type.
        CheckpointError: PEFT's merge failed.
    """
    rows = merged_rows(module, layers, dense, Buffers(), dtype=dtype, device=device)
    if rows is not None:
        return {"weight": torch.cat([block.clone() for block in rows])}
    touched = frozenset().union(*map(touches, layers))
    parameters: dict[str, nn.Parameter | None] = {}
    transposed = False
    for key, quantized in quantized_stacks(module).items():
        if key in touched:
            tensor = dense(key, quantized)
            parameters[key] = _fp32(tensor, device or tensor.device)
    for key, parameter in module._parameters.items():
        if parameter is None or key not in touched:
            if parameter is None:
                parameters[key] = None
            continue
        quantized = quantized_weight(module, parameter)
        tensor = parameter if quantized is None else dense(key, quantized)
        if quantized is not None and quantized.transposed:
            transposed, tensor = True, tensor.T
        parameters[key] = _fp32(tensor, device or parameter.device)
    place = device or next((p.device for p in parameters.values() if p is not None), torch.device("cpu"))
    # A quantised Linear becomes a plain one: bitsandbytes' classes would quantise the merged weight again, and an fp8
    # one would look for its scales.
    foreign = any(kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__)
    kind = nn.Linear if foreign or isinstance(module, Fp8Linear) else type_before_parametrizations(module)
    base = _stand_in(module, kind, parameters, {})
    for layer in reversed(layers):
        modules = {
            name: base if name == "base_layer" else copy.deepcopy(child).to(place, torch.float32)
            for name, child in layer._modules.items()
            if child is not None
        }
        own = {name: None if p is None else _fp32(p, place) for name, p in layer._parameters.items()}
        clone = _stand_in(layer, _dense_kind(type(layer)), own, modules)
        clone.__dict__ |= {"merged_adapters": list(layer.merged_adapters), "_caches": {}}
        _run_merge(clone, pending(layer), where)
    merged = {key: tensor.data for key in touched if (tensor := parameters.get(key)) is not None}
    if transposed:
        merged["weight"] = merged["weight"].T
    return merged


def _plain_lora(layer: Any) -> bool:
    """Whether merging ``layer`` adds ``scaling * (B @ A)`` to the weight of a linear layer and does nothing else."""
    if _dense_kind(type(layer)) not in (LoraLinear, LoraOnFp8) or layer.fan_in_fan_out:
        return False
    return not any(name in layer.lora_variant or layer.lora_bias[name] for name in pending(layer))


def _with_products(weight: torch.Tensor, layer: Any, dtype: torch.dtype, buffers: Buffers) -> Iterator[torch.Tensor]:
    """``weight [out, in]`` and the pending products of a plain LoRA layer, summed in fp32 and rounded once."""
    terms = [
        (
            layer.lora_A[name].weight.detach().to(weight.device, torch.float32),
            layer.lora_B[name].weight.detach().to(weight.device, torch.float32),
            layer.scaling[name],
        )
        for name in pending(layer)
    ]
    rows, columns = weight.shape
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        block = weight[start : start + step]
        total, product = (buffers.take(role, block, torch.float32) for role in ("total", "product"))
        total.copy_(block)
        for A, B, scaling in terms:
            torch.mm(B[start : start + step], A, out=product)
            total += product.mul_(scaling)
        yield buffers.result(block, dtype).copy_(total)


def _run_merge(layer: Any, adapters: list[str], where: str) -> None:
    try:
        layer.merge(safe_merge=False, adapter_names=adapters)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        raise UnsupportedError(
            f"PEFT cannot merge {type(layer).__name__}", where=where, why=str(error), hint="use save_method='lora'"
        ) from error
    except (RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"PEFT could not merge {adapters}", where=where, why=str(error)) from error


def _stand_in(module: nn.Module, kind: type, parameters: dict[str, Any], modules: dict[str, Any]) -> Any:
    """An object of class ``kind`` with the settings of ``module``, other tensors, and no method put on the instance."""
    clone = object.__new__(kind)
    clone.__dict__ |= {key: value for key, value in vars(module).items() if key not in _METHODS}
    clone.__dict__ |= {"_parameters": parameters, "_modules": modules, "_buffers": dict(module._buffers)}
    return clone


def _dense_kind(kind: type) -> type:
    """The class of a PEFT layer over a dense base, for the class over a bitsandbytes one."""
    if not kind.__module__.endswith(".bnb"):
        return kind
    name = kind.__name__.removesuffix("8bitLt").removesuffix("4bit")
    dense = getattr(importlib.import_module(kind.__module__.removesuffix("bnb") + "layer"), name, None)
    if dense is None:
        raise UnsupportedError(f"no dense form of PEFT's {kind.__qualname__} is known", where=kind.__module__)
    return dense


def _fp32(tensor: torch.Tensor, device: torch.device) -> nn.Parameter:
    # A copy even when nothing changes: the merge writes into it.
    return nn.Parameter(tensor.detach().to(device, torch.float32, copy=True), requires_grad=False)

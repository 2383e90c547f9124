"""The state dict that the plain transformers model would have with all adapters merged in, computed entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.safetensors_io import TensorSpec
from ..errors import CheckpointError, ConflictError, UnsupportedError
from ..models import stacks
from ..models.layers.fp8 import Fp8Linear
from .dense import (
    BLOCK,
    Buffers,
    QuantizedWeight,
    merged_copy,
    merged_rows,
    pending,
    quantized_stacks,
    quantized_weight,
    signature,
    touches,
)

DenseSource = Callable[[str, QuantizedWeight], torch.Tensor]
_Source = tuple[Callable[[], torch.Tensor], Callable[[], Iterable[torch.Tensor]]]
_Merged = TypeVar("_Merged")


class NonFiniteWeightError(CheckpointError, ValueError):
    """A merged weight is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One entry of the merged model's state dict.

    Attributes:
        spec: Stock name in memory, shape, and the dtype to write.
        identity: Two entries with the same identity are one tensor (tied weights).
        layers: Names of the adapter modules that are merged into it.
        quantized: Set when the base is held quantised.
        value: Computes the tensor, in the dtype of ``spec``.
        pieces: Computes it in pieces, in row-major order, for ``write_sharded``.
    """

    spec: TensorSpec
    identity: tuple[Any, ...]
    layers: tuple[str, ...]
    quantized: QuantizedWeight | None
    value: Callable[[], torch.Tensor]
    pieces: Callable[[], Iterable[torch.Tensor]]


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside DDP and PEFT wrappers; adapters stay inside its modules.

    Raises:
        UnsupportedError: there is no transformers model in it, or its adapter is a prompt and not a weight.
    """
    while not isinstance(model, PreTrainedModel):
        for name, config in getattr(model, "peft_config", {}).items():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
                raise UnsupportedError(
                    f"the adapter {name!r} ({config.peft_type}) cannot be merged into weights",
                    where="argument model",
                    hint="use save_method='lora'",
                )
        modules = getattr(model, "_modules", {})
        inner = next((modules[name] for name in ("module", "base_model", "model") if name in modules), None)
        if inner is None:
            raise UnsupportedError(f"{type(model).__name__} holds no transformers model", where="argument model")
        model = inner
    return model


def is_quantized(base: nn.Module) -> bool:
    """Whether any weight of ``base`` is held quantised (by bitsandbytes, or in fp8)."""
    return any(
        quantized_stacks(module)
        or any(p is not None and quantized_weight(module, p) is not None for p in module._parameters.values())
        for module in base.modules()
    )


def adapter_modules(base: nn.Module) -> set[str]:
    """Names of all modules whose active adapters change what ``base`` computes."""
    return {
        name
        for name, module in base.named_modules()
        if (isinstance(module, ModulesToSaveWrapper) and _saved_adapter(module) is not None)
        or (isinstance(module, BaseTunerLayer) and pending(module))
    }


def stacked_experts(base: nn.Module) -> dict[str, int]:
    """How many numbers the parameters hold that stack the weights of all experts of a layer, by name."""
    return {
        f"{path}.{name}": torch.Size(shape).numel()
        for path, module in base.named_modules()
        if getattr(module, "num_experts", None)
        for name, shape in stacks.shapes(module).items()
    }


def _saved_adapter(wrapper: ModulesToSaveWrapper) -> str | None:
    return next((name for name in wrapper.active_adapters if name in wrapper.modules_to_save), None)


class MergedParameters:
    """Lists the parameters of a model with its adapters merged in; nothing is computed before it is asked for.

    Args:
        base: The transformers model, with adapters in its modules.
        dtype: Dtype to write; what transformers keeps in fp32 for this architecture, and is in fp32, stays.
        dense: Where the dense form of a quantised weight comes from, given the weight's name in memory.

    Attributes:
        entries: The parameters and persistent buffers by stock name in memory, in the model's order.
    """

    def __init__(self, base: PreTrainedModel, dtype: torch.dtype, dense: DenseSource) -> None:
        self._dtype = dtype
        self._dense = dense
        self._buffers = Buffers()
        self._recent: tuple[tuple[int, ...], dict[str, torch.Tensor]] | None = None
        self._fp32 = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            self._fp32 |= set(getattr(base, "_keep_in_fp32_modules", None) or ())
        self.entries = {entry.spec.name: entry for entry in self._visit(base, "", "", ())}

    def _visit(
        self, module: nn.Module, prefix: str, path: str, layers: tuple[tuple[str, Any], ...]
    ) -> Iterator[Parameter]:
        """Yield what is below ``module``: ``path`` is its name in the wrapped model, ``prefix`` its stock name."""
        if isinstance(module, ModulesToSaveWrapper):
            _refuse_disabled(module, path)
            adapter = _saved_adapter(module)
            inner = module.original_module if adapter is None else module.modules_to_save[adapter]
            yield from self._visit(inner, prefix, path, layers if adapter is None else (*layers, (path, module)))
            return
        if isinstance(module, TrainableTokensWrapper):
            yield from self._visit(module.token_adapter, prefix, f"{path}.token_adapter", layers)
            return
        if isinstance(module, BaseTunerLayer):
            _refuse_disabled(module, path)
            inner = module._modules["base_layer"]
            assert inner is not None
            # A nested wrapper is a child module with a name of its own.
            inner_path = f"{path}.base_layer" if isinstance(inner, BaseTunerLayer) else path
            yield from self._visit(inner, prefix, inner_path, (*layers, (path, module)) if pending(module) else layers)
            return
        yield from self._own(module, prefix, layers)
        saved = tuple(layer for layer in layers if isinstance(layer[1], ModulesToSaveWrapper))
        packed = quantized_stacks(module)
        for name, child in module.named_children():
            if not (packed and name == stacks.PARAMETRIZATIONS):
                yield from self._visit(child, f"{prefix}{name}.", f"{path}.{name}" if path else name, saved)

    def _own(self, module: nn.Module, prefix: str, layers: tuple[tuple[str, Any], ...]) -> Iterator[Parameter]:
        packed = quantized_stacks(module)
        own = {key: stacks.four_bit(module)[key].original for key in packed} | module._parameters
        for key, parameter in own.items():
            if parameter is None:
                continue
            name = f"{prefix}{key}"
            _require_whole(parameter, name)
            quantized = packed.get(key) or quantized_weight(module, parameter)
            if quantized is None and (not parameter.is_floating_point() or parameter.dtype.itemsize < 2):
                raise UnsupportedError(
                    f"a weight held as {parameter.dtype} cannot be merged", where=name, hint="load the model in 16 bit"
                )
            merging = tuple(
                layer for _, layer in layers if not isinstance(layer, ModulesToSaveWrapper) and key in touches(layer)
            )
            shape = tuple(parameter.shape) if quantized is None else quantized.shape
            dtype = self._target_dtype(name, parameter.dtype) if quantized is None else self._dtype
            spec = TensorSpec(name, shape, dtype)
            if merging:
                value, pieces = self._merged(module, prefix, key, merging, spec)
            else:
                value, pieces = self._plain(parameter, quantized, spec)
            identity = (id(parameter), *map(signature, merging))
            yield Parameter(spec, identity, tuple(path for path, _ in layers), quantized, value, pieces)
        scales = module.scale_name if isinstance(module, Fp8Linear) else None
        for key, buffer in module._buffers.items():
            if key != scales and buffer is not None and key not in module._non_persistent_buffers_set:
                name = f"{prefix}{key}"
                spec = TensorSpec(name, tuple(buffer.shape), self._target_dtype(name, buffer.dtype))
                value = _cast(buffer, spec.dtype)
                yield Parameter(spec, (id(buffer),), (), None, value, _as_one(value))

    def _target_dtype(self, name: str, current: torch.dtype) -> torch.dtype:
        if not current.is_floating_point or (current == torch.float32 and self._fp32.intersection(name.split("."))):
            return current
        return self._dtype

    def _plain(self, parameter: torch.Tensor, quantized: QuantizedWeight | None, spec: TensorSpec) -> _Source:
        def dense() -> torch.Tensor:
            return parameter.detach() if quantized is None else self._dense(spec.name, quantized)

        def value() -> torch.Tensor:
            return _finite(dense().to(spec.dtype), spec.name)

        def pieces() -> Iterator[torch.Tensor]:
            for piece in dense().reshape(-1).split(BLOCK):
                yield _finite(piece.to(spec.dtype), spec.name)

        return value, pieces

    def _merged(self, module: nn.Module, prefix: str, key: str, layers: tuple[Any, ...], spec: TensorSpec) -> _Source:
        identity = (id(module), *map(id, layers))

        def dense(key: str, quantized: QuantizedWeight) -> torch.Tensor:
            return self._dense(f"{prefix}{key}", quantized)

        def value() -> torch.Tensor:
            # A module's weight and bias are asked for one after the other and come from one merge.
            if self._recent is None or self._recent[0] != identity or key not in self._recent[1]:
                self._recent = None
                merged = _on_cpu_if_full(merged_copy, module, layers, dense, where=spec.name, dtype=spec.dtype)
                self._recent = (identity, merged)
            tensor = self._recent[1].pop(key)
            return _finite(tensor.to(spec.dtype), spec.name)

        def pieces() -> Iterator[torch.Tensor]:
            rows = _on_cpu_if_full(merged_rows, module, layers, dense, self._buffers, dtype=spec.dtype)
            if rows is None:
                yield value()
                return
            for block in rows:
                yield _finite(block, spec.name)

        return value, pieces


def _on_cpu_if_full(merge: Callable[..., _Merged], *arguments: Any, **options: Any) -> _Merged:
    """What ``merge`` gives, computed on the CPU where the device has no room for it."""
    try:
        return merge(*arguments, **options)
    except torch.OutOfMemoryError:
        return merge(*arguments, **options, device=torch.device("cpu"))


def _as_one(value: Callable[[], torch.Tensor]) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: (value(),)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: tensor.detach().to(dtype)


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    # The extremes hand NaN on, and take one pass where isfinite makes several tensors: a thirtieth of its time in bf16.
    if not tensor.numel() or not tensor.is_floating_point():
        return tensor
    # XLA has no aminmax: for it the whole weight would be read to the host.
    extremes = (tensor.amin(), tensor.amax()) if tensor.device.type == "xla" else tensor.aminmax()
    if not bool(torch.stack(extremes).isfinite().all()):
        raise NonFiniteWeightError(
            "a weight to be written is NaN or infinite",
            where=name,
            why=f"after the merge, in {tensor.dtype}",
            hint="training may have diverged; in float16 the value may only be too large: use dtype=torch.bfloat16",
        )
    return tensor


def _refuse_disabled(module: Any, path: str) -> None:
    if module.disable_adapters:
        raise ConflictError(
            "the adapters are disabled, so it is unclear whether they are to be merged",
            where=path,
            hint="call model.enable_adapters(), or leave the disable_adapter() block",
        )


def _require_whole(parameter: torch.Tensor, name: str) -> None:
    if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
        raise UnsupportedError(
            "the model is sharded over several devices, so one process does not hold its weights",
            where=name,
            hint="save the adapter or a full state dict, and merge it in a process that holds the whole model",
        )
    if parameter.device.type == "meta":
        raise UnsupportedError(
            "a weight is offloaded and not in memory", where=name, hint="load the model without offloading to merge it"
        )

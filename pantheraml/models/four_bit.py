"""Loading with bitsandbytes in 4 bits, with the stacked experts of a mixture, which its linear layers leave out.

transformers' own quantiser does the linear layers. A stack is handed over on its device as it arrives, one layer's at a
time, and only its 4-bit form stays. The quantiser is registered under a name of its own that no loaded model keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.quantizers.auto import AutoQuantizationConfig, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import log
from ..errors import CheckpointError, UnsupportedError
from ..kernels import nf4_dequantize
from ..kernels.reference.nf4 import Quantized4Bit
from . import stacks
from .roles import looks_like_experts
from .targets import linear_modules, passed_over

METHOD = "pantheraml_bitsandbytes_4bit"
# bitsandbytes counts the numbers of a weight in 32 bits.
_MOST = 2**31 - 1
# What a checkpoint holds of a stack in 4 bits besides its bytes, under its name.
_DESCRIPTION = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)
_WEIGHT = ".weight"


@register_quantization_config(METHOD)
class FourBitLoadingConfig(QuantizationConfigMixin):
    """Asks for the quantiser below; the loaded model gets ``settings``.

    Args:
        settings: What is asked of bitsandbytes, or the configuration of a checkpoint that is in 4 bits already.
    """

    def __init__(self, settings: BitsAndBytesConfig | dict[str, Any]) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.settings = AutoQuantizationConfig.from_dict(settings) if isinstance(settings, dict) else settings

    def get(self, name: str, default: Any = None) -> Any:
        """A field, as of the dict that transformers expects in a checkpoint's configuration."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return self.settings.to_dict()


class _Dequantize(Bnb4bitParametrization):
    """What stands between the bytes of a stack and who reads it as a tensor."""

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """The dense stack; bitsandbytes' own gives wrong numbers on a CPU for rows that are no whole blocks."""
        return nf4_dequantize(Quantized4Bit.from_quant_state(quantized_param, self.quant_state))

    def _apply(self, fn: Any, recurse: bool = True) -> _Dequantize:
        super()._apply(fn, recurse)
        # The bytes are a parameter, which moves with the model; their scales are none.
        state = self.quant_state
        state.to(fn(torch.empty(0, device=state.absmax.device)).device)
        return self


def _finish(module: Any, name: str) -> None:
    """Put the dequantisation above into a stack that bitsandbytes has just put into 4 bits."""
    entry = module.parametrizations[name]
    entry[0] = _Dequantize(entry[0].quant_state)
    # transformers would start it at random otherwise, as it does with what it did not load.
    module._is_hf_initialized = True


class _Operation(ConversionOps):
    """A step of a conversion that the quantiser below asks for."""

    def __init__(self, hf_quantizer: FourBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def held(self, given: dict[str, Any], model: Any, name: str, missing_keys: Any) -> dict[str, Any]:
        """Put the dense stack that is given into the model, or give it back where it is to be skipped."""
        if not self.hf_quantizer.takes(name):
            return given
        (stack,) = given.values()
        self.hf_quantizer.hold(name, get_module_from_name(model, name)[0], _one(stack), missing_keys)
        return {}


class _Quantize(_Operation):
    """Turns a dense weight of a linear layer, or a dense stack, into 4 bits."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Quantise the tensor of each name where it is; stacks are put into the model, and not returned."""
        rest = {}
        for name, value in input_dict.items():
            module, leaf = get_module_from_name(model, name)
            if leaf not in stacks.shapes(module):
                rest[name] = value
                continue
            self.hf_quantizer.hold(name, module, _one(value), missing_keys)
        stock = Bnb4bitQuantize(self.hf_quantizer)
        return stock.convert(rest, model=model, missing_keys=missing_keys, **options) if rest else {}


class _Deserialize(_Operation):
    """Puts a stack that a checkpoint has in 4 bits into the model."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Stacks are put into the model, dense ones in 4 bits, unless they are to be skipped."""
        if len(input_dict) == 1:
            return self.held(input_dict, model, full_layer_name, missing_keys)
        tensors = {name: _one(value) for name, value in input_dict.items()}
        module, leaf = get_module_from_name(model, full_layer_name)
        (stack,) = (name for name in tensors if name.endswith(leaf))
        packed = tensors.pop(stack)
        described = {name[name.index(f"{leaf}.") + len(leaf) + 1 :]: tensor for name, tensor in tensors.items()}
        module._parameters[leaf] = nn.Parameter(packed, requires_grad=False)
        replace_parameter_4bit_prequantized(module, leaf, described, packed.device)
        _finish(module, leaf)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class _Unpack(_Operation):
    """Makes the weights of single experts dense that a checkpoint has in 4 bits, each by itself."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        """Lists of dense weights, by the patterns of their names."""
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        result: dict[str, list[torch.Tensor]] = {}
        for pattern, weights in input_dict.items():
            if not pattern.endswith(_WEIGHT):
                continue
            parts = {
                name.removeprefix(f"{pattern}."): tensors
                for name, tensors in input_dict.items()
                if name.startswith(f"{pattern}.")
            }
            if any(len(tensors) != len(weights) for tensors in parts.values()):
                raise CheckpointError(
                    "the experts of a layer are stored in different forms", where=full_layer_name, hint="copy it again"
                )
            result[pattern] = [
                _unpacked(weight, {name: tensors[index] for name, tensors in parts.items()}, dtype)
                for index, weight in enumerate(weights)
            ]
        return result


def _unpacked(weight: torch.Tensor, described: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    if not described:
        return weight.to(dtype)
    state = QuantState.from_dict(described, device=weight.device)
    return nf4_dequantize(Quantized4Bit.from_quant_state(weight, state), dtype=dtype)


class _Hold(_Operation):
    """Takes a stack that was made of single experts into 4 bits."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Stacks are put into the model, unless they are to be skipped."""
        return self.held(input_dict, model, full_layer_name, missing_keys)


def _one(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


def _reads_4_bits(conversion: Any) -> bool:
    """Whether a conversion is there for weights that a checkpoint has in 4 bits."""
    return any(isinstance(step, _Deserialize | Bnb4bitDeserialize) for step in getattr(conversion, "operations", ()))


def _makes(conversion: Any, names: list[str]) -> bool:
    """Whether a conversion makes one of the parameters ``names``."""
    if not isinstance(conversion, WeightConverter):
        return False
    back = conversion.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in names)


@register_quantizer(METHOD)
class FourBitQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantiser of linear layers, which takes stacked experts too."""

    def __init__(self, quantization_config: FourBitLoadingConfig, **options: Any) -> None:
        super().__init__(quantization_config.settings, **options)
        # Names of the stacks to quantise; of a checkpoint that is in 4 bits, of those that may be in it.
        self._stacks: set[str] = set()
        self._order: dict[str, tuple[str, ...]] = {}
        self._files: Sequence[str] = ()
        # Conversions that were replaced by others, by these.
        self._replaced: dict[WeightConverter, WeightConverter] = {}

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **options: Any) -> None:
        """Put 4-bit layers into a model that is about to be loaded."""
        self._files = options.get("checkpoint_files") or ()
        super().preprocess_model(model, dtype=dtype, **options)

    def _convert_model_for_quantization(self, model: Any) -> None:
        # transformers takes the stacks of some families apart, as they were stored before they could be in 4 bits.
        leaves = {name for module in model.modules() if looks_like_experts(module) for name in stacks.shapes(module)}
        for file in (file for file in self._files if leaves and file.endswith(".safetensors")):
            with safe_open(file, framework="pt") as opened:
                stored = {name.removesuffix(".absmax").rpartition(".")[2] for name in opened.keys()}  # noqa: SIM118
            if leaves & stored:
                return
        super()._convert_model_for_quantization(model)

    def _leave_out_what_is_read(self, model: Any) -> None:
        """Skip the layers whose weights the family's code reads as they lie, and let the model's settings say so."""
        read = {".".join(name.split(".")[-2:]) for name in passed_over(model, linear_modules(model))}
        if self.pre_quantized or not read:
            return
        settings = copy.copy(self.quantization_config)
        skipped = self.get_modules_to_not_convert(model, settings.llm_int8_skip_modules)
        settings.llm_int8_skip_modules = sorted({*skipped, *read})
        self.quantization_config = settings
        log.once(f"4 bit: {type(model).__name__} reads the weights of {', '.join(sorted(read))}: they stay in 16 bit")

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        self._leave_out_what_is_read(model)
        super()._process_model_before_weight_loading(model, device_map, **options)
        for path, module in model.named_modules():
            if not looks_like_experts(module):
                continue
            self._order[path] = tuple(stacks.shapes(module))
            if not should_convert_module(path, self.modules_to_not_convert):
                continue
            for name, shape in stacks.shapes(module).items():
                if torch.Size(shape).numel() > _MOST:
                    raise UnsupportedError(
                        f"a stack of experts with {torch.Size(shape).numel():,} weights cannot be held in 4 bits",
                        where=f"{path}.{name}",
                        why=f"bitsandbytes counts up to {_MOST:,}",
                        hint="pass quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
                        'llm_int8_skip_modules=["experts", "lm_head"]) to keep experts in 16 bit',
                    )
                self._stacks.add(f"{path}.{name}")

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Whether ``param_name`` is the weight of a 4-bit layer, or a stack that is to be held in 4 bits."""
        stack = not self.pre_quantized and param_name in self._stacks
        return stack or super().param_needs_quantization(model, param_name, **options)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element of ``param`` once it is loaded."""
        return 0.5 if param_name in self._stacks else super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:  # type: ignore[override]
        """The operation that quantises."""
        return _Quantize(self)

    def update_weight_conversions(  # type: ignore[override]
        self, weight_conversions: list[Any], *model: Any
    ) -> list[Any]:
        """Let conversions that stack single experts read these from a checkpoint in 4 bits."""
        if self.pre_quantized:
            weight_conversions = [self._unpacking(conversion) for conversion in weight_conversions]
        return super().update_weight_conversions(weight_conversions, *model)

    def _unpacking(self, conversion: Any) -> Any:
        if not _makes(conversion, list(self._stacks)) or len(conversion.target_patterns) != 1:
            return conversion
        sources = conversion._original_source_patterns
        if not all(source.endswith(_WEIGHT) for source in sources):
            return conversion
        described = [f"{source}.{part}" for source in sources for part in _DESCRIPTION]
        # A name is matched by the first pattern that fits: those of whole weights come last.
        replaced = WeightConverter(
            [*described, *sources],
            list(conversion._original_target_patterns),
            operations=[_Unpack(self), *conversion.operations, _Hold(self)],
        )
        for scope in ("scope_prefix", "base_model_prefix"):
            if hasattr(conversion, scope):
                setattr(replaced, scope, getattr(conversion, scope))
        self._replaced[replaced] = conversion
        return replaced

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How weights in 4 bits are read from a checkpoint."""
        conversions = super().get_weight_conversions()
        if self.pre_quantized:
            names = {".".join(name.split(".")[-2:]) for name in self._stacks}
            conversions += [
                WeightConverter([*(f"{name}.{part}" for part in _DESCRIPTION), name], name, [_Deserialize(self)])
                for name in sorted(names)
            ]
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        for path, module in model.named_modules():
            lists = module._modules.get(stacks.PARAMETRIZATIONS)
            if lists is not None:
                # As the module defines them, not as they arrived: PEFT nests adapters in this order.
                due = [name for name in self._order.get(path, ()) if name in lists]
                lists._modules = {name: lists._modules[name] for name in due}
        packed = [f"{path}.{name}" for path, module in model.named_modules() for name in stacks.four_bit(module)]
        used = [self._replaced.get(conversion, conversion) for conversion in model._weight_conversions or ()]
        dense = [conversion for conversion in used if not _reads_4_bits(conversion)]
        object.__setattr__(model, stacks.DENSE_CONVERSIONS, dense)
        # What lies in 4 bits is saved as it is.
        model._weight_conversions = [conversion for conversion in dense if not _makes(conversion, packed)]
        return super()._process_model_after_weight_loading(model, **options)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in model.modules():
            for name in stacks.four_bit(module):
                dense = getattr(module, name)
                remove_parametrizations(module, name, leave_parametrized=False)
                module._parameters[name] = nn.Parameter(dense if dtype is None else dense.to(dtype), False)
        model._weight_conversions = getattr(model, stacks.DENSE_CONVERSIONS)
        return super()._dequantize(model, dtype)

    def takes(self, name: str) -> bool:
        """Whether the parameter ``name`` is a stack that is to be held in 4 bits."""
        return name in self._stacks

    def hold(self, name: str, module: nn.Module, stack: torch.Tensor, missing_keys: set[str] | None = None) -> None:
        """Put a dense stack into its module, in 4 bits."""
        leaf = name.rpartition(".")[2]
        settings: Any = self.quantization_config
        due: Any = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(stack.to(due.dtype).contiguous(), requires_grad=False)
        replace_parameter_4bit(
            module,
            leaf,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
        )
        _finish(module, leaf)
        if missing_keys is not None:
            missing_keys.discard(name)

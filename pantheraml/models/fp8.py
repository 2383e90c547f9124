"""Loading 16-bit checkpoints into fp8 linear layers, through transformers' own interface for quantisers.

transformers hands over each weight on its device as it arrives and takes back what is to be kept, so that no more than
one weight is ever held in both forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import log
from ..errors import UnsupportedError
from ..kernels.fp8 import MATMUL_MULTIPLE
from .layers.fp8 import Fp8Linear
from .targets import linear_modules, passed_over

METHOD = "pantheraml_fp8"


@register_quantization_config(METHOD)
class Fp8LoadingConfig(QuantizationConfigMixin):
    """How linear layers are brought into fp8 while a 16-bit checkpoint loads.

    Args:
        block: A scale a 128 x 128 tile instead of a row. Default False.
        compute_dtype: Dtype of products' results, or its name. Default bfloat16.
        modules_to_not_convert: Names of modules that stay as they are, besides head and tied weights. Default None.
    """

    def __init__(
        self,
        block: bool = False,
        compute_dtype: torch.dtype | str = torch.bfloat16,
        modules_to_not_convert: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.block = block
        self.compute_dtype = getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
        self.modules_to_not_convert = modules_to_not_convert

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {**vars(self), "compute_dtype": str(self.compute_dtype).removeprefix("torch.")}


class _Quantize(ConversionOps):
    """Turns one dense weight into what ``Fp8Linear`` holds."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Quantise the tensor of each name, where it is."""
        result = {}
        for name, value in input_dict.items():
            module, _leaf = get_module_from_name(model, name)
            prefix = name.rpartition(".")[0]
            made = module.quantize(value[0] if isinstance(value, list) else value)
            result |= {f"{prefix}.{key}": tensor for key, tensor in made.items()}
            # transformers would start the weight at random otherwise, as it does with those that it did not load.
            module._is_hf_initialized = True
        return result


@register_quantizer(METHOD)
class Fp8LoadingQuantizer(HfQuantizer):
    """Puts ``Fp8Linear`` in the place of the decoder's linear layers and fills them as weights arrive."""

    quantization_config: Any  # an Fp8LoadingConfig

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight."""
        return 1

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element of ``param`` once it is loaded."""
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether ``param_name`` is the weight of an fp8 layer."""
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, Fp8Linear) and leaf == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config: Fp8LoadingConfig = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        skipped += passed_over(model, linear_modules(model))
        converted, odd = replace_linears(model, config, skipped)
        if not converted:
            raise UnsupportedError(
                f"{type(model).__name__} has no linear layer that can be held in fp8",
                where="argument load_in_fp8",
                hint="load it in 16 bit",
            )
        if odd:
            log.info(f"{len(odd)} linear layers stay in 16 bit, their sides are no multiples of 16: {odd[0]} ...")
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantises."""
        return _Quantize(self)

    def is_serializable(self) -> bool:  # type: ignore[override]
        """Whether transformers may write the weights as they are: it may not, other programs would not read them."""
        return False

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Whether adapters on top can be trained."""
        return True


def _decoder_names(model: Any) -> str:
    """Prefix of the names below the text decoder; empty when that is the whole model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for name, module in model.named_modules():
        if module is decoder and name:
            return f"{name}."
    return ""


def replace_linears(model: Any, config: Fp8LoadingConfig, skipped: list[str]) -> tuple[list[str], list[str]]:
    """Put unfilled ``Fp8Linear`` modules in the place of linear layers.

    Args:
        model: A transformers model on the meta device.
        config: Kind of scales and compute dtype.
        skipped: Names and patterns of modules to leave alone.

    Returns:
        Names of the modules replaced, and of those whose sides are no multiples of 16.
    """
    prefix = _decoder_names(model)
    converted, odd = [], []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not name.startswith(prefix) or not should_convert_module(name, skipped):
            continue
        if module.in_features % MATMUL_MULTIPLE or module.out_features % MATMUL_MULTIPLE:
            odd.append(name)
            continue
        parent, leaf = get_module_from_name(model, name)
        layer = Fp8Linear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            block=config.block,
            compute_dtype=config.compute_dtype,
            device="meta",
        )
        parent._modules[leaf] = layer
        converted.append(name)
    return converted, odd

"""Fused operations with an eager reference for each. Names are imported on first use.

Every functional takes ``backend="auto" | "triton" | "reference"``. ``auto`` means the Triton kernel for a tensor on a
GPU and the eager reference everywhere else; an explicit request is honoured or raises (see ``dispatch.resolve``).
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adamw_8bit import adamw_8bit as adamw_8bit
    from .cross_entropy import cross_entropy as cross_entropy
    from .dispatch import resolve as resolve
    from .experts import experts_mlp as experts_mlp
    from .four_bit_stack import FourBitStack as FourBitStack
    from .fp8 import Fp8Matrix as Fp8Matrix
    from .fp8 import fp8_dequantize as fp8_dequantize
    from .fp8 import fp8_matmul as fp8_matmul
    from .fp8 import fp8_quantize_blocks as fp8_quantize_blocks
    from .fp8 import fp8_quantize_rows as fp8_quantize_rows
    from .fp8 import fp8_transpose as fp8_transpose
    from .fp8_linear import Fp8Weight as Fp8Weight
    from .fp8_linear import Nf4Fp8Weight as Nf4Fp8Weight
    from .fp8_linear import fp8_input_gradient as fp8_input_gradient
    from .fp8_linear import fp8_product as fp8_product
    from .glu import glu as glu
    from .glu import glu_fp8 as glu_fp8
    from .glu import packed_glu as packed_glu
    from .grouped_gemm import Stack as Stack
    from .grouped_gemm import grouped_gemm as grouped_gemm
    from .layer_norm import layer_norm as layer_norm
    from .linear_cross_entropy import LogProbs as LogProbs
    from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .linear_cross_entropy import linear_log_probs as linear_log_probs
    from .lora import Adapter as Adapter
    from .lora import Projection as Projection
    from .lora import lora_linear as lora_linear
    from .lora import lora_mlp as lora_mlp
    from .lora import lora_qkv as lora_qkv
    from .nf4 import nf4_dequantize as nf4_dequantize
    from .nf4_product import nf4_matvec as nf4_matvec
    from .qk_norm_rotary import qk_norm_rotary as qk_norm_rotary
    from .rms_norm import rms_norm as rms_norm
    from .rms_norm import rms_norm_fp8 as rms_norm_fp8
    from .rotary import rotary as rotary
    from .routing import Routing as Routing
    from .routing import permute as permute
    from .routing import route as route
    from .routing import unpermute as unpermute
    from .utils import clear_gpu_cache as clear_gpu_cache
    from .utils import get_current_gpu_index as get_current_gpu_index
    from .utils import get_device_memory_info as get_device_memory_info
    from .utils import get_gpu_memory_info as get_gpu_memory_info
    from .utils import get_tpu_memory_info as get_tpu_memory_info
    from .utils import optimize_tpu_memory as optimize_tpu_memory
    from .utils import set_gpu_device as set_gpu_device

# Public name -> module of this package that defines it.
_EXPORTS = {
    "resolve": "dispatch",
    "adamw_8bit": "adamw_8bit",
    "rms_norm": "rms_norm",
    "rms_norm_fp8": "rms_norm",
    "layer_norm": "layer_norm",
    "rotary": "rotary",
    "qk_norm_rotary": "qk_norm_rotary",
    "glu": "glu",
    "packed_glu": "glu",
    "glu_fp8": "glu",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_log_probs": "linear_cross_entropy",
    "LogProbs": "linear_cross_entropy",
    "lora_linear": "lora",
    "lora_qkv": "lora",
    "lora_mlp": "lora",
    "nf4_dequantize": "nf4",
    "grouped_gemm": "grouped_gemm",
    "nf4_matvec": "nf4_product",
    "Adapter": "lora",
    "Projection": "lora",
    "Fp8Matrix": "fp8",
    "fp8_quantize_rows": "fp8",
    "fp8_quantize_blocks": "fp8",
    "fp8_transpose": "fp8",
    "fp8_dequantize": "fp8",
    "fp8_matmul": "fp8",
    "Fp8Weight": "fp8_linear",
    "Nf4Fp8Weight": "fp8_linear",
    "fp8_product": "fp8_linear",
    "fp8_input_gradient": "fp8_linear",
    "Stack": "grouped_gemm",
    "FourBitStack": "four_bit_stack",
    "experts_mlp": "experts",
    "Routing": "routing",
    "route": "routing",
    "permute": "routing",
    "unpermute": "routing",
    "get_gpu_memory_info": "utils",
    "get_device_memory_info": "utils",
    "get_tpu_memory_info": "utils",
    "optimize_tpu_memory": "utils",
    "clear_gpu_cache": "utils",
    "get_current_gpu_index": "utils",
    "set_gpu_device": "utils",
}

__all__ = [*_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(types.ModuleType):
    """Some ops and modules share a name; as an attribute of this package such a name always means the op.

    Python binds a submodule to its parent after importing it, which is left out for these names.
    ``from pantheraml.kernels.glu import ...`` still reads the module itself.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in _EXPORTS):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

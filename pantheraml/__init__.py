"""PantheraML: fine-tune large language models through the API that Unsloth users know.

Names are imported on first use, so that ``import pantheraml`` costs nothing and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._compat import install_import_hooks

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .device import clear_gpu_memory as clear_gpu_memory
    from .device import get_gpu_memory_stats as get_gpu_memory_stats
    from .device import is_bfloat16_supported as is_bf16_supported  # noqa: F401
    from .device import is_bfloat16_supported as is_bfloat16_supported
    from .models.adapt import adapt as adapt
    from .models.adapt import restore as restore
    from .models.loader import FastLanguageModel as FastLanguageModel
    from .models.loader import FastModel as FastModel
    from .models.loader import FastTextModel as FastTextModel
    from .models.loader import FastVisionModel as FastVisionModel
    from .models.tokenizers import add_new_tokens as add_new_tokens
    from .trainer import PantheraMLTrainer as PantheraMLTrainer
    from .trainer import PantheraMLTrainingArguments as PantheraMLTrainingArguments
    from .trainer import UnslothTrainer as UnslothTrainer
    from .trainer import UnslothTrainingArguments as UnslothTrainingArguments

# Public name -> module that defines it (relative to this package), or (module, name) where they differ.
_EXPORTS: dict[str, str | tuple[str, str]] = {
    **dict.fromkeys(
        (
            "FastLanguageModel",
            "FastModel",
            "FastVisionModel",
            "FastTextModel",
            "FastLlamaModel",
            "FastMistralModel",
            "FastGemmaModel",
            "FastQwen2Model",
            "FastQwen3Model",
            "FastQwen3MoeModel",
            "FastGraniteModel",
            "FastFalconH1Model",
        ),
        "models.loader",
    ),
    **dict.fromkeys(("adapt", "restore", "AdaptReport"), "models.adapt"),
    "add_new_tokens": "models.tokenizers",
    **dict.fromkeys(
        (
            "PantheraMLTrainer",
            "PantheraMLTrainingArguments",
            "PantheraMLDistributedTrainer",
            "PantheraMLTPUTrainer",
            "pantheraml_train",
            "UnslothTrainer",
            "UnslothTrainingArguments",
            "unsloth_train",
            "PatchFastRL",
            "PatchDPOTrainer",
            "PatchKTOTrainer",
        ),
        "trainer",
    ),
    **dict.fromkeys(
        ("unsloth_save_model", "create_huggingface_repo", "print_quantization_methods", "patch_saving_functions"),
        "save",
    ),
    **dict.fromkeys(
        (
            "get_chat_template",
            "train_on_responses_only",
            "mask_non_responses",
            "assistant_masks",
            "to_sharegpt",
            "apply_chat_template",
            "standardize_sharegpt",
            "standardize_data_formats",
            "remove_special_tokens",
        ),
        "chat_templates",
    ),
    **dict.fromkeys(
        (
            "MultiGPUConfig",
            "setup_distributed_training",
            "cleanup_distributed_training",
            "setup_multi_gpu",
            "cleanup_multi_gpu",
            "distributed_context",
            "is_distributed_available",
            "get_rank",
            "get_world_size",
            "get_local_rank",
            "is_main_process",
            "barrier",
            "broadcast_object",
            "all_reduce_scalar",
            "create_device_map",
            "get_optimal_device_map",
            "wrap_model_for_distributed",
            "get_sampler_for_distributed",
            "MultiTPUConfig",
            "cleanup_multi_tpu",
            "cleanup_tpu_training",
            "get_tpu_device",
            "get_tpu_memory_info",
            "get_tpu_rank",
            "get_tpu_status",
            "get_tpu_world_size",
            "is_tpu_available",
            "is_tpu_main_process",
            "optimize_tpu_memory",
            "setup_multi_tpu",
            "setup_tpu_training",
            "synchronize_tpu",
            "tpu_context",
        ),
        "distributed",
    ),
    "launch": "parallel.launch",
    **dict.fromkeys(("RawTextDataLoader", "TextPreprocessor", "SyntheticDataKit"), "dataprep"),
    "is_bfloat16_supported": "device",
    "is_bf16_supported": ("device", "is_bfloat16_supported"),
    "get_gpu_memory_stats": "device",
    "clear_gpu_memory": "device",
}

_DEVICE_ATTRIBUTES = {"DEVICE_TYPE": "type", "DEVICE_TYPE_TORCH": "torch_type", "DEVICE_COUNT": "count"}

__all__ = ["__version__", *_EXPORTS, *_DEVICE_ATTRIBUTES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _DEVICE_ATTRIBUTES:
        value = getattr(importlib.import_module(".device", __name__).get_device(), _DEVICE_ATTRIBUTES[name])
    elif name in _EXPORTS:
        target = _EXPORTS[name]
        module, attribute = (target, name) if isinstance(target, str) else target
        value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_import_hooks()

"""What ``from_pretrained`` was asked for, and the refusal of what cannot be honoured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import log
from ..device import Device, is_installed
from ..errors import (
    ArgumentError,
    ConfigError,
    ConflictError,
    MissingDependencyError,
    UnsupportedError,
    unknown_arguments,
)
from ..parallel.config import MultiGPUConfig
from . import safety
from .activations import check_fraction
from .context import DEFAULT_MAX_SEQ_LENGTH
from .qat import check_scheme
from .quantize import LOAD_IN_4BIT_DEFAULT
from .record import FRACTION
from .resolve import parse_dtype

if TYPE_CHECKING:
    import torch

# Keyword arguments of transformers that choose how files are reached.
HUB_KEYWORDS = ("cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
# Those that go to the model class's from_pretrained as they are.
_MODEL_KEYWORDS = (
    "attn_implementation",
    "experts_implementation",
    "variant",
    "gguf_file",
    "use_safetensors",
    "ignore_mismatched_sizes",
    "offload_folder",
    "offload_buffers",
    "key_mapping",
    "disable_mmap",
    "code_revision",
)
# Those that become fields of the configuration.
_HEAD_KEYWORDS = ("num_labels", "id2label", "label2id", "problem_type")
# Those read here.
_OWN_KEYWORDS = ("config", "quantization_config", "torch_dtype", "low_cpu_mem_usage", "weights_only")


@dataclass(kw_only=True)
class LoadRequest:
    """Everything that ``from_pretrained`` was asked for; see ``FastLanguageModel.from_pretrained`` for the meaning."""

    model_name: Any
    max_seq_length: Any = DEFAULT_MAX_SEQ_LENGTH
    dtype: Any = None
    load_in_4bit: bool = LOAD_IN_4BIT_DEFAULT
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    full_finetuning: bool = False
    token: str | None = field(default=None, repr=False)
    device_map: Any = "sequential"
    rope_scaling: Any = None
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: Any = "unsloth"
    resize_model_vocab: int | None = None
    revision: str | None = None
    use_exact_model_name: bool = False
    offload_embedding: bool = False
    float32_mixed_precision: bool | None = None
    fast_inference: bool = False
    gpu_memory_utilization: float = 0.5
    float8_kv_cache: bool = False
    random_state: int | None = 3407
    max_lora_rank: int = 64
    disable_log_stats: bool = True
    qat_scheme: Any = None
    load_in_fp8: bool | str = False
    unsloth_tiled_mlp: Any = False
    text_only: bool = False
    auto_device_map: bool = True
    max_memory: dict[Any, Any] | None = None
    use_multi_gpu: bool | None = None
    use_tpu: bool | None = None
    tpu_cores: int = 8
    multi_gpu_config: MultiGPUConfig | None = None
    return_logits: bool = False
    fullgraph: bool = True
    auto_model: Any = None
    whisper_language: str | None = None
    whisper_task: str | None = None
    unsloth_force_compile: bool = False
    target_parameters: Any = None
    model_patcher: Any = None
    tokenizer_name: str | None = None
    tokenizer_revision: str | None = None
    unsloth_vllm_standby: bool = False
    activation_memory_fraction: float = FRACTION
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def in_shards(self) -> bool:
        """Whether each rank of the launch is to keep its part of the weights, instead of all of them."""
        return self.multi_gpu_config is not None and self.multi_gpu_config.strategy == "fsdp"


# Options that nothing here honours yet: (name, value that means "off", what to do instead).
_UNAVAILABLE = (
    ("float8_kv_cache", False, "it is a setting of the inference engine; leave it out"),
    ("unsloth_tiled_mlp", False, "leave it out; a shorter max_seq_length or a smaller batch saves memory too"),
    ("unsloth_force_compile", False, "leave it out"),
    ("unsloth_vllm_standby", False, "it is a setting of the inference engine; leave it out"),
    ("model_patcher", None, "leave it out; models are adapted by their structure"),
    ("target_parameters", None, "give it to get_peft_model"),
)
# Settings of the inference engine, without meaning when none is asked for: (name, default).
_ENGINE_SETTINGS = (("gpu_memory_utilization", 0.5), ("max_lora_rank", 64), ("disable_log_stats", True))


def check_options(request: LoadRequest, device: Device) -> None:
    """Refuse what cannot be honoured, before anything is read."""
    if request.fast_inference:
        if request.full_finetuning:
            raise UnsupportedError("fast_inference=True does not work with full_finetuning=True")
        if not is_installed("vllm"):
            raise MissingDependencyError(
                "fast_inference=True needs the package 'vllm', which is not installed",
                hint="pip install vllm, or pass fast_inference=False and use model.generate",
            )
        raise UnsupportedError("fast_inference=True is not available in this release", hint="pass fast_inference=False")
    for name, off, instead in _UNAVAILABLE:
        value = getattr(request, name)
        if value is not off and value != off:
            raise UnsupportedError(
                f"{name}={value!r} is not available in this release", where=f"argument {name}", hint=instead
            )
    if request.qat_scheme is not None:
        check_scheme(request.qat_scheme)
        if not request.full_finetuning:
            raise ConfigError(
                "qat_scheme needs full_finetuning=True here",
                where="argument qat_scheme",
                hint="with LoRA, give it to get_peft_model",
            )
    if request.offload_embedding and device.type != "cpu":
        raise UnsupportedError(
            "offload_embedding=True is not available in this release",
            where="argument offload_embedding",
            hint="leave it out; load_in_4bit=True saves more memory",
        )
    idle = [name for name, default in _ENGINE_SETTINGS if getattr(request, name) != default]
    if idle:
        log.once(f"{', '.join(idle)}: settings of the inference engine, without effect as fast_inference is off")
    for name in ("trust_remote_code", "fix_tokenizer", "text_only", "auto_device_map", "fast_inference"):
        if not isinstance(getattr(request, name), bool):
            raise ArgumentError(
                f"{name} must be True or False, got {getattr(request, name)!r}", where=f"argument {name}"
            )
    check_fraction(request.activation_memory_fraction)
    if request.token is not None and not isinstance(request.token, str):
        raise ArgumentError("token must be a string", where="argument token")
    if request.extra.get("weights_only") is False:
        raise UnsupportedError(
            "weights_only=False would unpickle arbitrary objects", where="argument weights_only", hint="leave it out"
        )
    safety.check_attention(request.extra.get("attn_implementation"))
    if request.in_shards:
        _check_shards(request, device)


def _check_shards(request: LoadRequest, device: Device) -> None:
    """Refuse what does not go with loading in shards."""
    where = "argument multi_gpu_config"
    if device.type == "xla":
        raise UnsupportedError(
            "strategy='fsdp' is for GPUs and CPUs", where=where, hint="a TPU's cores share a model by themselves"
        )
    if request.device_map not in (None, "sequential"):
        raise ConflictError(
            f"strategy='fsdp' and device_map={request.device_map!r} contradict each other",
            where=where,
            why="each rank keeps its part of the weights on its own device",
            hint="leave device_map out",
        )
    for name, is_given in (
        ("gguf_file", request.extra.get("gguf_file") is not None),
        ("use_safetensors=False", request.extra.get("use_safetensors") is False),
        ("load_in_8bit", request.load_in_8bit),
        ("qat_scheme", request.qat_scheme is not None),
    ):
        if is_given:
            raise UnsupportedError(
                f"{name} does not work with strategy='fsdp' of the loader",
                where=where,
                hint="load safetensors in 16 bits or with load_in_4bit=True, or leave multi_gpu_config to the trainer",
            )


def dtype_argument(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    """The dtype asked for under either of its names, or None.

    Raises:
        ConflictError: both names are used, for different dtypes.
    """
    one, other = parse_dtype(dtype), parse_dtype(torch_dtype, where="argument torch_dtype")
    if one is not None and other is not None and one is not other:
        raise ConflictError(f"dtype={dtype} and torch_dtype={torch_dtype} contradict each other")
    return one or other


def take_config_fields(config: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Set keyword arguments that name fields of the configuration, and return those that belong elsewhere.

    Raises:
        ArgumentError: keywords that nothing takes.
    """
    text = config.get_text_config()
    rest = {}
    unknown = []
    fields = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    text_fields = {*text.to_dict(), *getattr(text, "attribute_map", {})}
    for name, value in extra.items():
        if name in _MODEL_KEYWORDS:
            rest[name] = value
        elif name in _HEAD_KEYWORDS:
            if value is not None:
                setattr(config, name, value)
        elif name in fields:
            setattr(config, name, value)
        elif name in text_fields:
            setattr(text, name, value)
        else:
            unknown.append(name)
    if unknown:
        own = {name for name in LoadRequest.__dataclass_fields__ if name != "extra"}
        known = {*own, *HUB_KEYWORDS, *_MODEL_KEYWORDS, *_HEAD_KEYWORDS, *_OWN_KEYWORDS}
        raise unknown_arguments(unknown, known, where="from_pretrained")
    return rest

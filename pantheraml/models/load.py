"""One load from start to end: check, resolve, read, repair, adapt."""

from __future__ import annotations

import copy
import ctypes
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import env, log
from .._compat.peft import answering
from .._compat.peft_four_bit import shown
from ..device import Device, get_device
from ..errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConflictError,
    DeviceMemoryError,
    UnsupportedError,
)
from ..parallel.config import MultiGPUConfig
from ..parallel.parts import gather, in_parts
from ..parallel.process_group import join_after_restart, setup_distributed_training
from ..parallel.xla import place
from . import qat, resolve, stacks, stream
from .adapt import adapt
from .adapters import finish_adapter, seed_everything, upcast_trainable
from .attention import check_request as check_attention_request
from .attention import prefer as prefer_attention
from .attention import register as register_attention
from .checkpointing import check_mode, set_checkpointing
from .context import check_max_seq_length, extend_context
from .inference import attach_generate
from .methods import attach_methods, write_whole
from .quantize import (
    Flags,
    Quantization,
    compute_dtype_of,
    keep_weights_unpacked,
    multiply_in_fp8,
    resolve_quantization,
)
from .record import ModelRecord, attach_record
from .request import HUB_KEYWORDS, LoadRequest, check_options, dtype_argument, take_config_fields
from .roles import looks_like_experts
from .source import Hub, Source, check_source_weights, load_config, resolve_source
from .tokenizers import (
    grow_embeddings,
    has_tokenizer,
    load_tokenizer,
    prepare_tokenizer,
    resize_embeddings,
    text_tokenizer,
)

# Where multimodal checkpoints keep their text decoder, and where a text model looks for it.
_TEXT_WEIGHTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def _read_weights(
    auto: Any, source: Source, options: dict[str, Any], *, in_shards: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Read the weights, with the errors of the libraries below said plainly."""
    from safetensors import SafetensorError

    try:
        if in_shards:
            return stream.read(auto, source.base, options)
        return auto.from_pretrained(source.base, output_loading_info=True, **options)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{source.base} does not fit into the device's memory",
            why=str(error).strip().splitlines()[0],
            hint="load_in_4bit=True, a smaller model, or several GPUs (use_multi_gpu=True)",
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            "a weights file is damaged", where=source.base, why=str(error), hint="copy or download it again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            "the weights do not have the shapes that config.json says",
            where=source.base,
            why="the report printed above names them",
            hint="copy the folder again, or pass ignore_mismatched_sizes=True to start those weights at random",
        ) from error
    except (ValueError, OSError, KeyError, TypeError, ArithmeticError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise ConfigError(f"{source.base} cannot be loaded", why=lines[0] if lines else type(error).__name__) from error


def _text_config(config: Any) -> Any:
    """The configuration of a multimodal model's text decoder alone, with what only the whole one says."""
    text = config.get_text_config()
    if text is not config:
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        if getattr(config, "quantization_config", None) is not None:
            text.quantization_config = config.quantization_config
        text.name_or_path = config.name_or_path
    return text


def _check_missing(model: nn.Module, info: dict[str, Any], request: LoadRequest, *, has_new_head: bool) -> None:
    """Tell, or refuse, weights that the checkpoint does not have and that are therefore random."""
    missing = sorted(info.get("missing_keys") or ())
    if has_new_head:
        missing = [name for name in missing if not name.startswith(("score", "classifier", "pre_classifier", "pooler"))]
    if not missing:
        return
    if request.text_only:
        raise UnsupportedError(
            f"text_only=True: {type(model).__name__} does not find its weights in this checkpoint",
            why=f"missing: {', '.join(missing[:4])}",
            hint="pass text_only=False",
        )
    log.warning(
        f"{len(missing)} weights are not in the checkpoint and start at random: {', '.join(missing[:4])}"
        + (" ..." if len(missing) > 4 else "")
    )


def _resize(model: nn.Module, size: int | None, tokenizer: Any) -> None:
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int):
        raise ArgumentError(f"resize_model_vocab must be a whole number, got {size!r}", where="resize_model_vocab")
    if size < len(text_tokenizer(tokenizer)):
        raise ConfigError(
            f"resize_model_vocab={size} is less than the {len(text_tokenizer(tokenizer))} tokens of the tokenizer",
            where="argument resize_model_vocab",
        )
    resize_embeddings(model, size)


def _set_length(model: nn.Module, max_seq_length: int) -> None:
    for module in model.modules():
        object.__setattr__(module, "max_seq_length", max_seq_length)
    maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
    generation = getattr(model, "generation_config", None)
    if generation is not None and isinstance(maximum, int):
        generation.max_length = maximum


def _set_whisper(model: Any, processor: Any, request: LoadRequest) -> None:
    if request.whisper_language is None and request.whisper_task is None:
        return
    if model.config.model_type != "whisper":
        raise ConfigError(
            f"whisper_language and whisper_task were given and the model is {model.config.model_type!r}",
            where="argument whisper_language",
        )
    text_tokenizer(processor).set_prefix_tokens(language=request.whisper_language, task=request.whisper_task)
    model.generation_config.language = request.whisper_language
    model.generation_config.task = request.whisper_task


def _attach_adapter(model: Any, source: Source, hub: Hub) -> Any:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    options = hub.options()
    if in_parts(model):
        assert source.adapter is not None
        if source.adapter.get("use_dora"):
            raise UnsupportedError(
                "an adapter with use_dora reads the base's weights, of which each rank holds its part",
                where=source.name,
                hint="load it without multi_gpu_config",
            )
        saved = source.adapter.get("modules_to_save") or ()
        gather([module for name, module in model.named_modules() if name.rpartition(".")[2] in saved])
    try:
        with answering(model), shown(model):
            wrapped = PeftModel.from_pretrained(model, source.name, is_trainable=True, **options)
        if getattr(wrapped.peft_config["default"], "modules_to_save", None) and model.dtype != torch.float32:
            # PEFT read the trained embedding and head into 16-bit copies, which rounded them.
            upcast_trainable(wrapped)
            set_peft_model_state_dict(wrapped, load_peft_weights(source.name, device="cpu", **options))
        return wrapped
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise CheckpointError(
            f"the adapter {source.name} does not fit its base {source.base}",
            why=(lines[1] if len(lines) > 1 else lines[0]).strip() if lines else type(error).__name__,
            hint="check base_model_name_or_path in adapter_config.json",
        ) from error


def _take_experts_too(options: dict[str, Any]) -> None:
    """Ask for the quantiser that knows stacked experts, instead of transformers' own."""
    from .four_bit import FourBitLoadingConfig  # bitsandbytes is optional

    config = options["config"]
    places = (config, config.get_text_config())
    stored = next((found for place in places if (found := getattr(place, "quantization_config", None))), None)
    if stored is None:
        options["quantization_config"] = FourBitLoadingConfig(options["quantization_config"])
    else:
        options.pop("quantization_config", None)
        options["config"] = copy.copy(config)
        options["config"].quantization_config = FourBitLoadingConfig(stored)


@dataclass(frozen=True)
class _Plan:
    """Everything that is settled before weights are read."""

    source: Source
    hub: Hub
    config: Any
    auto: Any
    dtype: torch.dtype
    quantization: Quantization
    placement: Any
    length: int
    mode: bool | str
    model_options: dict[str, Any]
    classifies: bool

    def read_options(self, request: LoadRequest) -> dict[str, Any]:
        """Keyword arguments of the model class's ``from_pretrained``."""
        options: dict[str, Any] = {
            **self.model_options,
            **self.source.hub.options(),
            "config": self.config,
            "dtype": self.dtype,
            "device_map": self.placement,
            "trust_remote_code": request.trust_remote_code,
        }
        if "gguf_file" not in options:
            options.setdefault("use_safetensors", True)
        if request.max_memory is not None:
            options["max_memory"] = request.max_memory
        if self.quantization.config is not None:
            options["quantization_config"] = self.quantization.config
        if self.quantization.method in ("nf4", "fp4"):
            _take_experts_too(options)
        if request.text_only:
            options.setdefault("key_mapping", dict(_TEXT_WEIGHTS))
        return options


def _plan(request: LoadRequest, device: Device) -> _Plan:
    """Check and resolve everything about a load; reads configuration files only."""
    check_options(request, device)
    mode = check_mode(request.use_gradient_checkpointing)
    flags = Flags(
        request.load_in_4bit,
        request.load_in_8bit,
        request.load_in_16bit,
        request.load_in_fp8,
        request.full_finetuning,
    )
    flags.check()
    max_seq_length = check_max_seq_length(request.max_seq_length)
    extra = dict(request.extra)
    asked_dtype = dtype_argument(request.dtype, extra.pop("torch_dtype", None))
    hub = Hub(
        revision=request.revision,
        token=request.token,
        **{name: extra.pop(name) for name in HUB_KEYWORDS if extra.get(name) is not None},
    )
    given_config = extra.pop("config", None)
    given_quantization = extra.pop("quantization_config", None)
    for name in ("low_cpu_mem_usage", "weights_only", *HUB_KEYWORDS):
        extra.pop(name, None)

    source = resolve_source(request.model_name, hub, use_safetensors=extra.get("use_safetensors"))
    if source.adapter is not None and request.full_finetuning:
        raise ConflictError(
            f"full_finetuning=True and {source.name}, which is an adapter, contradict each other",
            hint="merge the adapter first (save_pretrained_merged), then train the merged folder",
        )
    gguf_file = extra.get("gguf_file")
    config = load_config(source, trust_remote_code=request.trust_remote_code, given=given_config, gguf_file=gguf_file)
    classifies = any(extra.get(name) is not None for name in ("num_labels", "id2label"))
    model_options = take_config_fields(config, extra)
    if request.text_only:
        config = _text_config(config)
    weight_bytes = None
    if gguf_file is None:
        weight_bytes = check_source_weights(
            source,
            config,
            use_safetensors=model_options.get("use_safetensors"),
            variant=model_options.get("variant"),
        )
    dtype = resolve.resolve_dtype(
        asked_dtype,
        device=device,
        model_type=config.model_type,
        compute_dtype=compute_dtype_of(given_quantization),
        full_finetuning=request.full_finetuning,
        float32_mixed_precision=request.float32_mixed_precision,
    )
    quantization = resolve_quantization(
        flags, name=source.base, config=config, given=given_quantization, dtype=dtype, device=device
    )
    if request.in_shards and quantization.method not in ("none", "nf4", "fp4"):
        raise UnsupportedError(
            f"{source.base} in {quantization.method} cannot be loaded in shards",
            where="argument multi_gpu_config",
            hint="load it in 16 bits or with load_in_4bit=True, or leave multi_gpu_config out: every GPU holds a copy",
        )
    placement = resolve.resolve_placement(
        device,
        device_map=request.device_map,
        max_memory=request.max_memory,
        auto_device_map=request.auto_device_map,
        use_multi_gpu=request.use_multi_gpu,
        use_tpu=request.use_tpu,
        tpu_cores=request.tpu_cores,
        weight_bytes=weight_bytes,
        bytes_per_weight=resolve.weight_size(quantization.method, dtype),
    )
    length = extend_context(config, max_seq_length, request.rope_scaling)
    auto = resolve.resolve_class(
        config,
        sequence_classification=classifies,
        auto_model=request.auto_model,
        trust_remote_code=request.trust_remote_code,
    )
    return _Plan(source, hub, config, auto, dtype, quantization, placement, length, mode, model_options, classifies)


def _load_tokenizer(request: LoadRequest, plan: _Plan) -> Any:
    places = [(plan.source.base, plan.source.hub)]
    if plan.source.adapter is not None and has_tokenizer(plan.source.name, plan.hub):
        places.insert(0, (plan.source.name, plan.hub))
    if request.tokenizer_name is not None:
        places = [(request.tokenizer_name, Hub(revision=request.tokenizer_revision, token=request.token))]
    return load_tokenizer(
        places,
        trust_remote_code=request.trust_remote_code,
        multimodal=plan.config.get_text_config() is not plan.config or plan.config.model_type == "whisper",
        gguf_file=plan.model_options.get("gguf_file"),
    )


def _settle_gpus(request: LoadRequest) -> LoadRequest:
    """Join the launch as ``multi_gpu_config`` says, and let its fields stand for the loader's own arguments."""
    config = request.multi_gpu_config
    if config is None:
        return request
    if not isinstance(config, MultiGPUConfig):
        raise ArgumentError(
            f"multi_gpu_config must be a MultiGPUConfig, got {type(config).__name__}",
            where="argument multi_gpu_config",
            hint="from pantheraml import MultiGPUConfig",
        )
    setup_distributed_training(config)
    changes: dict[str, Any] = {}
    if config.strategy == "device_map" and request.use_multi_gpu is None:
        changes["use_multi_gpu"] = True
    if not config.auto_device_map:
        changes["auto_device_map"] = False
    if not config.use_gradient_checkpointing:
        changes["use_gradient_checkpointing"] = False
    return replace(request, **changes)


def load(request: LoadRequest) -> tuple[Any, Any]:
    """Carry out one load.

    Args:
        request: What is asked for.

    Returns:
        The model (PEFT's wrapper of it when the source is an adapter) and its tokenizer or processor.

    Raises:
        PantheraMLError: as ``FastLanguageModel.from_pretrained`` says.
    """
    join_after_restart()
    request = _settle_gpus(request)
    device = get_device()
    register_attention()
    check_attention_request(request.extra.get("attn_implementation"), device)
    plan = _plan(request, device)
    source = plan.source
    # The tokenizer comes before the weights: it is small, and a folder without one is told before minutes of reading.
    tokenizer = _load_tokenizer(request, plan)
    if plan.classifies and request.random_state is not None:
        # The head starts at random.
        seed_everything(request.random_state)
    model, info = _read_weights(plan.auto, source, plan.read_options(request), in_shards=request.in_shards)
    keep_weights_unpacked(model)
    if plan.quantization.fp8_compute:
        multiply_in_fp8(model)
    if request.extra.get("attn_implementation") is None:
        prefer_attention(model)
    _check_missing(model, info, request, has_new_head=plan.classifies)

    _resize(model, request.resize_model_vocab, tokenizer)
    prepare_tokenizer(model, tokenizer, max_seq_length=plan.length, fix=request.fix_tokenizer)
    if source.adapter is not None:
        grow_embeddings(model, len(text_tokenizer(tokenizer)))
    if device.type == "xla":
        place(model)
    _set_length(model, plan.length)
    _set_whisper(model, tokenizer, request)
    object.__setattr__(model, "_saved_temp_tokenizer", tokenizer)
    record = ModelRecord(
        name=source.name,
        base=source.base,
        revision=source.hub.revision,
        dtype=plan.dtype,
        quantization=plan.quantization.method,
        full_finetuning=request.full_finetuning,
        max_seq_length=plan.length,
        gradient_checkpointing=plan.mode,
        activation_memory_fraction=request.activation_memory_fraction,
        token=request.token,
        multi_gpu_config=request.multi_gpu_config,
        load_kwargs=_reload_options(request, source, plan.model_options),
    )
    attach_record(model, record)
    attach_methods(model)
    if request.in_shards:
        write_whole(model)
    attach_generate(model)
    if request.full_finetuning:
        model.requires_grad_(True)
        set_checkpointing(model, plan.mode)
        if request.qat_scheme is not None:
            scheme = qat.check_scheme(request.qat_scheme, plan.config.model_type)
            qat.check_model(model, scheme)
            qat.prepare(model, scheme)
    if source.adapter is not None:
        model = finish_adapter(_attach_adapter(model, source, plan.hub), mode=plan.mode)
        # As for any model that was just loaded: evaluation mode, and prompts padded on the left.
        model.eval()
        text_tokenizer(tokenizer).padding_side = "left"
    else:
        adapt(model)
    _give_memory_back()
    _banner(model, plan.config, record, plan.quantization, device)
    return model, tokenizer


def _give_memory_back() -> None:
    """Return to the system what loading freed on the host.

    The threads that read tensors have heaps of their own, in which glibc keeps what was freed: with a model of 480 MB
    that was quantised to 120 MB on a CPU, 400 to 900 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reload_options(request: LoadRequest, source: Source, model_options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that read the same base weights again."""
    kept = {
        name: value
        for name, value in source.hub.options().items()
        if name in ("cache_dir", "subfolder", "local_files_only")
    }
    kept |= {name: model_options[name] for name in ("variant", "gguf_file", "use_safetensors") if name in model_options}
    if request.trust_remote_code:
        kept["trust_remote_code"] = True
    return kept


def _tell_experts(model: nn.Module, method: str) -> str:
    """What became of a mixture's experts, the largest part of it."""
    if method not in ("nf4", "fp4"):
        return ""
    counts = [stacks.count(module) for module in model.modules() if looks_like_experts(module)]
    total, packed = (sum(numbers) for numbers in (zip(*counts) if counts else ((), ())))
    told = []
    if packed:
        told.append(f"{packed:,} weights of experts too")
    if total > packed:
        told.append(f"{total - packed:,} weights of experts are not")
    return f" ({', '.join(told)})" if told else ""


def _banner(model: Any, config: Any, record: ModelRecord, quantization: Quantization, device: Device) -> None:
    parts = [
        config.model_type,
        str(record.dtype).removeprefix("torch."),
        {"none": "unquantised"}.get(quantization.method, quantization.method)
        + (" with fp8 products" if quantization.fp8_compute else "")
        + _tell_experts(model, quantization.method),
        device.name if device.type != "cpu" else "cpu",
        f"{record.max_seq_length} tokens",
    ]
    if record.full_finetuning:
        parts.append("full fine-tuning")
    if env.world_size() > 1:
        told = "a shard in each of " if record.multi_gpu_config is not None and in_parts(model) else ""
        parts.append(f"{told}{env.world_size()} processes")
    report = getattr(model, "adapt_report", None)
    if report is not None:
        parts.append(report.summary())
    log.info(f"loaded {record.name}: {' | '.join(parts)}")

"""How a load is carried out: dtype, placement on devices, and the class that reads the weights."""

from __future__ import annotations

from typing import Any

import torch

from .. import env, log
from ..device import Device, require
from ..errors import (
    ArgumentError,
    ConfigError,
    ConflictError,
    UnknownArchitectureError,
    UnsupportedError,
    nearest,
)

_DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}
# Families whose activations exceed the range of fp16.
_NO_FLOAT16 = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "qwen3_5",
        "qwen3_moe",
    }
)
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
# Bytes a weight takes in each method, scales included; for deciding whether a model fits one device.
_BYTES_PER_WEIGHT = {"nf4": 0.6, "fp4": 0.6, "int8": 1.05, "fp8_rows": 1.05, "fp8_block": 1.05}
# Share of a device's memory that weights may take before they are spread over several.
_WEIGHT_SHARE = 0.85


def parse_dtype(dtype: Any, *, where: str = "argument dtype") -> torch.dtype | None:
    """Return the ``torch.dtype`` that ``dtype`` names; None and ``"auto"`` give None.

    Raises:
        ConfigError: unknown name, or a dtype in which models are not computed.
        ArgumentError: neither string nor dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str):
        found = _DTYPES.get(dtype.lower().removeprefix("torch."))
        if found is None:
            close = nearest(dtype.lower(), _DTYPES)
            raise ConfigError(
                f"unknown dtype {dtype!r}",
                where=where,
                hint=(f"did you mean {close!r}? " if close else "") + "use None, 'float16', 'bfloat16' or 'float32'",
            )
        return found
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype must be a torch dtype, its name or None, got {dtype!r}", where=where)
    if dtype not in _DTYPES.values():
        raise ConfigError(f"models are not computed in {dtype}", where=where, hint="use float16, bfloat16 or float32")
    return dtype


def resolve_dtype(
    dtype: Any,
    *,
    device: Device,
    model_type: str = "",
    compute_dtype: torch.dtype | None = None,
    full_finetuning: bool = False,
    float32_mixed_precision: bool | None = None,
) -> torch.dtype:
    """Settle the dtype of weights and arithmetic.

    Args:
        dtype: The caller's wish; None lets the device decide: bf16 where it is native, else fp16 on GPUs, else fp32.
        device: Device of this process.
        model_type: Family, for those that overflow in fp16.
        compute_dtype: What the caller's 4-bit configuration computes in; taken when ``dtype`` is None.
        full_finetuning: All weights are trained, which fp16 cannot do.
        float32_mixed_precision: True keeps the trained weights in fp32.
    """
    wanted = parse_dtype(dtype) or compute_dtype
    if wanted is None:
        wanted = torch.bfloat16 if device.bfloat16 else torch.float16 if device.float16 else torch.float32
    if wanted is torch.bfloat16 and device.is_gpu and not device.bfloat16:
        log.once(f"{device.name} has no bfloat16: float16 is used", key="no-bfloat16")
        wanted = torch.float16
    if wanted is torch.float16 and model_type in _NO_FLOAT16:
        log.once(f"{model_type} overflows in float16: float32 is used", key=f"no-float16-{model_type}")
        wanted = torch.float32
    if full_finetuning and (float32_mixed_precision or wanted is torch.float16):
        wanted = torch.float32
    return wanted


def resolve_placement(
    device: Device,
    *,
    device_map: Any = "sequential",
    max_memory: dict[Any, Any] | None = None,
    auto_device_map: bool = True,
    use_multi_gpu: bool | None = None,
    use_tpu: bool | None = None,
    tpu_cores: int = 8,
    weight_bytes: int | None = None,
    bytes_per_weight: float = 2.0,
) -> Any:
    """Settle ``device_map``.

    One process of a launch takes its own device. A single process takes its one device when the model fits there, and
    spreads over all of them when it does not (``auto_device_map``) or when asked to (``use_multi_gpu``).

    Args:
        device: Device of this process.
        device_map: ``"sequential"``, ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, a device, or a dict.
        max_memory: Cap in each device, e.g. ``{0: "10GB"}``.
        auto_device_map: Whether a model too large for one device may spread over several.
        use_multi_gpu: True spreads over all GPUs of the process, False stays on one, None spreads where needed.
        use_tpu: True insists on a TPU, False refuses one.
        tpu_cores: TPU cores wanted; the launcher decides, so another number than there is raises.
        weight_bytes: Size of the 16-bit checkpoint, if known.
        bytes_per_weight: Bytes a weight takes once loaded.

    Returns:
        What goes to ``from_pretrained`` as ``device_map``.
    """
    _check_tpu(device, use_tpu, tpu_cores)
    launched = env.world_size() > 1
    here = {"": str(device.torch_device)}
    if use_multi_gpu and not launched and (not device.is_gpu or device.count < 2):
        raise UnsupportedError(
            f"use_multi_gpu=True needs at least two GPUs, this process sees {device.count if device.is_gpu else 0}",
            hint="leave it out, or start several processes with torchrun",
        )
    if max_memory is not None and (launched or not device.is_gpu):
        raise UnsupportedError(
            "max_memory divides a model between the GPUs of one process"
            + (", and a launch gives each process its own" if launched else ", and this one has none"),
            where="argument max_memory",
        )
    if device_map is None:
        device_map = "sequential"
    if isinstance(device_map, str) and device_map in _PLACEMENTS:
        if device.type == "xla":
            return None
        if launched or not device.is_gpu:
            if launched and device_map != "sequential":
                log.once(f"device_map={device_map!r} is for one process: each of this launch loads onto its own device")
            return here
        if use_multi_gpu or max_memory is not None:
            return "balanced" if device_map == "sequential" and use_multi_gpu else device_map
        if device.count < 2 or not auto_device_map or use_multi_gpu is False:
            return here
        if device_map != "sequential":
            return device_map
        needed = (weight_bytes or 0) / 2 * bytes_per_weight
        if device.memory is not None and needed > _WEIGHT_SHARE * device.memory:
            log.info(f"the weights do not fit on one {device.name}: spread over {device.count} (device_map='balanced')")
            return "balanced"
        return here
    return _explicit_placement(device, device_map)


def _explicit_placement(device: Device, device_map: Any) -> Any:
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    for value in values:
        try:
            kind = (
                device.torch_type if isinstance(value, int) else "cpu" if value == "disk" else torch.device(value).type
            )
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"device_map names no device: {value!r}",
                where="argument device_map",
                hint=f"use {', '.join(map(repr, _PLACEMENTS))}, a device such as 'cuda:0', or a dict of modules",
            ) from error
        if kind not in (device.torch_type, "cpu", "meta"):
            raise UnsupportedError(
                f"device_map names {value!r}, and this process computes on {device.type}", where="argument device_map"
            )
        if env.world_size() > 1:
            _check_own_device(device, value)
    if env.world_size() > 1 and device_map == device.torch_type:
        # torch's current device, which each process sets only when it joins the others.
        return {"": str(device.torch_device)}
    return device_map if isinstance(device_map, dict) else {"": device_map}


def _check_own_device(device: Device, value: Any) -> None:
    """Refuse a device that belongs to another process of the launch: each would load a copy onto it."""
    index = value if isinstance(value, int) else torch.device(value).index if value != "disk" else None
    if index is not None and index != device.index and value != "cpu":
        raise ConflictError(
            f"device_map names device {value!r}, and this process of the launch has {device.torch_device}",
            where="argument device_map",
            hint="leave it out: each process loads onto its own device",
        )


def _check_tpu(device: Device, use_tpu: bool | None, tpu_cores: int) -> None:
    on_tpu = device.type == "xla"
    if use_tpu and not on_tpu:
        require("torch_xla", what="use_tpu=True")
        raise UnsupportedError(
            f"use_tpu=True was given and this process computes on {device.type}",
            hint="set PJRT_DEVICE=TPU on a host with a TPU",
        )
    if use_tpu is False and on_tpu:
        raise ConflictError(
            "use_tpu=False was given and this process computes on a TPU", hint="set PANTHERAML_DEVICE=cpu"
        )
    if tpu_cores != 8 and not (on_tpu and tpu_cores == device.count):
        raise UnsupportedError(
            f"tpu_cores={tpu_cores} was given and this process "
            + (f"sees {device.count} cores" if on_tpu else "has no TPU"),
            where="argument tpu_cores",
            hint="the launcher decides how many cores a run uses",
        )


_CLASSIFIER = "AutoModelForSequenceClassification"
_ENCODER_DECODERS = ["AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM"]
_OTHERS = ["AutoModelForTextToWaveform", "AutoModelForMaskedLM"]
# In order of preference, by whether the model has an encoder: some of those can also be built as a decoder alone.
_GENERATORS = {
    False: ["AutoModelForImageTextToText", "AutoModelForCausalLM", *_ENCODER_DECODERS, *_OTHERS],
    True: ["AutoModelForImageTextToText", *_ENCODER_DECODERS, "AutoModelForCausalLM", *_OTHERS],
}


def resolve_class(config: Any, *, sequence_classification: bool, auto_model: Any, trust_remote_code: bool) -> Any:
    """Return the class whose ``from_pretrained`` loads the weights: an Auto class, or the caller's ``auto_model``.

    Raises:
        UnknownArchitectureError: no head of transformers fits the configuration.
    """
    import transformers

    if auto_model is not None:
        if not hasattr(auto_model, "from_pretrained"):
            raise ArgumentError(f"auto_model must be a model class, got {auto_model!r}", where="argument auto_model")
        return auto_model
    names = [_CLASSIFIER] if sequence_classification else _GENERATORS[bool(config.is_encoder_decoder)]
    for name in names:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping or (
            trust_remote_code and name in (getattr(config, "auto_map", None) or {})
        ):
            return auto
    raise UnknownArchitectureError(
        f"transformers has no {'sequence classification' if sequence_classification else 'generative'} model for "
        f"{config.model_type!r}",
        hint="pass auto_model= with the class to load",
    )


def weight_size(method: str, dtype: torch.dtype) -> float:
    """Bytes that one weight takes when loaded by ``method`` with the compute dtype ``dtype``."""
    return _BYTES_PER_WEIGHT.get(method, dtype.itemsize)

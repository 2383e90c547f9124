"""Which quantisation a load uses: the caller's flags, a configuration object, or what the checkpoint already is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import log
from ..device import Device, require
from ..errors import ArgumentError, ConfigError, ConflictError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Default(int):
    """A default flag that can be told from the same value given by the caller; prints and compares like a bool."""

    def __repr__(self) -> str:
        return str(bool(self))


LOAD_IN_4BIT_DEFAULT: bool = _Default(1)  # type: ignore[assignment]

# Linear layers of a mixture of experts that stay in the compute dtype: small, and routing is sensitive to their error.
# A list given to bitsandbytes replaces its own, so the head is named too; without experts its own list is right.
_SKIPPED_WITH_EXPERTS = ["lm_head", "router", ".gate", "shared_expert_gate", "score", "classifier"]
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Formats that ship quantised for serving and are unpacked to 16 bit for training.
_UNPACKED = {"mxfp4": "Mxfp4Config"}
_BNB_DEVICES = ("cuda", "hip", "xpu", "cpu")
_FLAG_HINT = (
    "pass exactly one of load_in_4bit=True, load_in_8bit=True, load_in_16bit=True, load_in_fp8=True, or a "
    "quantization_config (load_in_4bit=True with load_in_fp8=True means 4-bit storage and fp8 products)"
)
# Methods of checkpoints that are in fp8 already; asking for fp8 leaves them as they are.
_FP8_CHECKPOINTS = ("fp8", "fbgemm_fp8", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantisation of one load.

    Attributes:
        method: ``"none"``, ``"nf4"``, ``"fp4"``, ``"int8"``, ``"fp8_rows"``, ``"fp8_block"``, or the checkpoint's own
            method such as ``"gptq"``.
        config: What goes to ``from_pretrained`` as ``quantization_config``; None leaves the checkpoint as it is.
        fp8_compute: Whether 4-bit weights are multiplied in fp8.
    """

    method: str
    config: Any = None
    fp8_compute: bool = False


@dataclass(frozen=True, slots=True)
class Flags:
    """The caller's quantisation flags, as given to ``from_pretrained``."""

    load_in_4bit: bool = LOAD_IN_4BIT_DEFAULT
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    load_in_fp8: bool | str = False
    full_finetuning: bool = False

    @property
    def default_4bit(self) -> bool:
        """Whether load_in_4bit has its default value because the caller did not say."""
        return isinstance(self.load_in_4bit, _Default)

    @property
    def chosen(self) -> list[str]:
        """Names of the flags that the caller switched on."""
        names = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
        return [name for name in names if getattr(self, name) and not isinstance(getattr(self, name), _Default)]

    @property
    def fp8_compute(self) -> bool:
        """Whether 4-bit storage and fp8 products were asked for, by naming both."""
        return self.chosen == ["load_in_4bit", "load_in_fp8"]

    def check(self) -> None:
        """Refuse flags of the wrong type and contradictions.

        Raises:
            ArgumentError: a flag is no bool (``load_in_fp8``: nor ``"block"``).
            ConflictError: more than one precision, or full fine-tuning of quantised weights.
        """
        for name in ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"):
            if not isinstance(getattr(self, name), bool | _Default):
                raise ArgumentError(f"{name} must be True or False, got {getattr(self, name)!r}", where=name)
        if not isinstance(self.load_in_fp8, bool) and self.load_in_fp8 != "block":
            raise ArgumentError(
                f"load_in_fp8 must be True, False or 'block', got {self.load_in_fp8!r}", where="load_in_fp8"
            )
        if self.fp8_compute and self.load_in_fp8 == "block":
            raise ConflictError(
                "load_in_4bit=True and load_in_fp8='block' contradict each other",
                why="4-bit weights are multiplied in fp8 with a scale for each row",
                hint="pass load_in_fp8=True for products in fp8, or leave load_in_4bit out",
            )
        if len(self.chosen) > 1 and not self.fp8_compute:
            raise ConflictError(
                f"{' and '.join(self.chosen)} contradict each other",
                why="the weights can be held in one precision only",
                hint=_FLAG_HINT,
            )
        quantised = [name for name in self.chosen if name != "load_in_16bit"]
        if self.full_finetuning and quantised:
            raise ConflictError(
                f"full_finetuning=True and {quantised[0]}=True contradict each other",
                why="quantised weights cannot be trained; only adapters on top of them can",
                hint="leave the quantisation flag out, or drop full_finetuning and use get_peft_model",
            )


def _config_object(value: Any) -> Any:
    """Turn the caller's ``quantization_config`` into an object of transformers."""
    if not isinstance(value, dict):
        if not hasattr(value, "quant_method"):
            raise ArgumentError(
                f"quantization_config must be a dict or a transformers quantisation config, got {type(value).__name__}",
                where="argument quantization_config",
            )
        return value
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    if "quant_method" in value:
        try:
            return AutoQuantizationConfig.from_dict(dict(value))
        except ValueError as error:
            raise ConfigError(
                "unknown quantisation method", where="argument quantization_config", why=str(error)
            ) from error
    if value.get("load_in_4bit") or value.get("load_in_8bit"):
        return BitsAndBytesConfig(**value)
    raise ConfigError(
        "the quantization_config names no method",
        where="argument quantization_config",
        why=f"it holds: {', '.join(sorted(value)) or 'nothing'}",
        hint="add 'quant_method', or 'load_in_4bit': True / 'load_in_8bit': True",
    )


def method_of(config: Any) -> str:
    """Name the method of a quantisation config (object or dict): ``nf4``, ``fp4``, ``int8`` or transformers' name."""
    read = config.get if isinstance(config, dict) else lambda name, default=None: getattr(config, name, default)
    method = read("quant_method")
    method = str(getattr(method, "value", method) or "bitsandbytes")
    if method == "bitsandbytes":
        if read("load_in_8bit"):
            return "int8"
        return str(read("bnb_4bit_quant_type") or "fp4")
    return method


def is_bitsandbytes(method: str) -> bool:
    """Whether ``method`` is one of bitsandbytes' formats."""
    return method in ("nf4", "fp4", "int8")


def _check_bitsandbytes(device: Device, what: str) -> None:
    if device.type not in _BNB_DEVICES:
        raise UnsupportedError(
            f"{what} needs bitsandbytes, which does not run on {device.type}",
            hint="pass load_in_16bit=True",
        )
    require("bitsandbytes", what=f"{what} (pass load_in_16bit=True to do without)")
    _quiet_int8()


def _check_fp8(device: Device, dtype: torch.dtype) -> None:
    """Refuse fp8 products where nothing computes them; a CPU computes what they would give, slowly."""
    import torch

    if device.type == "cpu":
        log.once("fp8 on a CPU: products are computed in float32 from rounded factors, to try things out only")
        return
    if not device.float8:
        capability = (
            "" if device.capability is None else f" (compute capability {device.capability[0]}.{device.capability[1]})"
        )
        raise UnsupportedError(
            f"load_in_fp8 needs fp8 matrix units, which {device.name}{capability} does not have",
            where="argument load_in_fp8",
            why="NVIDIA GPUs have them from compute capability 8.9 (Ada, Hopper, Blackwell)",
            hint="pass load_in_4bit=True, load_in_8bit=True or load_in_16bit=True",
        )
    if dtype != torch.bfloat16:
        raise UnsupportedError(
            f"load_in_fp8 with dtype={str(dtype).removeprefix('torch.')}: fp8 products give bfloat16 on {device.name}",
            where="argument dtype",
            hint="pass dtype=torch.bfloat16, or leave it out",
        )


def _fp8(flags: Flags, dtype: torch.dtype, skip: list[str] | None) -> Quantization:
    from .fp8 import Fp8LoadingConfig

    block = flags.load_in_fp8 == "block"
    config = Fp8LoadingConfig(block=block, compute_dtype=dtype, modules_to_not_convert=skip)
    return Quantization("fp8_block" if block else "fp8_rows", config)


def _from_flags(flags: Flags, *, name: str, dtype: torch.dtype, device: Device, skip: list[str] | None) -> Quantization:
    from transformers import BitsAndBytesConfig

    if flags.load_in_8bit:
        _check_bitsandbytes(device, "load_in_8bit=True")
        return Quantization("int8", BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip))
    if flags.load_in_fp8:
        _check_fp8(device, dtype)
        if not flags.fp8_compute:
            return _fp8(flags, dtype, skip)
    if flags.load_in_16bit or flags.full_finetuning or not flags.load_in_4bit:
        if flags.full_finetuning and flags.default_4bit:
            log.once("full_finetuning=True: the weights are loaded unquantised (load_in_4bit is off)")
        return Quantization("none")
    if flags.default_4bit and name.lower().rstrip("/").endswith("-bf16"):
        log.info(f"{name} is a 16-bit repository by name: loaded unquantised (pass load_in_4bit=True to quantise)")
        return Quantization("none")
    if flags.default_4bit and device.type not in _BNB_DEVICES:
        log.info(f"4-bit weights are not available on {device.type}: loaded in 16 bit")
        return Quantization("none")
    _check_bitsandbytes(device, "load_in_4bit=True")
    return Quantization(
        "nf4",
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        ),
        fp8_compute=flags.fp8_compute,
    )


def _unpack(method: str) -> Any:
    import transformers

    config_class = getattr(transformers, _UNPACKED[method], None)
    return config_class(dequantize=True) if config_class is not None else None


def _from_checkpoint(existing: Any, flags: Flags, *, name: str, dtype: torch.dtype, device: Device) -> Quantization:
    method = method_of(existing)
    if flags.full_finetuning and method not in _UNPACKED:
        raise ConflictError(
            f"full_finetuning=True cannot train {name}, whose weights are stored as {method}",
            hint="load the 16-bit repository of this model, or train adapters with get_peft_model",
        )
    if method in _UNPACKED:
        log.once(f"{name} is stored as {method}: unpacked to 16 bit so that it can be trained")
        return Quantization("none", _unpack(method))
    if not is_bitsandbytes(method):
        if flags.chosen and flags.chosen != ["load_in_16bit"]:
            log.info(f"{name} is already quantised ({method}): {flags.chosen[0]} has no effect")
        if flags.load_in_16bit or (flags.load_in_fp8 and method not in _FP8_CHECKPOINTS):
            raise ConflictError(
                f"{flags.chosen[0]}={getattr(flags, flags.chosen[0])!r} and the checkpoint's own quantisation "
                f"({method}) contradict each other",
                where=name,
                hint="load the 16-bit repository of this model",
            )
        return Quantization(method)
    if flags.fp8_compute and method == "nf4":
        _check_fp8(device, dtype)
        _check_bitsandbytes(device, f"the {method} checkpoint {name}")
        return Quantization(method, fp8_compute=True)
    asked = flags.chosen[-1] if flags.chosen else None
    wanted = {"load_in_4bit": ("nf4", "fp4"), "load_in_8bit": ("int8",), "load_in_16bit": (), "load_in_fp8": ()}
    refused_4bit = not flags.load_in_4bit and asked is None
    if (asked is not None and method not in wanted[asked]) or (refused_4bit and method != "int8"):
        raise ConflictError(
            f"{asked or 'load_in_4bit'}={asked is not None} and the checkpoint's own quantisation ({method}) "
            "contradict each other",
            where=name,
            why="weights that are stored quantised cannot be loaded in another precision",
            hint="load the 16-bit repository of this model, or leave the flag out"
            + (", or pass load_in_4bit=True too for fp8 products" if flags.load_in_fp8 and method == "nf4" else ""),
        )
    _check_bitsandbytes(device, f"the {method} checkpoint {name}")
    return Quantization(method)


def resolve_quantization(
    flags: Flags,
    *,
    name: str,
    config: Any,
    given: Any,
    dtype: torch.dtype,
    device: Device,
) -> Quantization:
    """Settle the quantisation of one load.

    Args:
        flags: The caller's flags.
        name: The model's name or folder, for messages and the ``-bf16`` rule.
        config: The checkpoint's configuration; its ``quantization_config``, if any, wins.
        given: The caller's ``quantization_config`` (object or dict), or None.
        dtype: Compute dtype.
        device: Device of this process.

    Raises:
        ConflictError: options contradict each other or the checkpoint.
        ConfigError: the configuration cannot be used.
        MissingDependencyError: bitsandbytes is needed and not installed.
        UnsupportedError: not on this device.
    """
    flags.check()
    existing = getattr(config, "quantization_config", None)
    if given is not None:
        wanted = _config_object(given)
        method = method_of(wanted)
        asked = {"nf4": "load_in_4bit", "fp4": "load_in_4bit", "int8": "load_in_8bit"}.get(method)
        if (flags.chosen and flags.chosen != [asked]) or flags.full_finetuning:
            other = flags.chosen[0] if flags.chosen else "full_finetuning"
            raise ConflictError(
                f"{other}=True and quantization_config ({method}) contradict each other", hint=_FLAG_HINT
            )
        if existing is not None and method_of(existing) != method:
            raise ConflictError(
                f"quantization_config ({method}) and the checkpoint's own quantisation ({method_of(existing)}) "
                "contradict each other",
                where=name,
            )
        if is_bitsandbytes(method):
            _check_bitsandbytes(device, f"quantization_config ({method})")
        return Quantization(method, wanted)
    if existing is not None:
        return _from_checkpoint(existing, flags, name=name, dtype=dtype, device=device)
    text = config.get_text_config()
    skip = list(_SKIPPED_WITH_EXPERTS) if any(getattr(text, count, None) for count in EXPERT_COUNTS) else None
    return _from_flags(flags, name=name, dtype=dtype, device=device, skip=skip)


def compute_dtype_of(given: Any) -> torch.dtype | None:
    """The compute dtype that a caller's 4-bit configuration names, or None when it names none."""
    if given is None:
        return None
    config = _config_object(given)
    if not getattr(config, "load_in_4bit", False):
        return None
    explicit = given.get("bnb_4bit_compute_dtype") if isinstance(given, dict) else config.bnb_4bit_compute_dtype
    return config.bnb_4bit_compute_dtype if explicit is not None else None


def keep_weights_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    On a CPU with AVX512-BF16 its ``Linear4bit`` repacks the weight in place at the first forward in eval mode, for a
    product that has no backward: training after an evaluation would then learn nothing below that layer
    (bitsandbytes 0.49 and 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def multiply_in_fp8(model: nn.Module) -> None:
    """Let the 4-bit layers of a model multiply in fp8.

    Raises:
        UnsupportedError: none of them can.
    """
    from .layers import fp8_four_bit  # bitsandbytes is optional

    if fp8_four_bit.multiply_in_fp8(model) == 0:
        raise UnsupportedError(
            f"no 4-bit layer of {type(model).__name__} can be multiplied in fp8",
            where="argument load_in_fp8",
            why="their sides are no multiples of 16, or their rows no whole blocks",
            hint="leave load_in_fp8 out",
        )


class _OnceFilter(logging.Filter):
    """Lets each message of a logger through once; bitsandbytes repeats its int8 cast notice at every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        first = record.msg not in self._seen
        self._seen.add(str(record.msg))
        return first


def _quiet_int8() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(item, _OnceFilter) for item in logger.filters):
        logger.addFilter(_OnceFilter())

"""What the options of a run are when the user said nothing, for models that PantheraML loaded.

The values are those that scripts written for Unsloth count on. An option the user chose is never replaced; an option
that cannot be honoured raises.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from .. import log
from ..device import Device, get_device, is_installed, require
from ..errors import ArgumentError
from ..models.quantize import EXPERT_COUNTS
from ..models.record import ModelRecord

OUTPUT_DIR = "pantheraml_training_checkpoints"
UNKNOWN_LENGTH = 1024


@dataclass(frozen=True)
class Default:
    """The value of an option that the user left alone.

    Attributes:
        name: Option of the trainer's config.
        value: The value, or a function of the config (already holding the defaults above it in the table).
        reason: Why it is not the value of TRL or transformers.
    """

    name: str
    value: Any
    reason: str


def _optimizer(args: Any) -> OptimizerNames:
    return OptimizerNames.ADAMW_8BIT if eight_bit_optimizer_runs(get_device()) else OptimizerNames.ADAMW_TORCH


def _train_batch(args: Any) -> int:
    return args.per_device_train_batch_size


def _pins_memory(args: Any) -> bool:
    return get_device().type != "cpu" and not args.use_cpu


def _logging_steps(args: Any) -> int:
    # Each log waits for an XLA device, which otherwise works while the host prepares the next steps.
    return 10 if get_device().type == "xla" else 1


def _accumulation(args: Any) -> int:
    return args.gradient_accumulation_steps


# Order matters where a value is computed from one above it.
DEFAULTS: tuple[Default, ...] = (
    Default("per_device_train_batch_size", 4, "what Unsloth scripts count on"),
    Default("gradient_accumulation_steps", 2, "what Unsloth scripts count on"),
    Default("per_device_eval_batch_size", _train_batch, "a batch that fits in training fits in evaluation"),
    Default("eval_accumulation_steps", _accumulation, "predictions leave the device before they fill it"),
    Default("learning_rate", 5e-5, "what Unsloth scripts count on"),
    Default("warmup_steps", 0.1, "a tenth of the steps; LoRA diverges easily from a cold start"),
    Default("weight_decay", 0.001, "adapters are small: a larger decay pulls them back to the base model"),
    Default("optim", _optimizer, "optimizer state in 8 bits takes a quarter of the memory"),
    Default("seed", 3407, "what Unsloth scripts count on"),
    Default("report_to", lambda args: [], "nothing leaves the machine unless asked"),
    Default("logging_steps", _logging_steps, "the loss of every step is in metrics.jsonl and in the report"),
    Default("logging_nan_inf_filter", False, "a NaN in the loss shows as NaN"),
    Default("dataloader_pin_memory", _pins_memory, "a CPU has no memory to pin, and torch warns about it"),
    Default("torch_empty_cache_steps", 250, "ragged lengths fragment the allocator's cache"),
)

# DeepSpeed copies these into its own configuration while the arguments are built, so they are left as they are there.
_MIRRORED_BY_DEEPSPEED = frozenset(
    {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "optim",
    }
)
_OPTION_ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def apply_defaults(args: Any, model: torch.nn.Module, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Give ``args`` the defaults of PantheraML, in place.

    Args:
        args: The trainer's config.
        model: The model to train.
        record: The model's record.
        explicit: Names of the options that the user chose.

    Raises:
        ArgumentError: a precision was asked for that contradicts the model's dtype.
        MissingDependencyError: an 8-bit optimizer was asked for and bitsandbytes is not installed.
    """
    options = {field.name for field in dataclasses.fields(args)}
    left_alone = explicit | (_MIRRORED_BY_DEEPSPEED if getattr(args, "deepspeed", None) else frozenset())
    for default in DEFAULTS:
        if default.name in options and default.name not in left_alone:
            value = default.value
            setattr(args, default.name, value(args) if isinstance(value, Callable) else value)  # type: ignore[arg-type]
    _settle_optimizer(args, explicit)
    _settle_output(args, explicit)
    _settle_precision(args, model, record, explicit)
    if "max_length" in options:
        _settle_length(args, record, explicit)
    if "router_aux_loss_coef" in options:
        _settle_balance(args, model, explicit)


def _settle_balance(args: Any, model: Any, explicit: frozenset[str]) -> None:
    """Ask for no balance between experts of a model that has none, of a family that may have some; TRL always would."""
    text = model.config.get_text_config()
    counts = [getattr(text, name) for name in EXPERT_COUNTS if hasattr(text, name)]
    if counts and not any(counts) and "router_aux_loss_coef" not in explicit:
        args.router_aux_loss_coef = 0.0


def _settle_optimizer(args: Any, explicit: frozenset[str]) -> None:
    eight_bit = "8bit" in str(args.optim.value)
    if eight_bit and not is_installed("bitsandbytes"):
        require("bitsandbytes", what=f"the optimizer {args.optim.value!r}")
    if "optim" not in explicit and not eight_bit and args.optim == OptimizerNames.ADAMW_TORCH:
        log.once("optimizer adamw_torch: bitsandbytes, which has the 8-bit one, cannot run here", key="optimizer")


def _settle_output(args: Any, explicit: frozenset[str]) -> None:
    if "output_dir" in explicit and args.output_dir:
        return
    args.output_dir = OUTPUT_DIR
    if not explicit & {"save_strategy", "save_steps"}:
        args.save_strategy = SaveStrategy.NO


def _settle_precision(args: Any, model: torch.nn.Module, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Autocast to the model's compute dtype on a GPU; none where it would change nothing but the speed."""
    chosen = explicit & {"bf16", "fp16"}
    for flag, other in (("bf16", torch.float16), ("fp16", torch.bfloat16)):
        if flag in chosen and getattr(args, flag) and record.dtype is other:
            raise ArgumentError(
                f"{flag}=True does not fit a model that computes in {str(other).removeprefix('torch.')}",
                where=type(args).__name__,
                hint=f"load the model with dtype of {flag}, or leave both bf16 and fp16 out",
            )
    if chosen or not get_device().is_gpu or args.use_cpu:
        return
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    set_precision(args, _autocast_dtype(record, trained, get_device()))


def _autocast_dtype(record: ModelRecord, trained: set[torch.dtype], device: Device) -> torch.dtype | None:
    """The dtype of autocast for a model whose trained weights have the dtypes ``trained``, or None."""
    if record.dtype is torch.float32:
        # Adapters of an fp32 model were asked to compute in fp32; full fine-tuning holds fp32 weights to round less.
        return torch.bfloat16 if record.full_finetuning and device.bfloat16 else None
    if trained == {record.dtype}:
        return None
    if record.dtype is torch.bfloat16 and device.bfloat16:
        return torch.bfloat16
    return torch.float16 if device.float16 else None


def set_precision(args: Any, dtype: torch.dtype | None) -> None:
    """Set the autocast dtype of a config that is already built: bf16, fp16 or None for no autocast."""
    args.bf16 = dtype is torch.bfloat16
    args.fp16 = dtype is torch.float16
    if hasattr(args, "mixed_precision"):
        args.mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


def _settle_length(args: Any, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Cap the sequence length at the model's; a smaller one that the user gave stays."""
    limit = record.max_seq_length
    if "max_length" not in explicit:
        args.max_length = limit or UNKNOWN_LENGTH
        if not limit:
            log.info(f"sequences are cut at {UNKNOWN_LENGTH} tokens: neither the model nor the config says how long")
    elif limit and args.max_length is not None and args.max_length > limit:
        log.info(f"max_length={args.max_length} reduced to {limit}, the max_seq_length that the model was loaded with")
        args.max_length = limit


def checkpointing_mode(args: Any, record: ModelRecord, explicit: frozenset[str]) -> bool | str:
    """Whether and how activations are recomputed.

    The model's own mode holds unless the user said otherwise to the trainer: False turns it off, True turns a model's
    False into plain recomputation.
    """
    named = {_OPTION_ALIASES.get(name, name) for name in explicit}
    if "gradient_checkpointing" not in named:
        return record.gradient_checkpointing
    wanted = bool(args.gradient_checkpointing)
    return (record.gradient_checkpointing or True) if wanted else False


def set_checkpointing(args: Any, value: bool) -> None:
    """Set the option under the name that this version of transformers reads, and its other name."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(args, name):
            setattr(args, name, value)


def has_checkpointing_kwargs(explicit: frozenset[str]) -> bool:
    """Whether the user gave arguments for ``torch.utils.checkpoint``, which only transformers' own route takes."""
    return bool(explicit & {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"})


@functools.cache
def eight_bit_optimizer_runs(device: Device) -> bool:
    """Whether bitsandbytes is installed and makes one 8-bit step on this device."""
    if not is_installed("bitsandbytes") or device.type not in ("cuda", "hip", "xpu", "cpu"):
        return False
    import bitsandbytes

    # Smaller parameters keep 32-bit state, which would prove nothing.
    weight = torch.nn.Parameter(torch.zeros(4096, device=device.torch_device))
    weight.grad = torch.ones_like(weight)
    try:
        bitsandbytes.optim.AdamW8bit([weight], lr=1.0).step()
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        log.get_logger().debug("8-bit optimizer: %s", error)
        return False
    return bool((weight != 0).all())

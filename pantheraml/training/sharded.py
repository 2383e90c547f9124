"""A trainer whose model is sharded over the ranks: when that happens, and what is written of it.

transformers and Accelerate drive the steps, clip the gradients and write sharded checkpoints (torch's DCP), since they
know FSDP2. The sharding itself is done here: Accelerate's holds every trained weight in float32 when it computes in
bf16, leaves 4-bit weights on every rank, and finds the parameters of an optimizer by the addresses of their memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from .. import env, log
from ..device import get_device
from ..errors import ConflictError, UnsupportedError
from ..models.activations import decoder_layers
from ..models.methods import write_whole
from ..models.record import ModelRecord
from ..parallel.fsdp import is_sharded, reshard, shard, whole
from ..parallel.parts import in_parts
from ..parallel.ranks import get_world_size
from .defaults import set_checkpointing

# By these Accelerate tells its later instances, and transformers' loader, to shard as well.
VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
# Optimizers whose kernels read a parameter's memory and know no shards.
_UNSHARDED_OPTIMIZERS = ("8bit", "4bit", "paged", "bnb", "galore", "apollo", "lomo", "muon")


def configure(args: Any, shard_size: int | None = None) -> None:
    """Switch on sharding in a config that is already built.

    Args:
        args: The trainer's config.
        shard_size: Number of ranks that share one model, default all.
    """
    if not args.fsdp:
        args.fsdp = True
        args.fsdp_config = {**(args.fsdp_config or {}), "version": 2}
        # transformers would recommend FSDP's recomputation, which the model's own plan takes the place of.
        recomputes = args.gradient_checkpointing
        set_checkpointing(args, False)
        with env.as_it_was(*VARIABLES):
            args.fsdp_plugin_args = args._process_fsdp_args()
        set_checkpointing(args, recomputes)
    if shard_size is not None:
        args.fsdp_config["shard_size"] = shard_size


def settle(args: Any, model: nn.Module, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Settle the options of a sharded run before the trainer is constructed; a model in shards makes it one.

    Raises:
        ConflictError: an option that the user chose does not go with sharding.
        UnsupportedError: the model cannot be sharded.
    """
    if in_parts(model):
        configure(args)
    if not getattr(args, "fsdp", None) or args.world_size == 1:
        return
    where = type(args).__name__
    config = args.fsdp_config or {}
    if int(config.get("version", 2)) != 2:
        raise UnsupportedError("FSDP1 is not supported", where=where, hint="leave fsdp_config['version'] out")
    if config.get("activation_checkpointing"):
        raise ConflictError(
            "fsdp_config has activation_checkpointing, and the model has a plan of its own for its activations",
            where=where,
            hint="leave it out; use_gradient_checkpointing of the loader says what is recomputed",
        )
    if record.quantization not in ("none", "nf4", "fp4"):
        raise UnsupportedError(
            f"a model loaded in {record.quantization} cannot be sharded",
            where=where,
            hint="load it in 16 bits or with load_in_4bit=True, or leave fsdp out: every GPU then holds a copy",
        )
    name = str(getattr(args.optim, "value", args.optim))
    if any(part in name for part in _UNSHARDED_OPTIMIZERS):
        if "optim" in explicit:
            raise ConflictError(
                f"optim={name!r} does not work on sharded weights",
                where=where,
                hint="use optim='adamw_torch_fused': its state is sharded too",
            )
        args.optim = OptimizerNames.ADAMW_TORCH_FUSED if get_device().is_gpu else OptimizerNames.ADAMW_TORCH


def install(trainer: Any, record: ModelRecord) -> None:
    """Let a constructed trainer shard its model when it first trains or evaluates, and save it whole.

    A model that was loaded in shards, which cannot run as it is, is sharded here.

    Args:
        trainer: A trainer of one of our models.
        record: The model's record.

    Raises:
        ConflictError: an optimizer was given that holds the weights as they are now.
    """
    if get_device().type == "cpu" and getattr(trainer.args, "fsdp", None) and trainer.args.world_size > 1:
        _enable_on_cpu(trainer)
    if not getattr(trainer, "is_fsdp_enabled", False):
        return
    if trainer.optimizer is not None:
        raise ConflictError(
            "an optimizer was given, and it holds the weights from before they are sharded",
            where=type(trainer).__name__,
            hint="choose it by optim= in the training arguments",
        )
    accelerator = trainer.accelerator
    plugin = accelerator.state.fsdp_plugin
    if not trainer.args.save_only_model:
        # One file of shards for each rank, which any number of ranks can read.
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type(StateDictType.SHARDED_STATE_DICT)
    if record.full_finetuning:
        # Otherwise every rank would hold the gradients of all weights between the steps.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    trainer.add_callback(_Fresh())
    _prepare_sharded(trainer)
    _save_whole(trainer)
    if in_parts(trainer.model):
        apply(trainer)


class _Fresh(TrainerCallback):
    """Lets go of gathered weights before they change: a forward that no backward followed has left some."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the gathered weights of every unit."""
        if is_sharded(kwargs["model"]):
            reshard(kwargs["model"])


def _enable_on_cpu(trainer: Any) -> None:
    """Switch on what Accelerate has for accelerators alone, so that CPU ranks try the same out."""
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def apply(trainer: Any) -> None:
    """Shard the trainer's model unless that was done; void for one that is not to be sharded."""
    if not getattr(trainer, "is_fsdp_enabled", False):
        return
    if is_sharded(trainer.model):
        reshard(trainer.model)  # optimizers are made of the shards
        return
    model, plugin = trainer.model, trainer.accelerator.state.fsdp_plugin
    device = get_device()
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else None
    # Dense layers go to the device one at a time as they are sharded. 4-bit ones have their scales to bring along.
    if device.is_gpu and getattr(model, "is_loaded_in_4bit", False):
        misplaced = any(p.device != device.torch_device for p in model.parameters())
        if misplaced and offload is None:
            model.to(device.torch_device)
    compute = _compute_dtype(model, trainer.accelerator.mixed_precision)
    config = trainer.args.fsdp_config or {}
    shard(
        model,
        decoder_layers(model),
        compute_dtype=compute,
        reshard_after_forward=plugin.reshard_after_forward if "reshard_after_forward" in config else None,
        offload=offload,
        shard_size=config.get("shard_size"),
    )
    write_whole(model)
    log.once(f"the model is sharded over {get_world_size()} ranks", key="sharded")


def _compute_dtype(model: nn.Module, precision: str) -> torch.dtype | None:
    """Dtype in which float32 weights that are all trained are computed with in mixed precision, or None."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    everything = all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters())
    return dtype if everything else None


def _prepare_sharded(trainer: Any) -> None:
    """Accelerate's ``prepare`` takes the model as it was sharded here, with an optimizer made of its shards."""
    accelerator = trainer.accelerator
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepared(*objects: Any, **keywords: Any) -> Any:
        if not any(one is trainer.model for one in objects):
            return prepare(*objects, **keywords)
        apply(trainer)
        results = [_prepared(trainer, one) for one in objects]
        return results[0] if len(results) == 1 else tuple(results)

    accelerator.prepare = prepared


def _prepared(trainer: Any, one: Any) -> Any:
    accelerator = trainer.accelerator
    if isinstance(one, torch.optim.Optimizer):
        return accelerator.prepare_optimizer(one)
    if one is trainer.model and not any(known is one for known in accelerator._models):
        # Autocast around its forward; nothing is wrapped or moved.
        accelerator.prepare_model(one, device_placement=False, evaluation_mode=True)
    return one


def _save_whole(trainer: Any) -> None:
    """``save_model`` writes the model as an unsharded trainer does; a checkpoint holds the shards of a full model."""
    original_save = trainer._save

    @functools.wraps(trainer.save_model)
    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        adapters = isinstance(trainer.model, PeftModel)
        if _internal_call and not adapters and not trainer.args.save_only_model:
            return
        with whole(trainer.model, trained_only=adapters) as here:
            if here:
                original_save(output_dir)

    trainer.save_model = save_model

"""What a trainer of one of our models needs when it is one of several processes, or has several GPUs to itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from .. import env, log
from ..errors import ConflictError, UnsupportedError
from ..parallel.batches import evened
from ..parallel.config import MultiGPUConfig
from ..parallel.ddp import ddp_options
from ..parallel.first import patient
from ..parallel.process_group import launch_hint, leave_at_exit
from . import sharded

_DATASETS = ("train_dataset", "eval_dataset")


def context_size(args: Any) -> int:
    """How many ranks share each sequence; 1 unless the arguments say otherwise."""
    return getattr(args, "context_parallel", None) or 1


def devices_of(model: nn.Module) -> int:
    """On how many devices the layers of a model are spread, 1 for one that was loaded onto one."""
    places = getattr(model, "hf_device_map", None)
    return len(set(places.values())) if isinstance(places, dict) else 1


def settle(args: Any, model: nn.Module, explicit: frozenset[str]) -> None:
    """Settle the options of a run that depend on the launch, before the trainer is constructed.

    Args:
        args: The trainer's config.
        model: The model to train.
        explicit: Names of the options that the user chose.

    Raises:
        ConflictError: the launch has several processes, and the trainer would train in each of them apart.
        UnsupportedError: the arguments ask for tensor, context or sequence parallelism.
    """
    if env.world_size() > 1 and args.world_size == 1:
        raise ConflictError(
            f"this launch has {env.world_size()} processes, and the trainer sees one",
            where=type(args).__name__,
            why="Accelerate reads torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
            hint="start with torchrun (inside srun too), and import pantheraml before the training arguments are made",
        )
    _refuse_dimensions(args)
    if args.world_size > 1:
        for name, value in ddp_options(model).items():
            if f"ddp_{name}" not in explicit and getattr(args, f"ddp_{name}") is None:
                setattr(args, f"ddp_{name}", value)
        return
    if args.n_gpu > 1 and devices_of(model) == 1:
        # transformers would copy the model to every GPU in threads of this process (nn.DataParallel), which is slow
        # and loses the loss's normalisation by tokens.
        log.once(f"training on one of {args.n_gpu} GPUs; for all of them: {launch_hint(args.n_gpu)}", key="one GPU")
        args._n_gpu = 1


def _refuse_dimensions(args: Any) -> None:
    """Refuse ways of dividing one model's work that the fused layers do not know."""
    config = getattr(args, "parallelism_config", None)
    for name, title in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(config, name, None)
        if size is not None and size > 1:
            raise UnsupportedError(
                f"{name}={size}: {title} parallelism of Accelerate's kind is not available in this release",
                where=f"{type(args).__name__}(parallelism_config=...)",
                hint="fsdp=True shards a model that is too large; context_parallel=2 divides long sequences",
            )


def apply_config(args: Any, config: MultiGPUConfig) -> None:
    """Write what a config says into the training arguments.

    Raises:
        ConflictError: the arguments say something else.
    """
    if config.find_unused_parameters:
        if args.ddp_find_unused_parameters is False:
            raise ConflictError(
                "find_unused_parameters=True, and ddp_find_unused_parameters=False in the arguments",
                where="MultiGPUConfig",
                hint="leave one out",
            )
        args.ddp_find_unused_parameters = True
    if config.context_parallel > 1:
        if context_size(args) not in (1, config.context_parallel):
            raise ConflictError(
                f"context_parallel={config.context_parallel}, and {context_size(args)} in the arguments",
                where="MultiGPUConfig",
                hint="leave one out",
            )
        args.context_parallel = config.context_parallel
    if not config.use_gradient_checkpointing:
        args.gradient_checkpointing = False
    if config.strategy == "fsdp":
        sharded.configure(args, config.shard_size)
    elif config.strategy == "ddp" and args.fsdp:
        raise ConflictError(
            "strategy='ddp', and the training arguments have fsdp", where="MultiGPUConfig", hint="leave one out"
        )


@contextlib.contextmanager
def preparing(arguments: dict[str, Any]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Around everything that prepares data sets: no wait in it ends with the timeout of the collectives.

    Args:
        arguments: The trainer's arguments.

    Yields:
        What makes the context in which the main process is first, as far as that matters.
    """
    given = [arguments.get(name) for name in _DATASETS]
    parts = [part for one in given for part in (one.values() if isinstance(one, dict) else [one])]
    on_disk = any(isinstance(part, Dataset) and part.cache_files for part in parts)
    with patient(ordered=on_disk) as turn:
        yield turn


def tell_failure(trainer: Any, error: BaseException) -> None:
    """Say which rank of a launch failed, and in which step; the others will only see that it is gone."""
    args, state = trainer.args, trainer.state
    if args.world_size > 1 and not isinstance(error, KeyboardInterrupt | SystemExit):
        first = next(iter(str(error).splitlines()), "")
        step = f"step {state.global_step + 1}" + (f" of {state.max_steps}" if state.max_steps > 0 else "")
        log.get_logger().error(
            f"rank {args.process_index} of {args.world_size} failed in {step}: {type(error).__name__}: {first}"
        )


def complete(trainer: Any) -> None:
    """Complete a constructed trainer for a launch: even batches at the end of an epoch, and a quiet end."""
    ranks = trainer.args.world_size
    if ranks == 1:
        return
    leave_at_exit()
    if hasattr(trainer.args, "dataset_text_field") and context_size(trainer.args) == 1:
        _deal_rows_evenly(trainer, ranks)


def before_training(trainer: Any) -> None:
    """Let Accelerate wrap a model that it prepared for an evaluation, which it takes for one that is wrapped.

    Each rank would train a model of its own. Goes when Accelerate's ``prepare_model`` heeds ``evaluation_mode`` there.
    """
    if trainer.args.world_size > 1 and not getattr(trainer, "is_fsdp_enabled", False):
        vars(trainer.model).pop("_is_accelerate_prepared", None)


def _deal_rows_evenly(trainer: Any, ranks: int) -> None:
    """Give the training loader batches that hold every row once."""
    configuration = trainer.accelerator.dataloader_config
    if not (configuration.split_batches or configuration.dispatch_batches):
        change_loader(trainer, "get_train_dataloader", lambda loader: evened(loader, ranks))


def change_loader(trainer: Any, method: str, change: Callable[[DataLoader[Any]], DataLoader[Any]]) -> None:
    """Change the loaders that a method of the trainer makes, before Accelerate prepares them."""
    accelerator, make_loader = trainer.accelerator, getattr(trainer, method)
    prepare = accelerator.prepare_data_loader

    @functools.wraps(make_loader)
    def get_dataloader(*args: Any, **kwargs: Any) -> DataLoader[Any]:
        def prepare_changed(loader: DataLoader[Any], *rest: Any, **options: Any) -> Any:
            return prepare(change(loader), *rest, **options)

        accelerator.prepare_data_loader = prepare_changed
        try:
            return make_loader(*args, **kwargs)
        finally:
            accelerator.prepare_data_loader = prepare

    setattr(trainer, method, get_dataloader)

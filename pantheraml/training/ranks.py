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
from ..errors import ConflictError
from ..parallel.batches import evened
from ..parallel.ddp import ddp_options
from ..parallel.first import patient
from ..parallel.process_group import launch_hint, leave_at_exit

_DATASETS = ("train_dataset", "eval_dataset")


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
    """
    if env.world_size() > 1 and args.world_size == 1:
        raise ConflictError(
            f"this launch has {env.world_size()} processes, and the trainer sees one",
            where=type(args).__name__,
            why="Accelerate reads torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
            hint="start with torchrun (inside srun too), and import pantheraml before the training arguments are made",
        )
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


def complete(trainer: Any) -> None:
    """Complete a constructed trainer for a launch: even batches at the end of an epoch, and a quiet end."""
    ranks = trainer.args.world_size
    if ranks == 1:
        return
    leave_at_exit()
    if hasattr(trainer.args, "dataset_text_field"):
        _deal_rows_evenly(trainer, ranks)


def _deal_rows_evenly(trainer: Any, ranks: int) -> None:
    """Give the training loader batches that hold every row once."""
    accelerator, make_loader = trainer.accelerator, trainer.get_train_dataloader
    prepare = accelerator.prepare_data_loader
    configuration = accelerator.dataloader_config
    if configuration.split_batches or configuration.dispatch_batches:
        return

    @functools.wraps(make_loader)
    def get_train_dataloader() -> DataLoader[Any]:
        def prepare_evened(loader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
            return prepare(evened(loader, ranks), *args, **kwargs)

        accelerator.prepare_data_loader = prepare_evened
        try:
            return make_loader()
        finally:
            accelerator.prepare_data_loader = prepare

    trainer.get_train_dataloader = get_train_dataloader

"""What training on XLA devices needs: batches of fixed shapes, no reading from the device between two logs.

A program is compiled for each shape and each sequence of operations, and the host runs ahead of the device until it
asks for a value. So every batch has one of a few shapes, every step runs the same program, and losses, norms and counts
stay on the device until they are logged, all in one transfer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_xla_available

from .. import xla_runtime
from ..device import get_device
from ..errors import ArgumentError, ConflictError, DataError, UnsupportedError
from ..models.attention.xla import isolated_documents
from ..models.record import ModelRecord
from ..parallel import xla
from .defaults import has_checkpointing_kwargs, set_precision
from .deferred import Figures
from .device_guard import DeviceGuard

IGNORED = -100
# Lengths are rounded up to what the matrix unit takes at once.
LANES = 128
# Optimizers whose step is made of operations that XLA has.
OPTIMIZERS = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
    }
)
# Neighbouring seeds and steps draw unlike numbers.
_SEED_FACTORS = (1_000_003, 7_368_787)
_NO_RATE = 1e-30
_FILL = {"labels": IGNORED, "attention_mask": 0, "completion_mask": 0, "assistant_masks": 0, "token_type_ids": 0}


def settle(trainer: Any, args: Any, record: ModelRecord, explicit: frozenset[str]) -> None:
    """Before the construction: options that XLA needs otherwise, and those that it cannot honour.

    Raises:
        UnsupportedError: an option or a trainer that is not offered on XLA devices.
        ConflictError: transformers would train on another device than this process computes on.
    """
    if get_device().type != "xla":
        if is_torch_xla_available():
            raise ConflictError(
                f"torch_xla is installed, so transformers would train on it, and this process computes on "
                f"{get_device().type}",
                where=type(args).__name__,
                hint="set USE_TORCH_XLA=0 before Python starts, or PJRT_DEVICE to train on XLA devices",
            )
        return
    where = type(args).__name__
    if not hasattr(args, "dataset_text_field"):
        raise UnsupportedError(
            f"{type(trainer).__name__} is not offered on XLA devices",
            where=type(trainer).__name__,
            hint="use SFTTrainer",
        )
    xla.setup_multi_tpu()
    if args.optim not in OPTIMIZERS:
        raise UnsupportedError(
            f"optim={args.optim.value!r} does not run on XLA devices",
            where=where,
            hint=f"use {', '.join(sorted(repr(name.value) for name in OPTIMIZERS))}, or leave it out",
        )
    if args.fp16 and "fp16" in explicit:
        raise UnsupportedError("fp16=True: XLA devices train in bf16", where=where, hint="leave it out")
    if args.bf16 and "bf16" in explicit and record.dtype is not torch.bfloat16:
        raise UnsupportedError(
            f"bf16=True, and the model was loaded in {str(record.dtype).removeprefix('torch.')}",
            where=where,
            why="on XLA devices a model computes in the dtype that it is held in",
            hint="load it with dtype=torch.bfloat16, or leave bf16 out",
        )
    # bf16=True would let Accelerate hold everything in bf16, the adapters and the optimizer's moments included.
    set_precision(args, None)
    for name in ("fsdp", "deepspeed", "torch_compile", "activation_offloading", "use_liger_kernel", "assistant_only"):
        if getattr(args, name, None) and name in explicit:
            raise UnsupportedError(f"{name} is not offered on XLA devices", where=where, hint="leave it out")
    if has_checkpointing_kwargs(explicit):
        raise UnsupportedError(
            "gradient_checkpointing_kwargs are for torch's checkpointing, which does not run on XLA devices",
            where=where,
            hint="leave them out: use_gradient_checkpointing of the model decides",
        )
    args.torch_empty_cache_steps = None
    args.dataloader_pin_memory = False


def complete(trainer: Any, figures: Figures | None, guard: DeviceGuard) -> None:
    """After the construction: shapes, placement and reading, on this trainer's instance."""
    mesh = xla.current_mesh()
    xla.place(trainer.model)
    trainer._train_batch_size = trainer.args.per_device_train_batch_size * mesh.shape[xla.FSDP]
    # One process sees whole tensors: there is nothing to gather.
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = trainer.gather_function = _itself
    _fix_shapes(trainer, mesh)
    _isolate_documents(trainer)
    _run_micro_batches_apart(trainer)
    _keep_optimizer_on_device(trainer)
    _read_together(trainer, figures, guard)
    _save_from_host(trainer)


def _itself(data: Any, *args: Any, **kwargs: Any) -> Any:
    return data


# ---------------------------------------------------------------- shapes


class FixedShape:
    """A collator whose batches have one of a few shapes; what it adds has no labels and is seen by nobody.

    Args:
        collate: The trainer's collator.
        lengths: Lengths in tokens that rows are padded to, ascending.
        rows: Rows of a batch.
        pad_token_id: Token of the padding.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], lengths: Sequence[int], rows: int, pad_token_id: int
    ) -> None:
        self.collate = collate
        self.lengths = tuple(lengths)
        self.rows = rows
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Collate rows, and pad them and their number."""
        batch = dict(self.collate(rows))
        length = batch["input_ids"].shape[1]
        target = next((bucket for bucket in self.lengths if bucket >= length), None)
        if target is None:
            raise DataError(
                f"a row has {length} tokens, and the longest shape is {self.lengths[-1]}",
                where="length_buckets",
                hint="leave length_buckets out, or cut rows with max_length",
            )
        count = batch["input_ids"].shape[0]
        fixed = {}
        for name, value in batch.items():
            if not isinstance(value, torch.Tensor) or value.shape != batch["input_ids"].shape:
                raise UnsupportedError(
                    f"a batch holds {name!r}, which is not of shape [rows, tokens]",
                    where=type(self.collate).__name__,
                    why="batches on XLA devices have fixed shapes",
                    hint="train text alone",
                )
            fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
            whole = value.new_full((self.rows, target), fill)
            whole[:count, :length] = value
            fixed[name] = whole
        if "position_ids" in fixed and "labels" in fixed:
            # The first token of a document is not predicted from the document before it.
            fixed["labels"][fixed["position_ids"] == 0] = IGNORED
        return fixed


def lengths_of(trainer: Any, datasets: Sequence[Any]) -> tuple[int, ...]:
    """The lengths that batches of a trainer are padded to: the config's, or one that all of its rows fit."""
    assert xla._setup is not None
    buckets, limit = xla._setup.config.length_buckets, trainer.args.max_length
    if buckets is not None:
        return tuple(buckets)
    longest = 0
    for dataset in datasets:
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names and not trainer.args.packing:
            longest = max(longest, _longest_row(dataset))
        elif dataset is not None and limit is None:
            raise ArgumentError(
                "max_length is None, and how long rows get cannot be told in advance",
                where=type(trainer.args).__name__,
                hint="pass max_length",
            )
        elif dataset is not None:
            longest = limit
    rounded = -(-longest // LANES) * LANES
    return (rounded if limit is None or longest > limit else min(rounded, limit),)


def _longest_row(dataset: Dataset) -> int:
    import pyarrow.compute as pc

    rows: Any = dataset.select_columns(["input_ids"]).with_format("arrow")
    batches = rows.iter(10_000)
    return max((pc.max(pc.list_value_length(batch["input_ids"])).as_py() or 0 for batch in batches), default=0)  # type: ignore[index]


def _fix_shapes(trainer: Any, mesh: xla_runtime.Mesh) -> None:
    """Batches of fixed shapes for all cores together, each core receiving its rows."""
    data = mesh.shape[xla.FSDP]
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False):
        # Packed rows stay rows, with positions that tell the documents apart.
        collator.padding_free = trainer.padding_free = False
        collator.return_position_ids = True

    def fixed(
        make: Callable[..., Any], option: str, datasets: Callable[[tuple[Any, ...]], list[Any]]
    ) -> Callable[..., Any]:
        @functools.wraps(make)
        def make_loader(*args: Any, **kwargs: Any) -> Any:
            original, config = trainer.data_collator, trainer.args
            per_device = getattr(config, option)
            rows = per_device * data
            pad = getattr(original, "pad_token_id", None)
            pad = pad if pad is not None else trainer.processing_class.pad_token_id
            trainer.data_collator = FixedShape(original, lengths_of(trainer, datasets(args)), rows, pad)
            if option == "per_device_eval_batch_size":
                setattr(config, option, rows)
            try:
                loader = make(*args, **kwargs)
            finally:
                trainer.data_collator = original
                setattr(config, option, per_device)
            sharding = mesh.input_sharding((xla.FSDP, None))
            if sharding is not None:
                loader._parallel_loader_kwargs["input_sharding"] = sharding
            return loader

        return make_loader

    def given(args: tuple[Any, ...]) -> list[Any]:
        dataset = args[0] if args and args[0] is not None else trainer.eval_dataset
        if isinstance(dataset, str):
            dataset = trainer.eval_dataset[dataset]
        return list(dataset.values()) if isinstance(dataset, dict) else [dataset]

    trainer.get_train_dataloader = fixed(
        trainer.get_train_dataloader, "per_device_train_batch_size", lambda args: [trainer.train_dataset]
    )
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        setattr(trainer, name, fixed(getattr(trainer, name), "per_device_eval_batch_size", given))


def _isolate_documents(trainer: Any) -> None:
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def isolating(model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with isolated_documents(inputs.get("position_ids")):
            return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = isolating


# ---------------------------------------------------------------- programs


def _run_micro_batches_apart(trainer: Any) -> None:
    """One program for a micro-batch and one for the last of a step with its update, however many are accumulated.

    Each draws its random numbers from the run's seed and its number, so that a resumed run draws those of the first.
    """
    training_step = trainer.training_step
    # Optimizer step and number of the micro-batch in it.
    place = [-1, 0]

    @functools.wraps(training_step)
    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        done = trainer.state.global_step
        place[:] = [done, place[1] + 1 if place[0] == done else 0]
        number = done * trainer.args.gradient_accumulation_steps + place[1]
        xla_runtime.seed((trainer.args.seed * _SEED_FACTORS[0] + number * _SEED_FACTORS[1]) % 2**31)
        loss = training_step(*args, **kwargs)
        if not trainer.accelerator.sync_gradients:
            xla_runtime.sync()
        return loss

    trainer.training_step = step


def _keep_optimizer_on_device(trainer: Any) -> None:
    """Count the optimizer's steps on the device.

    On the host, Adam's bias corrections are numbers of the program that reach exactly 1 after some hundred steps, and 1
    is compiled into the program: the step would be compiled once more.
    """
    create_optimizer = trainer.create_optimizer

    @functools.wraps(create_optimizer)
    def create(*args: Any, **kwargs: Any) -> Any:
        created = trainer.optimizer is None
        optimizer = create_optimizer(*args, **kwargs)
        if created and "capturable" in optimizer.defaults:
            for group in optimizer.param_groups:
                group["capturable"] = True
            optimizer.register_step_pre_hook(_replace_zero_rates)
            optimizer.register_step_post_hook(_put_zero_rates_back)
        return optimizer

    trainer.create_optimizer = create


def _replace_zero_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Such an Adam divides by the learning rate, and 0/0 is NaN where a weight had no gradient. Warm-ups begin with 0.

    The rate that takes its place is lost in rounding.
    """
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            group["lr"] = _NO_RATE


def _put_zero_rates_back(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group["lr"] == _NO_RATE:
            group["lr"] = 0.0


# ---------------------------------------------------------------- reading


def _read_together(trainer: Any, figures: Figures | None, guard: DeviceGuard) -> None:
    """Everything that is logged comes from the device in one transfer. transformers reads each by itself."""
    original = trainer._maybe_log_save_evaluate
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def log_save_evaluate(*args: Any, **kwargs: Any) -> Any:
        control, state = trainer.control, trainer.state
        # Every step ends here, logged or not, so that its program is the same.
        xla_runtime.sync()
        logs = control.should_log and state.global_step > trainer._globalstep_last_logged
        if logs or control.should_save or control.should_evaluate:
            given = parameters.bind(*args, **kwargs).arguments
            norm = given["grad_norm"]
            norm = norm if isinstance(norm, torch.Tensor) or norm is None else torch.tensor(norm)
            wanted = [*guard.facts(), trainer._tr_loss, *([] if norm is None else [norm])]
            read = figures.settle(wanted) if figures is not None else xla_runtime.read(wanted)
            facts, loss = read[: len(guard.facts())], read[len(guard.facts())]
            norm = norm if norm is None else read[-1]
            guard.check(facts)
            if logs:
                _log(trainer, float(loss), norm, given)
        return original(*args, **kwargs)

    trainer._maybe_log_save_evaluate = log_save_evaluate


def _log(trainer: Any, loss: float, norm: Any, given: Mapping[str, Any]) -> None:
    """What transformers does with the figures of a step, from figures that are on the host."""
    state = trainer.state
    logs = {"loss": loss / (state.global_step - trainer._globalstep_last_logged)}
    if norm is not None:
        logs["grad_norm"] = float(norm)
    rate = given.get("learning_rate")
    logs["learning_rate"] = trainer._get_learning_rate() if rate is None else rate
    trainer._tr_loss = xla_runtime.upload(torch.tensor(0.0))
    trainer._total_loss_scalar += loss
    trainer._globalstep_last_logged = state.global_step
    trainer.store_flos()
    trainer.log(logs, given["start_time"])


# ---------------------------------------------------------------- saving


def _save_from_host(trainer: Any) -> None:
    """Write checkpoints from copies on the host; states that are read back are divided again."""
    load = trainer._load_optimizer_and_scheduler

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        xla.save_pretrained(trainer.model, str(folder))
        if xla.is_tpu_main_process():
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)

    def save_optimizer_and_scheduler(output_dir: str) -> None:
        states = xla.host_copy([trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()])
        if xla.is_tpu_main_process():
            for state, name in zip(states, (OPTIMIZER_NAME, SCHEDULER_NAME), strict=True):
                torch.save(state, Path(output_dir) / name)

    @functools.wraps(load)
    def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
        load(checkpoint)
        if checkpoint is not None:
            xla.divide_states(getattr(trainer.optimizer, "optimizer", trainer.optimizer))

    trainer.save_model = save_model
    trainer._save_optimizer_and_scheduler = save_optimizer_and_scheduler
    trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler

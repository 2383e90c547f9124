"""A trainer whose sequences are divided over ranks: what it refuses, its batches, and its loss.

Each rank computes the loss of its tokens, divided by the number of those of all ranks, so that gradients averaged over
all ranks, by DDP or FSDP, are those of one process.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import TrainerCallback

from .. import log
from ..device import get_device
from ..errors import ConflictError, DataError, UnsupportedError
from ..models.attention import NAME
from ..models.balance import balance_over_ranks
from ..models.checkpointing import inner_model
from ..models.fused_head import fused_head_of
from ..parallel.batches import IGNORED, shared
from ..parallel.context import (
    DIVISION,
    ContextGroup,
    DividingCollator,
    Division,
    context_group,
    current,
    divide,
    dividing,
)
from ..parallel.ranks import get_world_size
from .deferred import sft_trainer
from .isolation import evaluating, tolerance
from .ranks import change_loader, context_size

_INSTALLED = "_pantheraml_context"
_LOADERS = ("train", "eval", "test")
# Attention that looks at what documents and windows tell, and nothing else.
_KINDS = frozenset({"full_attention", "sliding_attention"})
# Rotations that depend on the largest position of a batch, which a share of it does not tell.
_ROTATIONS = frozenset({"dynamic", "longrope"})
# Tokens of each rank in the check.
_SHARE = 8


def settle(trainer: Any, arguments: dict[str, Any]) -> None:
    """Before the construction: refuse what is not right, or cannot be known to be right, when sequences are divided.

    Args:
        trainer: The instance that is about to be constructed.
        arguments: Its keyword arguments.

    Raises:
        ConfigError: the ranks cannot be divided into groups.
        ConflictError: an option does not go with it.
        UnsupportedError: the model, the trainer or the data cannot be divided.
    """
    args = arguments["args"]
    size = context_size(args)
    if size == 1:
        return
    where = f"context_parallel={size}"
    ranks = get_world_size()
    if ranks == 1:
        raise ConflictError(
            "sequences are divided over the processes of a launch, and this is a single process",
            where=where,
            hint=f"start with torchrun --nproc_per_node={size}, or leave context_parallel out",
        )
    obstacle = _obstacle_of_model(arguments["model"], size) or next(_obstacles(trainer, arguments), None)
    if obstacle is not None:
        raise UnsupportedError(
            "sequences cannot be divided over ranks here",
            where=where,
            why=obstacle,
            hint="leave context_parallel out; fsdp=True and use_gradient_checkpointing='offload' make room too",
        )
    context_group(size)
    log.once(f"each sequence is shared by {size} of the {ranks} processes", key="context")


def _obstacle_of_model(model: Any, size: int) -> str | None:
    inner = inner_model(model)
    config: Any = inner.config
    kind = type(inner).__name__
    if get_device().type == "xla":
        return "TPU cores have no exchange of this kind"
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return f"{kind} takes more than one sequence of text"
    if config._attn_implementation != NAME:
        return f"the model has attn_implementation={config._attn_implementation!r}, and only {NAME!r} exchanges"
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"{kind} has layers of {', '.join(sorted(kinds)) or 'chunked attention'}"
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return f"{kind} counts positions by itself"
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    ropes = {rope.get("rope_type") for rope in (parameters, *parameters.values()) if isinstance(rope, dict)}
    if not ropes.isdisjoint(_ROTATIONS) and not _rotations(inner):
        return f"{kind} turns queries and keys by the largest position of a batch in a way of its own"
    if config.num_attention_heads % size:
        return f"the number of attention heads, {config.num_attention_heads}, is not a multiple of {size}"
    if any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values()):
        return "tokens are put before each sequence (prompt learning)"
    return None


def _obstacles(trainer: Any, arguments: dict[str, Any]) -> Iterator[str]:
    args = arguments["args"]
    if sft_trainer(trainer) is None:
        yield f"{type(trainer).__name__} is no SFTTrainer, whose loss is a sum over tokens"
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if arguments.get(name) is not None:
            yield f"{name} wants the whole sequences"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor wants the logits of whole sequences"
    if args.neftune_noise_alpha is not None:
        yield "the noise of NEFTune depends on the length of the rows"
    if not args.average_tokens_across_devices:
        yield "average_tokens_across_devices=False: each rank would weigh its tokens by itself"
    if args.torch_compile:
        yield "torch_compile=True: the exchange between ranks is not compiled"
    configuration = args.accelerator_config
    if configuration.split_batches or configuration.dispatch_batches:
        yield "accelerator_config has split_batches or dispatch_batches"
    for name in ("train_dataset", "eval_dataset"):
        given = arguments.get(name)
        if any(isinstance(part, IterableDataset) for part in (given.values() if isinstance(given, dict) else [given])):
            yield f"{name} is a stream"


def _rotations(model: nn.Module) -> list[nn.Module]:
    """The modules whose angles depend on the largest position that they are given, as transformers makes them."""
    found = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if not _ROTATIONS.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds]):
            found.append(module)
    return found


def _add_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before such a module: give it the largest position of all ranks too."""
    divided = current()
    if divided is None:
        return None
    names = ("x", "position_ids", *range(2, len(args)))
    call = {**dict(zip(names, args)), **kwargs}
    positions = call["position_ids"]
    last = positions.new_full((positions.shape[0], 1), divided.division.last)
    return (call["x"], torch.cat([positions, last], 1), *args[2:]), {
        name: value for name, value in kwargs.items() if name not in names
    }


def _drop_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """After it: forget the angles of that position."""
    return None if current() is None else tuple(x[:, :-1].contiguous() for x in output)


def install(trainer: Any) -> None:
    """After the construction: give the ranks of a group the same rows, and each its share of their tokens.

    Raises:
        UnsupportedError: the trainer's loss is not the sum over tokens.
    """
    size = context_size(trainer.args)
    if size == 1:
        return
    group = context_group(size)
    if fused_head_of(inner_model(trainer.model)) is None:
        raise UnsupportedError(
            "the loss of this trainer cannot be divided over ranks",
            where=f"context_parallel={size}",
            why="its output layer runs as TRL has it",
            hint="leave context_parallel out",
        )
    vars(trainer)[_INSTALLED] = group
    for name in _LOADERS:
        change_loader(trainer, f"get_{name}_dataloader", functools.partial(_divided, group, training=name == "train"))
    for module in _rotations(trainer.model):
        module.register_forward_pre_hook(_add_last, with_kwargs=True)
        module.register_forward_hook(_drop_last)
    _divide_loss(trainer, group)


def check_installed(trainer: Any) -> None:
    """Before training: see that a division that was asked for is there.

    Raises:
        UnsupportedError: the model was not loaded by PantheraML.
    """
    size = context_size(trainer.args)
    if size > 1 and _INSTALLED not in vars(trainer):
        raise UnsupportedError(
            "sequences of a model that PantheraML did not load cannot be divided over ranks",
            where=f"context_parallel={size}",
            hint="load it with FastLanguageModel.from_pretrained, or leave context_parallel out",
        )


def _divided(group: ContextGroup, loader: Any, *, training: bool) -> Any:
    changed = shared(loader, get_world_size() // group.size, group.size, training=training)
    changed.collate_fn = DividingCollator(changed.collate_fn, group)
    return changed


class _SameRows(TrainerCallback):
    """Sees before each step that the ranks of a group had the same rows, and shares of nothing else."""

    def __init__(self, group: ContextGroup) -> None:
        self.group = group
        self.pending: list[torch.Tensor] = []

    def note(self, division: Division, *, wait: bool) -> None:
        """Compare a batch between the ranks; unless it is waited for, the answer is read later."""
        self.pending.append(self.group.same(division.checksum))
        if wait:
            self.read()

    def read(self) -> None:
        """Read the answers.

        Raises:
            DataError: a batch was not the same.
        """
        pending, self.pending = self.pending, []
        if pending and not bool(torch.stack(pending).all()):
            raise DataError(
                "the ranks that share each sequence had different rows",
                where=f"context_parallel={self.group.size}",
                why="the data set, its order or the collator is not the same on all of them",
                hint="make data sets and samplers without a rank's own randomness",
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the answers of the step."""
        self.read()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the answers of an evaluation."""
        self.read()


def _divide_loss(trainer: Any, group: ContextGroup) -> None:
    original = trainer.compute_loss
    checked = False
    rows = _SameRows(group)
    trainer.add_callback(rows)

    @functools.wraps(original)
    def compute_loss(
        model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        nonlocal checked
        inputs = dict(inputs)
        division = inputs.pop(DIVISION, None)
        if division is None or return_outputs:
            raise UnsupportedError(
                "what several ranks share gives a loss, and no outputs"
                if return_outputs
                else "this batch is not divided over the ranks that share each sequence",
                where=f"context_parallel={group.size}",
                hint="call train() and evaluate(); the model itself takes whole sequences",
            )
        # Before the first exchange: messages of different sizes would be waited for in vain.
        rows.note(division, wait=not checked)
        if not checked:
            _check(trainer, group)
            checked = True
        with dividing(group, division):
            loss = original(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None:
            # The trainer has scaled it for gradients that are averaged over all ranks.
            return loss
        # Of an evaluation, whose batches are normalised one by one: here by the tokens of each rank.
        tokens = (inputs["shift_labels"] != IGNORED).sum()
        total, of_all = group.sum(torch.stack([loss * tokens, tokens.to(loss.dtype)]))
        return total / of_all.clamp(min=1)

    trainer.compute_loss = compute_loss


def _balance_of(result: Any, model: Any) -> torch.Tensor:
    """The balance of experts' load of a forward of a share."""
    divided = current()
    assert divided is not None
    config: Any = inner_model(model).config
    return balance_over_ranks(result.router_logits, config.get_text_config().num_experts_per_tok, None, divided)


def _check(trainer: Any, group: ContextGroup) -> None:
    """Run two packed documents whole and divided: the outputs must be the same but for rounding.

    Raises:
        UnsupportedError: the model mixes tokens otherwise than by attention.
    """
    model: Any = trainer.model
    length = _SHARE * group.size
    first = length // 2 - 1
    ids = torch.arange(length) * 7 % model.get_input_embeddings().num_embeddings
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])
    batch = {"input_ids": ids[None], "labels": ids[None], "position_ids": positions[None]}
    share = divide(batch, group.rank, group.size)
    names, options = ("input_ids", "position_ids"), {"use_cache": False}
    balanced = getattr(trainer, "aux_loss_enabled", False)
    if balanced:
        options["output_router_logits"] = True
    device = get_device().torch_device
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    mixed = torch.autocast(device.type, dtype, enabled=bool(trainer.args.bf16 or trainer.args.fp16))
    with evaluating(model), torch.no_grad(), mixed:
        whole = model(**{name: batch[name].to(device) for name in names}, **options)
        with dividing(group, share[DIVISION]):
            divided = model(**{name: share[name].to(device) for name in names}, **options)
            balance = _balance_of(divided, model) if balanced else None
    wanted = whole.logits[:, group.rank * _SHARE : (group.rank + 1) * _SHARE].float()
    moved = (divided.logits.float() - wanted).abs().max() / wanted.abs().max()
    agrees = bool(moved <= tolerance(trainer))
    if balanced and agrees:
        moved = (balance - whole.aux_loss).abs() / whole.aux_loss.abs()
        agrees = bool(moved <= tolerance(trainer))
    if not group.agree([agrees], least=True)[0]:
        raise UnsupportedError(
            f"{type(inner_model(model)).__name__} gives something else when its sequences are divided over ranks",
            where=f"context_parallel={group.size}",
            why=f"its outputs for two short documents differ by {float(moved):.3g} of the largest on this rank",
            hint="leave context_parallel out; fsdp=True and use_gradient_checkpointing='offload' make room too",
        )

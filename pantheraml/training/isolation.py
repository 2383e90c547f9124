"""Whether packed documents see one another: measured on the model, whatever attention or states it uses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import PantheraMLError, UnsupportedError
from ..models.roles import looks_like_experts
from ..parallel.fsdp import is_sharded

# Of each document: two make 16 rows, for which kernels are compiled as for those of training.
_LENGTH = 8


def check_isolation(trainer: Any) -> None:
    """Refuse a model that lets packed documents read one another, or does not take them.

    Args:
        trainer: A TRL trainer whose collator joins documents into one row.

    Raises:
        UnsupportedError: it does not keep documents apart.
    """
    if not is_measurable(trainer.model):
        return
    why = _reading(trainer)
    if why is not None:
        raise UnsupportedError(
            "this model does not keep packed documents apart",
            where="argument packing" if trainer.args.packing else "argument padding_free",
            why=why,
            hint="pass packing=False and padding_free=False; where it is attention that reads, load the model with "
            "another attn_implementation",
        )


def _reading(trainer: Any) -> str | None:
    """How the second of two packed documents is seen to read the first, or what the model says; None where all is well.

    Families whose layers keep states say that they need a kernel for it, or carry the state on.
    """
    try:
        gradient = None if is_sharded(trainer.model) else _gradient_of_first(trainer)
    except PantheraMLError:
        raise
    except ValueError as error:
        return str(error)
    if gradient is not None:
        return f"the outputs of one document have a gradient of {gradient:.3g} in the one before" if gradient else None
    first, other, second = _documents(trainer)
    with evaluating(trainer.model), torch.no_grad():
        outputs = [_last_document(trainer, [document, second]) for document in (first, other)]
    moved = (outputs[0] - outputs[1]).abs().max()
    eps = torch.finfo(outputs[0].dtype).eps
    # Experts that get another number of tokens add up in another order. What is read moves half of the digits and more.
    experts = any(looks_like_experts(module) for module in trainer.model.modules())
    allowed = (math.sqrt(eps) if experts else 2 * eps) * outputs[0].abs().max()
    return None if moved <= allowed else f"changing one document moved the outputs of the next by {float(moved):.3g}"


def _gradient_of_first(trainer: Any) -> float | None:
    """Largest gradient that outputs of a second document have in a first: 0 in every dtype where nothing is read.

    None where the model makes its outputs of something besides its input embeddings, or has no gradient in them.
    """
    first, _, second = _documents(trainer)
    seen: list[torch.Tensor] = []

    def start(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = trainer.model.get_input_embeddings().register_forward_hook(start)
    try:
        with evaluating(trainer.model), torch.enable_grad():
            output = _last_document(trainer, [first, second])
            if len(seen) != 1 or seen[0].dim() != 3 or seen[0].shape[:2] != (1, 2 * _LENGTH):
                return None
            weights = torch.linspace(-1, 1, output.shape[-1], device=output.device)
            (gradient,) = torch.autograd.grad((output.float() * weights).sum(), seen, allow_unused=True)
    finally:
        handle.remove()
    if gradient is None or not gradient[:, _LENGTH:].any():
        return None
    return float(gradient[:, :_LENGTH].abs().max())


def is_like_alone(trainer: Any) -> bool:
    """Whether a document that is packed after another gives what it gives alone, up to rounding.

    It does not where the model counts positions by itself, or lets documents read one another.
    """
    if _reading(trainer) is not None:
        return False
    first, _, second = _documents(trainer)
    with evaluating(trainer.model), torch.no_grad():
        packed, alone = (_last_document(trainer, documents) for documents in ([first, second], [second]))
    return bool((packed - alone).abs().max() <= tolerance(trainer) * alone.abs().max())


def tolerance(trainer: Any) -> float:
    """How much of the largest output other kernels may change, which add up in another order, layer after layer.

    Wrong positions, or documents that are read, change half of the digits and more.
    """
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point() and p.itemsize > 1}
    dtypes |= {torch.bfloat16} if trainer.args.bf16 else {torch.float16} if trainer.args.fp16 else set()
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))


def is_measurable(model: nn.Module) -> bool:
    """Whether the model can run now: a trainer may hold the weights in another form until it trains."""
    return is_sharded(model) or all(
        parameter.numel() and not hasattr(parameter, "placements") for parameter in model.parameters()
    )


def _documents(trainer: Any) -> tuple[list[int], list[int], list[int]]:
    """Three documents: two to stand first in turns, and one to stand after them."""
    vocabulary = trainer.model.get_input_embeddings().num_embeddings
    first, other = (torch.arange(1 + shift, 1 + shift + _LENGTH) % vocabulary for shift in (0, vocabulary // 2))
    return first.tolist(), other.tolist(), (torch.arange(_LENGTH) * 7 % vocabulary).tolist()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module of a model is in training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _last_document(trainer: Any, documents: list[list[int]]) -> torch.Tensor:
    """Outputs at the last document's positions, in a batch made by the trainer's own collator."""
    joined = [token for document in documents for token in document]
    if trainer.args.packing:
        rows = [{"input_ids": joined, "labels": joined, "seq_lengths": [len(document) for document in documents]}]
    else:
        rows = [{"input_ids": document, "labels": document} for document in documents]
    batch = trainer.data_collator(rows)
    device = next(trainer.model.parameters()).device
    inputs = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    inputs.pop("labels")
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    mixed = torch.autocast(device.type, dtype, enabled=bool(trainer.args.bf16 or trainer.args.fp16))
    with mixed:
        return trainer.model(**inputs, use_cache=False).logits[0, len(joined) - len(documents[-1]) : len(joined)]

"""Whether packed documents see one another: measured on the model, whatever attention it uses."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedError

_LENGTH = 6


def check_isolation(trainer: Any) -> None:
    """Run two packed documents twice, changing the first: the outputs of the second must not move.

    Args:
        trainer: A TRL trainer whose collator joins documents into one row.

    Raises:
        UnsupportedError: the model lets a document read the one before it.
    """
    model = trainer.model
    if any(not parameter.numel() or hasattr(parameter, "placements") for parameter in model.parameters()):
        return  # Sharded weights cannot run before training starts.
    vocabulary = model.get_input_embeddings().num_embeddings
    documents = [torch.arange(1 + shift, 1 + shift + _LENGTH) % vocabulary for shift in (0, vocabulary // 2)]
    second = torch.arange(_LENGTH) * 7 % vocabulary
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        outputs = [_second_document(trainer, first.tolist(), second.tolist()) for first in documents]
    finally:
        for module, training in modes:
            module.training = training
    moved = (outputs[0] - outputs[1]).abs().max()
    allowed = 2 * torch.finfo(outputs[0].dtype).eps * outputs[0].abs().max()
    if not moved <= allowed:
        raise UnsupportedError(
            "this model's attention lets packed documents read one another",
            where="argument packing" if trainer.args.packing else "argument padding_free",
            why=f"changing one document moved the outputs of the next by {float(moved):.3g}",
            hint="pass packing=False and padding_free=False, or load the model with another attn_implementation",
        )


def _second_document(trainer: Any, first: list[int], second: list[int]) -> torch.Tensor:
    """Outputs at the second document's positions, in a batch made by the trainer's own collator."""
    if trainer.args.packing:
        both = [{"input_ids": first + second, "labels": first + second, "seq_lengths": [len(first), len(second)]}]
    else:
        both = [{"input_ids": ids, "labels": ids} for ids in (first, second)]
    batch = trainer.data_collator(both)
    device = next(trainer.model.parameters()).device
    inputs = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    inputs.pop("labels")
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    mixed = torch.autocast(device.type, dtype, enabled=bool(trainer.args.bf16 or trainer.args.fp16))
    with torch.no_grad(), mixed:
        return trainer.model(**inputs, use_cache=False).logits[0, len(first) : len(first) + len(second)]

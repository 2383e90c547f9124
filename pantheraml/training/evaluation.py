"""Evaluations of a fine-tune over exactly the rows that were given, each token counting once.

transformers averages the losses of batches over their rows, and Accelerate fills the last round of the ranks with rows
from the beginning, so that the figures depend on how many rows a batch has and how many ranks there are. Here the ranks
have batches as one process has them, and loss, entropy and accuracy are means over the tokens of the whole set.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from ..parallel.batches import IGNORED, ordered
from ..parallel.process_group import all_reduce_sums
from .deferred import Deferred, read, sft_trainer
from .ranks import change_loader, context_size

# What TRL's trainer notes of a batch as a mean over its tokens, besides the loss.
_FIGURES = ("entropy", "mean_token_accuracy")


def install(trainer: Any) -> None:
    """Let a constructed ``SFTTrainer`` evaluate and predict so. One of several ranks gets batches of its own for it.

    Other trainers, a subclass with a loss of its own and a loss function of the user's keep the averages of
    transformers.
    """
    stock: Any = sft_trainer(trainer)
    if stock is None:
        return
    _order_rows(trainer)
    if trainer.compute_loss_func is None and type(trainer).compute_loss is stock.compute_loss:
        _weigh_tokens(trainer)


def _order_rows(trainer: Any) -> None:
    ranks, configuration = trainer.args.world_size, trainer.accelerator.dataloader_config
    if ranks == 1 or context_size(trainer.args) > 1:
        return
    if configuration.split_batches or configuration.dispatch_batches:
        return

    def prepared(loader: Any, *, outputs: bool) -> Any:
        # Outputs are gathered, so that all ranks need as many rows.
        return ordered(loader, ranks, filled=outputs and not trainer.args.prediction_loss_only)

    change_loader(
        trainer,
        "get_eval_dataloader",
        lambda loader: prepared(loader, outputs=trainer.compute_metrics is not None),
    )
    change_loader(trainer, "get_test_dataloader", lambda loader: prepared(loader, outputs=True))


def _tokens(inputs: dict[str, Any]) -> torch.Tensor | None:
    """How many tokens of a batch the loss is a mean of."""
    if inputs.get("shift_labels") is not None:
        return (inputs["shift_labels"] != IGNORED).sum()
    return None if inputs.get("labels") is None else (inputs["labels"][..., 1:] != IGNORED).sum()


def _weigh_tokens(trainer: Any) -> None:
    predict_batch, loop = trainer.prediction_step, trainer.evaluation_loop
    signature = inspect.signature(loop)
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    @functools.wraps(predict_batch)
    def prediction_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        count = _tokens(inputs)
        result = predict_batch(model, inputs, *args, **kwargs)
        if result[0] is not None and count is not None:
            loss = result[0].detach().mean()
            batches.append((loss, count.to(loss.device)))
        return result

    @functools.wraps(loop)
    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        batches.clear()
        noted = trainer._metrics["eval"]
        before = {name: len(noted[name]) for name in _FIGURES if name in noted}
        output = loop(*args, **kwargs)
        losses = torch.tensor(read([Deferred(loss) for loss, _ in batches]), dtype=torch.float64)
        counts = torch.tensor(read([Deferred(count) for _, count in batches]), dtype=torch.float64)
        batches.clear()
        if trainer.args.logging_nan_inf_filter:
            counts *= losses.isfinite()
            losses.nan_to_num_(0.0, 0.0, 0.0)
        total, *counted = all_reduce_sums([float(losses @ counts), *counts.tolist()])
        tokens = sum(counted)
        key = f"{signature.bind(*args, **kwargs).arguments.get('metric_key_prefix', 'eval')}_loss"
        if not tokens or key not in output.metrics:
            return output
        output.metrics[key] = total / tokens
        for name in _FIGURES:
            values = noted[name][before.get(name, 0) :]
            if len(values) == len(counted):
                noted[name][:] = [sum(value * count for value, count in zip(read(values), counted)) / tokens]
        return output

    trainer.prediction_step, trainer.evaluation_loop = prediction_step, evaluation_loop

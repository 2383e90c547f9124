"""TRL's ``SFTTrainer`` with a learning rate of its own for trained embeddings, and with what to do about a NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from .. import log
from .._compat import trl as shim
from ..errors import ConfigError, UnsupportedError
from ..parallel.config import check_context_parallel
from .context_parallel import check_installed
from .guards import CHOICES
from .ranks import context_size

# PEFT keeps trained copies of embeddings and output layers under these names.
_TRAINED_COPIES = ("modules_to_save.", "trainable_tokens_")


@dataclass
class PantheraMLTrainingArguments(SFTConfig):
    """``trl.SFTConfig`` with the options of ``PantheraMLTrainer``.

    Args:
        embedding_learning_rate: Learning rate of trained embeddings and output layers (``modules_to_save``), usually 2
            to 10 times smaller than ``learning_rate``, default None: the same as everything else.
        q_galore_config: Q-GaLore, which is not available; anything but None raises.
        on_nonfinite: ``"raise"`` (default) stops before a step whose loss or gradient is NaN or infinite; ``"skip"``
            leaves such a step out.
        max_nonfinite_steps: How many steps in a row may be left out, default 10.
        auto_scale_lr: Whether ``learning_rate`` is multiplied by the number of processes of the launch, for runs whose
            batch grows with it, default False.
        context_parallel: How many neighbouring processes of the launch share each sequence, default 1. Each holds its
            part of the tokens, so that sequences may be that many times longer.

    Raises:
        ConfigError: a value out of range.
        UnsupportedError: ``q_galore_config`` is given.
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained embeddings and output layers."}
    )
    q_galore_config: Any = field(default=None, metadata={"help": "Not available."})
    on_nonfinite: str = field(
        default="raise",
        metadata={"help": "What to do before a step that is not finite.", "choices": list(CHOICES)},
    )
    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "How many steps in a row may be left out with on_nonfinite='skip'."}
    )

    auto_scale_lr: bool = field(default=False, metadata={"help": "Multiply learning_rate by the number of processes."})

    context_parallel: int = field(default=1, metadata={"help": "How many processes of the launch share each sequence."})

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_context_parallel(self.context_parallel, where)
        if self.q_galore_config is not None:
            raise UnsupportedError(
                "Q-GaLore is not available",
                where=f"{where}(q_galore_config=...)",
                hint="use LoRA, or optim='galore_adamw_8bit' with full fine-tuning",
            )
        if self.embedding_learning_rate is not None and not 0 <= self.embedding_learning_rate < 1:
            raise ConfigError(
                f"embedding_learning_rate must be at least 0 and under 1, not {self.embedding_learning_rate}",
                where=where,
            )
        if self.on_nonfinite not in CHOICES:
            raise ConfigError(f"on_nonfinite is {self.on_nonfinite!r}", where=where, hint="use 'raise' or 'skip'")
        if self.max_nonfinite_steps < 0:
            raise ConfigError(f"max_nonfinite_steps is {self.max_nonfinite_steps}", where=where, hint="use 0 or more")
        super().__post_init__()


class PantheraMLTrainer(SFTTrainer):
    """``trl.SFTTrainer`` that honours ``embedding_learning_rate``.

    Takes what ``trl.SFTTrainer`` takes, and the older keywords ``tokenizer``, ``dataset_text_field``,
    ``max_seq_length``, ``packing`` and ``dataset_num_proc``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``trl.SFTTrainer`` does, if the sequences are divided as the arguments say."""
        check_installed(self)
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as the arguments say, then give the embeddings their own learning rate."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "embedding_learning_rate", None)
        ranks = self.args.world_size // context_size(self.args)
        if created and getattr(self.args, "auto_scale_lr", False) and ranks > 1:
            for group in optimizer.param_groups:
                group["lr"] *= ranks
            log.info(f"learning rate {self.args.learning_rate:g} x {ranks} processes (auto_scale_lr)")
        if created and rate is not None:
            assert self.model is not None
            separate_learning_rate(optimizer, list(embedding_parameters(self.model)), rate)
        return optimizer


def embedding_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters of embeddings and output layers: PEFT's copies, or the layers themselves."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    own = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) in own or any(part in name for part in _TRAINED_COPIES)):
            yield parameter


def separate_learning_rate(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Move ``parameters`` into groups of their own with the learning rate ``rate``; the other options stay.

    Raises:
        ConfigError: there are none.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not wanted:
        raise ConfigError(
            f"embedding_learning_rate={rate} and no embedding or output layer is trained",
            where="PantheraMLTrainingArguments",
            hint="put 'embed_tokens' and 'lm_head' into modules_to_save, or leave embedding_learning_rate out",
        )
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": rate})
    count = sum(parameter.numel() for parameter in parameters)
    log.info(f"{count:,} parameters of embeddings and output layers train with learning rate {rate:g}")


# Also where the shim is off, these two take the older keywords: they are PantheraML's own.
shim.wrap(PantheraMLTrainingArguments)
shim.wrap(PantheraMLTrainer)

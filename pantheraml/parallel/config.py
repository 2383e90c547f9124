"""How several GPUs are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError, UnsupportedError

Strategy = Literal["auto", "ddp", "fsdp", "device_map"]
_BACKENDS = ("nccl", "gloo", "xccl", "mpi", "ucc")
DEFAULT_TIMEOUT_MINUTES = 30


@dataclass
class MultiGPUConfig:
    """How several GPUs are used. Every field acts; a value that cannot be honoured raises.

    Args:
        backend: ``"nccl"``, ``"gloo"``, ``"xccl"``, ``"mpi"`` or ``"ucc"``; None (default) takes NCCL on NVIDIA and AMD
            GPUs, XCCL on Intel's and Gloo on a CPU.
        init_method: Where the ranks meet, such as ``"tcp://host:port"`` or ``"file:///path"``; None (default) takes the
            address that the launcher gives.
        timeout_minutes: How long a rank waits for the others before it gives up, over 0, default 30.
        auto_device_map: Whether the trainer takes a model that is split over several GPUs, default True.
        tensor_parallel: Split each layer over GPUs; True raises.
        pipeline_parallel: Run layers on GPUs in turns; True raises.
        use_gradient_checkpointing: True (default) recomputes activations as the model was loaded to do, False keeps
            them all.
        find_unused_parameters: True lets ranks leave out trained weights in a step, which costs time; False (default)
            decides by the model: mixtures of experts and multimodal models need it.
        num_gpus: Number of GPUs that must be in use, or None (default) for whatever the launch has.
        strategy: ``"ddp"``: a copy of the model on each GPU, which needs a launch; ``"fsdp"``: weights, gradients and
            optimizer state sharded over the GPUs of a launch; ``"device_map"``: one process, the layers of the model
            spread over its GPUs; ``"auto"`` (default): what the launch and the training arguments say.
        shard_size: With ``"fsdp"`` the number of neighbouring ranks that share one model, such as the GPUs of a host;
            the other ranks hold copies of their shards. None (default) means all ranks.
        context_parallel: How many neighbouring ranks share each sequence, default 1. Each holds its part of the tokens,
            so that sequences may be that many times longer.

    Raises:
        ConfigError: a value out of range.
        UnsupportedError: a technique that is not there.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES
    auto_device_map: bool = True
    tensor_parallel: bool = False
    pipeline_parallel: bool = False
    use_gradient_checkpointing: bool = True
    find_unused_parameters: bool = False
    num_gpus: int | None = None
    strategy: Strategy = "auto"
    shard_size: int | None = None
    context_parallel: int = 1

    def __post_init__(self) -> None:
        where = "MultiGPUConfig"
        for field, name in (("tensor_parallel", "tensor"), ("pipeline_parallel", "pipeline")):
            if getattr(self, field):
                raise UnsupportedError(
                    f"{field}=True: {name} parallelism is not available in this release",
                    where=where,
                    hint="a copy of the model on each GPU: torchrun and strategy='ddp'; a model larger than a GPU: "
                    "strategy='fsdp', load_in_4bit=True, or one process and device_map='balanced'",
                )
        check_context_parallel(self.context_parallel, where)
        if self.context_parallel > 1 and self.strategy == "device_map":
            raise ConfigError(
                f"context_parallel={self.context_parallel} with strategy='device_map'",
                where=where,
                hint="context_parallel is for the processes of a launch: strategy='ddp', 'fsdp' or 'auto'",
            )
        if self.strategy not in get_args(Strategy):
            raise ConfigError(
                f"unknown strategy {self.strategy!r}", where=where, hint=f"use one of {', '.join(get_args(Strategy))}"
            )
        if self.shard_size is not None and (self.strategy != "fsdp" or self.shard_size < 2):
            raise ConfigError(
                f"shard_size={self.shard_size} with strategy={self.strategy!r}",
                where=where,
                hint="shard_size is for strategy='fsdp' and at least 2",
            )
        if not isinstance(self.use_gradient_checkpointing, bool):
            raise ConfigError(
                f"use_gradient_checkpointing must be True or False, not {self.use_gradient_checkpointing!r}",
                where=where,
                hint="give the mode to from_pretrained or get_peft_model",
            )
        if self.backend is not None and self.backend not in _BACKENDS:
            raise ConfigError(f"unknown backend {self.backend!r}", where=where, hint=f"use {', '.join(_BACKENDS)}")
        if not self.timeout_minutes > 0:
            raise ConfigError(f"timeout_minutes must be over 0, not {self.timeout_minutes}", where=where)
        if self.num_gpus is not None and self.num_gpus < 1:
            raise ConfigError(f"num_gpus must be at least 1, not {self.num_gpus}", where=where)


def check_context_parallel(value: Any, where: str) -> None:
    """Refuse a number of ranks that is none.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"context_parallel must be a number of processes, at least 1, not {value!r}",
            where=where,
            hint="give how many processes share each sequence",
        )

"""Which layer inputs are kept, recomputed or moved to the host between forward and backward.

The unit is the decoder layer. Keeping a layer's activations costs memory, recomputing them costs a second forward. The
automatic mode measures both: the first step at a new size recomputes every layer but the last, which is kept to learn
what keeping costs; from the next step on as many layers are kept as fit into the stated share of what was free. The
last layers are the ones kept, because backward frees them first. Where the device does not report its memory (a CPU),
everything is kept.

Works through the seam that transformers gives every ``GradientCheckpointingLayer``: the function that runs a layer
under checkpointing is ours, per instance. Recomputation is the non-reentrant kind throughout, which DDP needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import log
from ..errors import ConfigError, UnsupportedError

Mode = Literal["auto", "recompute", "offload", "keep"]

# What Unsloth scripts and ours may pass as use_gradient_checkpointing.
MODES: dict[bool | str | None, Mode] = {
    "auto": "auto",
    "unsloth": "auto",
    "pantheraml": "auto",
    True: "recompute",
    "offload": "offload",
    False: "keep",
    None: "keep",
}

# Inputs below this size stay on the device: a copy over PCIe costs more than the memory is worth.
_OFFLOAD_MIN_BYTES = 2 * 1024**2


def mode_of(value: bool | str | None) -> Mode:
    """Translate ``use_gradient_checkpointing`` into a mode.

    Raises:
        ConfigError: the value is none of the known ones.
    """
    key = value.lower() if isinstance(value, str) else value
    if key in ("true", "false"):
        key = key == "true"
    if key not in MODES:
        raise ConfigError(
            f"unknown checkpointing mode {value!r}",
            where="argument use_gradient_checkpointing",
            hint="use 'auto' (the same as 'unsloth' and 'pantheraml'), True, 'offload' or False",
        )
    return MODES[key]


@dataclass(frozen=True)
class Memory:
    """A reading of the device allocator, in bytes."""

    allocated: int
    peak: int
    free: int


def read_memory(device: torch.device) -> Memory | None:
    """Read the allocator of ``device``; None where the device does not report memory."""
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    stats_allocated = backend.memory_allocated(device)
    cached = backend.memory_reserved(device) - stats_allocated
    free, _total = backend.mem_get_info(device)
    return Memory(stats_allocated, backend.max_memory_allocated(device), free + cached)


@dataclass
class Budget:
    """What one measured size needs.

    Attributes:
        tokens: Tokens (batch x sequence) of the measured forward.
        keep_bytes: Extra bytes that keeping one layer costs over recomputing it.
        limit: Bytes that may be allocated in all.
        peak: Peak bytes of a step that recomputes every layer, or None while that step is still running.
    """

    tokens: int
    keep_bytes: int
    limit: int
    peak: int | None = None

    def layers_to_keep(self, tokens: int, layers: int) -> int:
        """How many layers fit when a forward has ``tokens`` tokens; the plan recomputes all of a larger one."""
        if self.peak is None or tokens > self.tokens:
            return 0
        cost = max(1, self.keep_bytes * tokens // self.tokens)
        return max(0, min(layers, (self.limit - self.peak) // cost))


class ActivationPlan:
    """Runs every decoder layer of one model, keeping or recomputing its activations.

    Args:
        layers: The decoder layers in forward order.
        mode: ``"auto"``, ``"recompute"``, ``"offload"`` or ``"keep"``.
        fraction: Share of the free device memory that the automatic mode may fill, over 0 and at most 1.
        memory: Reads the allocator of a device; replaced in tests.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        mode: Mode,
        *,
        fraction: float = 0.9,
        memory: Callable[[torch.device], Memory | None] = read_memory,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"activation_memory_fraction must be over 0 and at most 1, not {fraction}",
                where="argument activation_memory_fraction",
            )
        self.mode = mode
        self.fraction = fraction
        self.kept: int = len(layers) if mode == "keep" else 0
        self._index = {id(layer): i for i, layer in enumerate(layers)}
        self._memory = memory
        self._budget: Budget | None = None
        self._measuring = False

    def run(self, function: functools.partial[Any], *args: Any) -> Any:
        """Run one layer: what ``GradientCheckpointingLayer`` calls with its own forward, all keywords bound."""
        if not torch.is_grad_enabled() or self.mode == "keep":
            return function(*args)
        if self.mode == "auto":
            return self._run_planned(function, *args)
        return self._recompute(function, *args)

    def describe(self) -> str:
        """Say in one line what the plan does now."""
        layers = len(self._index)
        if self.mode == "keep":
            return f"activations of all {layers} layers are kept"
        if self.mode == "recompute":
            return f"activations of all {layers} layers are recomputed"
        if self.mode == "offload":
            return f"activations of all {layers} layers are recomputed from inputs held in host memory"
        if self._budget is None and self.kept:
            return f"activations of all {layers} layers are kept (this device does not report its memory)"
        if self._budget is None or self._budget.peak is None:
            return f"activations: measuring, all {layers} layers are recomputed until then"
        return (
            f"activations of {self.kept} of {layers} layers are kept, the rest recomputed "
            f"({self._budget.keep_bytes / 2**20:,.0f} MiB a layer at {self._budget.tokens:,} tokens)"
        )

    def _recompute(self, function: functools.partial[Any], *args: Any) -> Any:
        if self.mode == "offload":
            with _Offload():
                return checkpoint(function, *args, use_reentrant=False)
        return checkpoint(function, *args, use_reentrant=False)

    def _run_planned(self, function: functools.partial[Any], *args: Any) -> Any:
        # transformers binds the layer as the first argument; before 5.20 it binds the layer's own __call__.
        owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
        index = self._index.get(id(owner))
        hidden = args[0] if args else function.keywords.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or index is None:
            return self._recompute(function, *args)
        if index == 0:
            self._begin(hidden)
        layers = len(self._index)
        if self._measuring and index == layers - 1:
            return self._measure(function, hidden, *args)
        return function(*args) if index >= layers - self.kept else self._recompute(function, *args)

    def _begin(self, hidden: torch.Tensor) -> None:
        """Start a forward: finish the measurement of the last step, and decide how many layers this one keeps."""
        tokens = hidden.numel() // hidden.shape[-1]
        memory = self._memory(hidden.device)
        if memory is None:
            # A CPU trains out of host memory, which is large and shared with the page cache: nothing to plan against.
            self.kept = len(self._index)
            return
        budget = self._budget
        if budget is not None and budget.peak is None and not self._measuring:
            budget.peak = memory.peak
            self._report(budget)
        if budget is None or tokens > budget.tokens:
            limit = memory.allocated + int(self.fraction * memory.free)
            self._budget = Budget(tokens=tokens, keep_bytes=0, limit=limit)
            self._measuring = True
            self.kept = 0
            return
        self._measuring = False
        self.kept = budget.layers_to_keep(tokens, len(self._index))

    def _report(self, budget: Budget) -> None:
        self.kept = budget.layers_to_keep(budget.tokens, len(self._index))
        log.info(self.describe())

    def _measure(self, function: functools.partial[Any], hidden: torch.Tensor, *args: Any) -> Any:
        """Run the last layer keeping its activations and note what that adds to the allocator."""
        assert self._budget is not None
        before = self._memory(hidden.device)
        output = function(*args)
        after = self._memory(hidden.device)
        assert before is not None
        assert after is not None
        own = hidden.numel() * hidden.element_size()
        self._budget.keep_bytes = max(after.allocated - before.allocated - own, 1)
        self._measuring = False
        return output


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Moves what is saved inside it to pinned host memory on a side stream, and back when backward asks."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)

    @staticmethod
    def _pack(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "cuda" or tensor.numel() * tensor.element_size() < _OFFLOAD_MIN_BYTES:
            return tensor
        stream = _side_stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            done = stream.record_event()
        return tensor.device, host, done

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, host, done = packed
        torch.cuda.current_stream(device).wait_event(done)
        return host.to(device, non_blocking=True)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` that transformers lets us run under checkpointing, in forward order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_activation_plan(
    model: nn.Module, value: bool | str | None, *, activation_memory_fraction: float = 0.9
) -> ActivationPlan:
    """Install a plan on this instance; a later call replaces it.

    Args:
        model: A transformers model, or a PEFT model around one.
        value: ``"auto"`` (also ``"unsloth"``, ``"pantheraml"``), True, ``"offload"`` or False.
        activation_memory_fraction: Share of the free device memory that the automatic mode may fill, default 0.9.

    Returns:
        The plan, also kept as ``model.activation_plan``.

    Raises:
        ConfigError: an unknown mode or a fraction outside (0, 1].
        UnsupportedError: the architecture has no layer that can be recomputed, and recomputation was asked for.
    """
    mode = mode_of(value)
    layers = decoder_layers(model)
    if not layers and mode in ("recompute", "offload"):
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that can be recomputed",
            where=f"use_gradient_checkpointing={value!r}",
            hint="pass use_gradient_checkpointing=False",
        )
    plan = ActivationPlan(layers, mode, fraction=activation_memory_fraction)
    for layer in layers:
        layer.gradient_checkpointing = mode != "keep"  # type: ignore[assignment]
        layer._gradient_checkpointing_func = plan.run  # type: ignore[assignment]
    object.__setattr__(model, "activation_plan", plan)
    return plan

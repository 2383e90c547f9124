"""What of each decoder layer is kept, recomputed or moved to the host between forward and backward.

Keeping a layer's activations costs memory, recomputing them costs time. The automatic mode measures: the first step at
a new size keeps the least, and its peak tells what is left of the stated share of the free memory. From the next step
on that is spent where a byte saves the most time, the last layers first, because backward frees them first. Where all
that is worth keeping takes more than half of it, the second step spends half, and by what that really took, losses
between blocks included, the steps after it spend what is left. Layers that run as one node (``layers.block``) can be
kept in parts, on the device or, all but the MLP's inner part, on the host, at costs that follow from their shapes;
others are kept or recomputed as a whole, at a cost that the first step measures. Where a model is sharded, the weights
that a layer gathered for its forward may stay for its backward from the same memory, at the cost of gathering them
again; its ranks then plan together, for the largest of their batches, as they wait for one another in every layer
anyway. Where the device does not report its memory (a CPU), everything is kept; an XLA device, whose compiler lays out
a step's memory before it runs, recomputes every layer.

Works through the seam that transformers gives every ``GradientCheckpointingLayer``: the function that runs a layer
under checkpointing is ours, per instance. Recomputation is the non-reentrant kind, which DDP needs, except on XLA.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from .. import log, xla_runtime
from ..device import get_device
from ..errors import ConfigError, UnsupportedError
from ..parallel import context
from ..parallel.fsdp import Gathering, gathering_of
from .allotment import allot_with_room, least_of, spent, underway
from .host_memory import HostStash, OffloadSaved, available_bytes
from .layers.costs import Cost, cost_of_weights, costs_of, forward_seconds
from .layers.decoder import is_node
from .layers.levels import Host, Keep, Level, Offload
from .record import FRACTION, record_of

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
INPUT, HOST, ALL = Level(Keep.INPUT), Level(Keep.INPUT, Host.RESULTS), Level(Keep.ALL)
# The least of every layer in the modes that do not measure; offloading moves more where that saves time.
_FIXED = {"recompute": INPUT, "offload": HOST, "keep": ALL}
# Share of what is kept that the allocator loses between blocks, and that parts of a step hold for a moment.
_SLACK = 0.06
# Share of the memory that the step spends which shows what spending costs, and how often what is left is spent then.
_TRIAL = 0.5
_ROUNDS = 4
# Sizes of batches whose levels are remembered, before they are forgotten together.
_REMEMBERED = 4096
# While nothing is measured: what a step needs beside the layers' inputs, in multiples of what one whole layer holds.
_WORKING_LAYERS = 2.5
_DESCRIPTIONS = {
    ALL: "kept",
    Level(Keep.ALL, Host.RESULTS): "kept, inputs and attention's results in host memory",
    Level(Keep.ALL, Host.RESIDUAL): "kept, all but the MLP's inner part in host memory",
    Level(Keep.RESIDUAL): "kept but for the MLP's inner part",
    Level(Keep.RESIDUAL, Host.RESULTS): "kept but for the MLP's inner part, "
    "inputs and attention's results in host memory",
    Level(Keep.RESIDUAL, Host.RESIDUAL): "kept in host memory but for the MLP's inner part",
    Level(Keep.ATTENTION): "recomputed around attention's kept result",
    Level(Keep.ATTENTION, Host.RESULTS): "recomputed around inputs and attention's results held in host memory",
    INPUT: "recomputed",
    HOST: "recomputed from inputs held in host memory",
}


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


def check_fraction(fraction: Any) -> None:
    """Raise unless ``fraction`` may be a share of the memory.

    Raises:
        ConfigError: it is not over 0 and at most 1.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConfigError(
            f"activation_memory_fraction must be over 0 and at most 1, not {fraction!r}",
            where="argument activation_memory_fraction",
        )


@dataclass(frozen=True)
class Memory:
    """A reading of the device allocator, in bytes: ``reserved`` is what it took from the device, used or not."""

    allocated: int
    peak: int
    free: int
    reserved: int


def read_memory(device: torch.device) -> Memory | None:
    """Read the allocator of ``device``; None where the device does not report memory."""
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    allocated, reserved = backend.memory_allocated(device), backend.memory_reserved(device)
    free, _total = backend.mem_get_info(device)
    return Memory(allocated, backend.max_memory_allocated(device), free + reserved - allocated, reserved)


def _size(hidden: torch.Tensor) -> tuple[int, int]:
    """Tokens of a forward, and those of a row, which several ranks may share."""
    divided = context.current()
    return hidden.numel() // hidden.shape[-1], hidden.shape[-2] * (1 if divided is None else divided.group.size)


@dataclass
class _Measured:
    """What one size of forward on one device needs.

    Attributes:
        tokens: Tokens (batch x sequence) of the measured forward.
        length: Its sequence length.
        limit: Bytes that may be allocated in all.
        peak: Peak bytes of a step at the lowest levels, with what the allocator loses between blocks, or None while
            that step is still running.
        whole: Bytes that one kept layer adds, as the last layer of the first step showed; 0 while unknown.
        budget: Bytes to keep beyond the lowest levels; None while it is unknown.
        trying: Bytes beyond them that the step keeps whose memory will be read, and its tokens; None when none will be.
        rounds: Steps whose memory was read.
        factor: Bytes that were reserved for each byte to be kept, as those steps showed; at least 1.
    """

    tokens: int
    length: int
    limit: int
    peak: int | None = None
    whole: int = 0
    budget: int | None = None
    trying: tuple[int, int] | None = None
    rounds: int = 0
    factor: float = 1.0

    @property
    def unfinished(self) -> bool:
        """Whether nothing shows yet what may be kept."""
        return self.peak is None or (self.trying is not None and self.rounds == 0)


@dataclass
class _Group:
    """The layers on one device."""

    indices: list[int] = field(default_factory=list)
    measured: _Measured | None = None
    lowest: dict[int, Level] = field(default_factory=dict)
    # (tokens, sequence length) -> levels of the layers, and which of them keep their gathered weights
    allotted: dict[tuple[int, int], tuple[list[Level], list[bool]]] = field(default_factory=dict)


class ActivationPlan:
    """Decides for every decoder layer of one model what is kept of its activations.

    Args:
        layers: The decoder layers in forward order.
        mode: ``"auto"``, ``"recompute"``, ``"offload"`` or ``"keep"``.
        fraction: Share of the free device memory that the automatic mode may fill, over 0 and at most 1.
        memory: Reads the allocator of a device; replaced in tests.
        costs: What a layer's levels hold and take; None for a layer that is kept whole or not at all.
        host_memory: Reads how many bytes of the host may be used.
        gathering: How the layers of a sharded model gather their weights; None where that is settled.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        mode: Mode,
        *,
        fraction: float = FRACTION,
        memory: Callable[[torch.device], Memory | None] = read_memory,
        costs: Callable[[nn.Module, int, int], dict[Level, Cost] | None] = costs_of,
        host_memory: Callable[[], int] = available_bytes,
        gathering: Gathering | None = None,
    ) -> None:
        check_fraction(fraction)
        self.mode = mode
        self.fraction = fraction
        self.levels: list[Level] = [_FIXED.get(mode, INPUT) for _ in layers]
        self.gathered = [False for _ in layers]
        self._on_xla = get_device().type == "xla"
        self._layers = list(layers)
        self._index = {id(layer): i for i, layer in enumerate(layers)}
        self._memory = memory
        self._costs = costs
        self._host_memory = host_memory
        self._host_bytes: int | None = None
        self._offloaded: dict[tuple[int, int], list[Level]] = {}
        self._groups: dict[torch.device, _Group] | None = None
        self._measuring: int | None = None
        self._told: str | None = None
        self._gathering = gathering if mode == "auto" else None
        self._begun: weakref.ref[torch.Tensor] | None = None
        # What happened to this rank alone, until the others are told.
        self._ran_out = self._unpinned = False
        self._stash = HostStash(self._without_host)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationPlan:
        """The plan of a copied model, which has measured nothing yet. What is gathered is not copied either."""
        copied = type(self).__new__(type(self))
        # The layers lead back here, so they must find this before they are copied.
        memo[id(self)] = copied
        copied.__init__(  # type: ignore[misc]
            [copy.deepcopy(layer, memo) for layer in self._layers],
            self.mode,
            fraction=self.fraction,
            memory=self._memory,
            costs=self._costs,
            host_memory=self._host_memory,
        )
        return copied

    @property
    def kept(self) -> int:
        """How many layers are kept whole."""
        return sum(level.keep == Keep.ALL for level in self.levels)

    def keep(self, layer: nn.Module, hidden: torch.Tensor) -> tuple[Level, Offload | None]:
        """What a layer that runs as one node keeps, and what moves tensors to the host and back."""
        level = self._level(layer, hidden)
        if level.host and hidden.is_cuda:
            return level, self._stash.put
        return level._replace(host=Host.NOTHING), None

    def run(self, function: functools.partial[Any], *args: Any) -> Any:
        """Run one layer: what ``GradientCheckpointingLayer`` calls with its own forward, all keywords bound."""
        if not torch.is_grad_enabled() or self.mode == "keep":
            return function(*args)
        # transformers binds the layer as the first argument; before 5.20 it binds the layer's own __call__.
        owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
        hidden = args[0] if args else function.keywords.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or id(owner) not in self._index:
            return self._recompute(INPUT, function, *args)
        if not function.args and isinstance(owner, nn.Module) and is_node(owner):
            # A call of the whole layer: its forward asks for the level itself.
            return function(*args)
        level = self._level(owner, hidden)
        if self._measuring == self._index[id(owner)]:
            return self._measure(function, hidden, *args)
        return function(*args) if level.keep == Keep.ALL else self._recompute(level, function, *args)

    def shrink(self) -> None:
        """After an allocation failed: keep the least from now on, until a new size is measured."""
        self._free_cached()
        self._keep_least()
        self._ran_out = True
        self.levels = [HOST if self._layers_on_gpu() else INPUT for _ in self.levels]
        log.warning("activations: the device ran out of memory; from here on every layer is recomputed")

    def _keep_least(self) -> None:
        for group in (self._groups or {}).values():
            group.allotted.clear()
            if group.measured is not None:
                group.measured.peak, group.measured.budget = group.measured.limit, 0
                group.measured.rounds, group.measured.trying = _ROUNDS, None

    def _leave_host(self) -> None:
        self._host_bytes = 0
        for group in (self._groups or {}).values():
            group.allotted.clear()

    def _without_host(self, reason: str) -> None:
        """After the host had no memory for tensors: use none of it from the next step on.

        Raises:
            UnsupportedError: it was asked for.
        """
        if self.mode == "offload":
            raise UnsupportedError(
                "activations cannot wait in host memory",
                where="use_gradient_checkpointing='offload'",
                why=f"the host gave no pinned memory: {reason}",
                hint="raise the memory limits of the container, or pass use_gradient_checkpointing=True",
            )
        if context.current() is not None:
            raise UnsupportedError(
                "activations cannot wait in host memory on one of the ranks that share each sequence",
                where="use_gradient_checkpointing",
                why=f"the host gave no pinned memory: {reason}",
                hint="raise the memory limits of the container, or pass use_gradient_checkpointing=True",
            )
        self._leave_host()
        self._unpinned = True
        log.once(f"activations stay on the device: the host gave no pinned memory ({reason})")

    def describe(self) -> str:
        """Say in one line what the plan does now."""
        layers = len(self.levels)
        counts = Counter(self.levels)
        parts = [f"{counts[level]} {text}" for level, text in _DESCRIPTIONS.items() if counts[level]]
        if self.mode != "auto":
            level = next(iter(counts), _FIXED[self.mode])
            if len(counts) > 1:
                return f"activations of {layers} layers: {', '.join(parts)}"
            return f"activations of all {layers} layers are {_DESCRIPTIONS[level]}"
        if self._groups is None:
            return f"activations: measuring, all {layers} layers are recomputed until then"
        measured = [g.measured for g in self._groups.values() if g.measured is not None]
        if not measured:
            return f"activations of all {layers} layers are kept (this device does not report its memory)"
        if any(m.unfinished for m in measured):
            return f"activations: measuring, more of the {layers} layers are recomputed until then"
        tokens = max(m.tokens for m in measured)
        if any(self.gathered):
            parts.append(f"gathered weights of {sum(self.gathered)} kept for the backward")
        return f"activations of {layers} layers at {tokens:,} tokens: {', '.join(parts)}"

    # ------------------------------------------------------------ planning

    def _level(self, layer: Any, hidden: torch.Tensor) -> Level:
        index = self._index[id(layer)]
        self._stash.advance()
        if index == 0 and self.mode == "auto":
            self._begin(hidden)
        if index == 0 and self.mode == "offload" and hidden.is_cuda:
            self.levels[:] = self._offload(*_size(hidden))
        return self.levels[index]

    def _offload(self, tokens: int, length: int) -> list[Level]:
        """The levels of all layers when they wait on the host."""
        size = tokens, length
        if size not in self._offloaded:
            levels = [self._moved(layer, *size) for layer in self._layers]
            # Its backward comes first, before anything could have been fetched.
            levels[-1] = levels[-1]._replace(host=Host.NOTHING)
            if len(self._offloaded) >= _REMEMBERED:
                self._offloaded.clear()
            self._offloaded[size] = levels
        return self._offloaded[size]

    def _moved(self, layer: nn.Module, tokens: int, length: int) -> Level:
        """What of a layer waits on the host when all do: more than its input where that saves time."""
        costs = self._costs(layer, tokens, length) or {}
        offered = {level: c for level, c in self._on_host(costs).items() if level.host and c.bytes == 0}
        return least_of(offered) if offered else HOST

    def _on_host(self, costs: dict[Level, Cost]) -> dict[Level, Cost]:
        """The levels that the host has memory for if all layers are kept so; the input alone is its last resort."""
        if self._host_bytes is None:
            (self._host_bytes,) = self._agree([self._host_memory()], least=True)
        room = self._host_bytes // max(len(self._layers), 1)
        return {level: cost for level, cost in costs.items() if level == HOST or cost.host_bytes <= room}

    def _begin(self, hidden: torch.Tensor) -> None:
        """Start a forward: finish the measurement of the last step, and choose the levels of this one."""
        if self._plans_together:
            if self._begun is not None and self._begun() is hidden:
                # The first layer asks again where its node cannot run, or had no memory; the other ranks' may not.
                return
            self._begun = weakref.ref(hidden)
        tokens, length = _size(hidden)
        self._measuring = None
        if self._groups is None:
            self._groups = {}
            for index, layer in enumerate(self._layers):
                # Shards may wait in host memory; the layer runs where its input is.
                place = next((p.device for p in layer.parameters() if not isinstance(p, DTensor)), hidden.device)
                self._groups.setdefault(place, _Group()).indices.append(index)
            if all(self._memory(place) is None for place in self._groups):
                self._gathering = None
        if self._gathering is not None:
            tokens, length, ran_out, unpinned = self._agree([tokens, length, self._ran_out, self._unpinned])
            if ran_out:
                self._keep_least()
            if unpinned:
                self._leave_host()
        self._ran_out = self._unpinned = False
        for device, group in self._groups.items():
            memory = self._memory(device)
            if memory is None:
                # A CPU trains out of host memory, which is large and shared with the page cache: nothing to plan for.
                for index in group.indices:
                    self.levels[index] = ALL
                continue
            if self._plans_together and self._reads(group, tokens, length):
                (free,) = self._agree([memory.free], least=True)
                allocated, peak, reserved = self._agree([memory.allocated, memory.peak, memory.reserved])
                memory = Memory(allocated, peak, free, reserved)
            self._plan(group, memory, hidden, tokens, length)
        planned = [g.measured for g in self._groups.values() if g.measured is not None]
        if planned and not any(m.unfinished or m.trying for m in planned):
            told = self.describe()
            if told != self._told:
                self._told = told
                log.info(told)

    @property
    def _plans_together(self) -> bool:
        return self._gathering is not None or context.current() is not None

    def _agree(self, numbers: list[int], *, least: bool = False) -> list[int]:
        """The largest or least of the ranks that have to plan the same, because they exchange what they recompute.

        They share the sequences, or the weights, which all ranks do.
        """
        if self._gathering is not None:
            return self._gathering.agree(numbers, least=least)
        divided = context.current()
        return numbers if divided is None else divided.group.agree(numbers, least=least)

    @staticmethod
    def _reads(group: _Group, tokens: int, length: int) -> bool:
        """Whether the next plan depends on the memory."""
        known = group.measured
        if known is None or known.peak is None or known.trying is not None:
            return True
        return tokens > known.tokens or length > known.length

    def _plan(self, group: _Group, memory: Memory, hidden: torch.Tensor, tokens: int, length: int) -> None:
        measured = group.measured
        if measured is not None and measured.peak is None:
            # Blocks of many sizes do not fill what was reserved for them, and what they lose they will lose again.
            measured.peak = max(memory.peak, memory.reserved)
        if measured is None or tokens > measured.tokens or length > measured.length:
            limit = memory.allocated + int(self.fraction * memory.free)
            group.measured = _Measured(tokens, length, limit)
            group.allotted.clear()
            self._start(group, memory, tokens * hidden.shape[-1] * hidden.element_size(), tokens, length)
            return
        assert measured.peak is not None
        if measured.trying is not None:
            self._read(measured, memory)
            group.allotted.clear()
        size = tokens, length
        if size not in group.allotted:
            if len(group.allotted) >= _REMEMBERED:
                group.allotted.clear()
            group.allotted[size] = self._allot(group, measured, tokens, length)
        for index, level, kept in zip(group.indices, *group.allotted[size]):
            self.levels[index] = level
            self._keep_weights(index, kept)

    def _keep_weights(self, index: int, kept: bool) -> None:
        if self._gathering is not None:
            self._gathering.keep(self._layers[index], kept)
            self.gathered[index] = kept

    @staticmethod
    def _read(measured: _Measured, memory: Memory) -> None:
        """What may be kept after the step that kept ``trying``."""
        assert measured.peak is not None
        assert measured.trying is not None
        kept, tokens = measured.trying
        measured.factor = max(measured.factor, (memory.reserved - measured.peak) / kept)
        if tokens == measured.tokens:
            left = measured.limit - memory.reserved
            measured.budget = kept + int((1 - _SLACK) * left / measured.factor)
            measured.rounds += 1
        else:
            # A smaller step shows what a byte takes, not what the largest leaves.
            measured.budget = int((1 - _SLACK) * (measured.limit - measured.peak) / measured.factor)
            measured.rounds = _ROUNDS

    def _allot(self, group: _Group, measured: _Measured, tokens: int, length: int) -> tuple[list[Level], list[bool]]:
        assert measured.peak is not None
        costs: list[Mapping[Any, Cost]] = [self._offered(index, group, tokens, length) for index in group.indices]
        costs += [self._of_weights(self._layers[index], tokens) for index in group.indices]
        # The measured peak has this of what the layers hold.
        held = spent(costs, [*(group.lowest.get(i, INPUT) for i in group.indices), *(False for _ in group.indices)])
        if measured.budget is None:
            measured.budget = int((1 - _SLACK) * (measured.limit - measured.peak))
            trial = int(_TRIAL * measured.budget)
            needed = sum(max(cost.bytes for cost in c.values()) for c in costs) - held
            if trial > 0 and needed > trial and spent(costs, allot_with_room(costs, held + trial)) > held:
                measured.budget = trial
            else:
                measured.rounds = _ROUNDS
        levels = allot_with_room(costs, held + measured.budget)
        kept, tried = spent(costs, levels) + underway(costs, levels) - held, measured.trying
        measured.trying = None
        if measured.rounds < _ROUNDS and kept > (tried[0] if tried is not None else 0):
            measured.trying = kept, tokens
            # What is reserved at its end shall be of this step alone.
            self._free_cached()
        layers = len(group.indices)
        return levels[:layers], levels[layers:]

    def _of_weights(self, layer: nn.Module, tokens: int) -> dict[bool, Cost]:
        """What it takes to gather a layer's weights again, or to keep them from forward to backward."""
        gathering = self._gathering
        if gathering is None:
            return {False: Cost(0, 0.0)}
        return cost_of_weights(layer, tokens, gathering.bytes_of(layer), gathering.seconds_of(layer))

    def _offered(self, index: int, group: _Group, tokens: int, length: int) -> dict[Level, Cost]:
        """The levels of a layer; a layer that is no node is kept whole or not at all."""
        costs = self._costs(self._layers[index], tokens, length)
        if costs is not None and index == len(self._layers) - 1:
            # Its backward comes first, before anything could have been fetched.
            return {level: cost for level, cost in costs.items() if not level.host or level == group.lowest.get(index)}
        if costs is not None:
            return self._on_host(costs)
        measured = group.measured
        assert measured is not None
        whole = measured.whole * tokens // measured.tokens
        seconds = forward_seconds(self._layers[index], tokens)
        # A layer whose size nobody measured stays as it is.
        kept = Cost(whole, 0.0 if measured.whole else 2 * seconds)
        return {group.lowest.get(index, INPUT): Cost(0, seconds), ALL: kept}

    def _start(self, group: _Group, memory: Memory, own: int, tokens: int, length: int) -> None:
        """The levels of the step that measures: inputs of ``own`` bytes only, and those on the host that do not fit."""
        # What is reserved at its end shall be of this step alone.
        self._free_cached()
        costs = self._costs(self._layers[group.indices[-1]], tokens, length)
        working = int(_WORKING_LAYERS * costs[ALL].bytes) if costs is not None else 8 * own
        room = int(self.fraction * memory.free) - working
        fitting = max(0, min(len(group.indices), room // max(own, 1)))
        moved = len(group.indices) - fitting
        group.lowest = {index: HOST if i < moved else INPUT for i, index in enumerate(group.indices)}
        for index, level in group.lowest.items():
            self.levels[index] = level
            self._keep_weights(index, kept=False)
        if costs is None and not moved:
            self._measuring = group.indices[-1]

    def _measure(self, function: functools.partial[Any], hidden: torch.Tensor, *args: Any) -> Any:
        """Run a layer keeping its activations and note what that adds to the allocator."""
        assert self._groups is not None
        group = next(g for g in self._groups.values() if self._measuring in g.indices)
        before = self._memory(hidden.device)
        output = function(*args)
        after = self._memory(hidden.device)
        assert before is not None
        assert after is not None
        assert group.measured is not None
        own = hidden.numel() * hidden.element_size()
        (group.measured.whole,) = self._agree([max(after.allocated - before.allocated - own, 1)])
        self._measuring = None
        return output

    def _recompute(self, level: Level, function: functools.partial[Any], *args: Any) -> Any:
        if self._on_xla:
            return _recompute_on_xla(function, *args)
        if level.host:
            with OffloadSaved(self._stash):
                return checkpoint(function, *args, use_reentrant=False)
        return checkpoint(function, *args, use_reentrant=False)

    def _layers_on_gpu(self) -> bool:
        return any(p.is_cuda for layer in self._layers[:1] for p in layer.parameters())

    @staticmethod
    def _free_cached() -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _recompute_on_xla(function: functools.partial[Any], *args: Any) -> Any:
    """Recompute a layer on XLA, where the input has to come by position and to require a gradient."""
    if args:
        hidden, rest = args[0], args[1:]
        call: Callable[..., Any] = function
    else:
        keywords = dict(function.keywords)
        hidden, rest = keywords.pop("hidden_states"), ()
        bound = functools.partial(function.func, *function.args, **keywords)

        def call(x: torch.Tensor) -> Any:
            return bound(hidden_states=x)

    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return xla_runtime.checkpoint(call, hidden, *rest)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` that transformers lets us run under checkpointing, in forward order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_activation_plan(
    model: nn.Module, value: bool | str | None, *, activation_memory_fraction: float | None = None
) -> ActivationPlan:
    """Install a plan on this instance; a later call replaces it.

    Args:
        model: A transformers model, or a PEFT model around one.
        value: ``"auto"`` (also ``"unsloth"``, ``"pantheraml"``), True, ``"offload"`` or False.
        activation_memory_fraction: Share of the free device memory that the automatic mode may fill. Default None: what
            ``from_pretrained`` was given, or 0.9.

    Returns:
        The plan, also kept as ``model.activation_plan``.

    Raises:
        ConfigError: an unknown mode or a fraction outside (0, 1].
        UnsupportedError: the architecture has no layer that can be recomputed, and recomputation was asked for.
    """
    mode = mode_of(value)
    if activation_memory_fraction is None:
        record = record_of(model)
        activation_memory_fraction = FRACTION if record is None else record.activation_memory_fraction
    layers = decoder_layers(model)
    if not layers and mode in ("recompute", "offload"):
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that can be recomputed",
            where=f"use_gradient_checkpointing={value!r}",
            hint="pass use_gradient_checkpointing=False",
        )
    if get_device().type == "xla":
        if mode == "offload":
            raise UnsupportedError(
                "activations cannot be held in host memory on an XLA device",
                where=f"use_gradient_checkpointing={value!r}",
                hint="pass use_gradient_checkpointing=True",
            )
        mode = "recompute" if mode == "auto" and layers else mode
    gathering = gathering_of(model)
    if gathering is not None:
        gathering.release()
    plan = ActivationPlan(layers, mode, fraction=activation_memory_fraction, gathering=gathering)
    for layer in layers:
        layer.gradient_checkpointing = mode != "keep"  # type: ignore[assignment]
        layer._gradient_checkpointing_func = plan.run  # type: ignore[assignment]
    object.__setattr__(model, "activation_plan", plan)
    return plan

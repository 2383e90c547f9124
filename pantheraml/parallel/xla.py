"""TPU cores, or other XLA devices, as one mesh: how a model is divided over them, and what they do.

One process a host drives all of its cores. Parameters, optimizer states and batches are divided along the mesh axis
``fsdp`` (https://arxiv.org/abs/2304.11277), weights also along ``tensor`` (https://arxiv.org/abs/1909.08053) where the
mesh has it. The compiler inserts the communication.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import log, xla_runtime
from ..device import get_device
from ..errors import ConfigError, MissingDependencyError, UnsupportedError

FSDP, TENSOR = "fsdp", "tensor"
# Kept with a parameter that is divided.
_SPEC = "_pantheraml_spec"
# Kept with a module whose weight is gathered in its forward.
_MESH = "_pantheraml_mesh"
# What adapters add to a model has one of these in its name.
_ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens")
# Smaller matrices cost more in collectives than they save in memory.
MIN_SHARD_ELEMENTS = 262144
# Axis of a linear layer's weight that the tensor axis divides, by transformers' name of the style.
_TENSOR_AXES = {"colwise": 0, "colwise_rep": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_rep": 1}


class TPUDependencyError(MissingDependencyError, RuntimeError):
    """torch_xla is not installed, which a setup of TPU cores needs."""


@dataclass
class MultiTPUConfig:
    """How TPU cores are used. Every field acts; a value that cannot be honoured raises.

    Args:
        num_cores: Cores that must be there, or None (default) for whatever is.
        mesh_shape: ``(fsdp, tensor)``, or ``(fsdp,)``: cores along each axis. None (default) is all along ``fsdp``.
        auto_device_map: True (default) divides weights and optimizer states over the cores, False keeps a copy of them
            on each core and divides the batch only.
        use_gradient_checkpointing: True (default) recomputes activations as the model was loaded to do, False keeps
            them all.
        length_buckets: Lengths in tokens that batches are padded to, each of which costs one compilation; None
            (default) is one length, that of the longest row.
        min_shard_elements: Weights with fewer elements stay whole on each core, default 262144.

    Raises:
        ConfigError: a value out of range.
    """

    num_cores: int | None = None
    mesh_shape: Sequence[int] | None = None
    auto_device_map: bool = True
    use_gradient_checkpointing: bool = True
    length_buckets: Sequence[int] | None = None
    min_shard_elements: int = MIN_SHARD_ELEMENTS

    def __post_init__(self) -> None:
        where = type(self).__name__
        if self.num_cores is not None and self.num_cores < 1:
            raise ConfigError(f"num_cores must be at least 1, not {self.num_cores}", where=where)
        if self.mesh_shape is not None:
            self.mesh_shape = tuple(self.mesh_shape)
            if not 1 <= len(self.mesh_shape) <= 2 or any(count < 1 for count in self.mesh_shape):
                raise ConfigError(f"mesh_shape is {self.mesh_shape}", where=where, hint="use (fsdp, tensor), as (4, 2)")
            if self.num_cores is not None and math.prod(self.mesh_shape) != self.num_cores:
                raise ConfigError(
                    f"mesh_shape={self.mesh_shape} has {math.prod(self.mesh_shape)} cores, not {self.num_cores}",
                    where=where,
                    hint="leave one of them out",
                )
        if self.length_buckets is not None:
            self.length_buckets = tuple(sorted(self.length_buckets))
            if not self.length_buckets or self.length_buckets[0] < 1:
                raise ConfigError(
                    f"length_buckets is {self.length_buckets}", where=where, hint="use lengths, as (512,)"
                )
        for name in ("auto_device_map", "use_gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}", where=where)
        if self.min_shard_elements < 0:
            raise ConfigError(f"min_shard_elements must not be negative, not {self.min_shard_elements}", where=where)


@dataclass
class _Setup:
    """What this process has set up."""

    config: MultiTPUConfig
    mesh: xla_runtime.Mesh


_setup: _Setup | None = None
_errors = 0


# ---------------------------------------------------------------- setting up


def is_tpu_available() -> bool:
    """Whether this process computes on XLA devices: a TPU, or torch_xla's CPU backend where ``PJRT_DEVICE`` asks."""
    return xla_runtime.is_installed() and get_device().type == "xla"


def setup_multi_tpu(config: MultiTPUConfig | None = None) -> MultiTPUConfig:
    """Make the mesh of all cores. The same again changes nothing; models loaded before another mesh keep theirs.

    Args:
        config: Default: what was set up before, else ``MultiTPUConfig()``.

    Returns:
        The config.

    Raises:
        TPUDependencyError: torch_xla is not installed; the text has its install line.
        UnsupportedError: this process computes on something else.
        ConfigError: ``num_cores`` or ``mesh_shape`` does not fit the cores that there are.
    """
    global _setup, _errors
    if _setup is not None and config in (None, _setup.config):
        return _setup.config
    config = config or MultiTPUConfig()
    try:
        _setup = _Setup(config, _mesh_of(config))
    except Exception:
        _errors += 1
        raise
    log.once(
        "TPU support is experimental: tested on torch_xla's CPU backend, not yet on a TPU (docs/TPU-Guide.md)",
        key="tpu",
        warn=True,
    )
    return config


def _mesh_of(config: MultiTPUConfig) -> xla_runtime.Mesh:
    if not xla_runtime.is_installed():
        raise TPUDependencyError(
            "training on a TPU needs the package 'torch_xla', which is not installed",
            where="setup_multi_tpu",
            hint=xla_runtime.INSTALL,
        )
    device = get_device()
    if device.type != "xla":
        raise UnsupportedError(
            f"this process computes on {device.type}",
            where="setup_multi_tpu",
            hint="on a host with a TPU set PJRT_DEVICE=TPU; PJRT_DEVICE=CPU takes torch_xla's CPU backend, for tests",
        )
    count = xla_runtime.device_count()
    shape = config.mesh_shape or (config.num_cores or count,)
    if math.prod(shape) != count:
        raise ConfigError(
            f"{'x'.join(map(str, shape))} cores were asked for, and there are {count}",
            where="MultiTPUConfig",
            hint="leave num_cores and mesh_shape out; TPU_VISIBLE_CHIPS (with PJRT_DEVICE=CPU: CPU_NUM_DEVICES) sets "
            "how many a process sees",
        )
    return xla_runtime.Mesh(dict(zip((FSDP, TENSOR), (*shape, 1), strict=False)))


def cleanup_multi_tpu() -> None:
    """Wait for the cores and forget the mesh. Again, or without a setup, changes nothing."""
    global _setup
    if _setup is not None:
        xla_runtime.sync(wait=True)
    _setup = None


@contextlib.contextmanager
def tpu_context(config: MultiTPUConfig | None = None) -> Iterator[MultiTPUConfig]:
    """Set up, and clean up at the end. Yields the config."""
    try:
        yield setup_multi_tpu(config)
    finally:
        cleanup_multi_tpu()


setup_tpu_training = setup_multi_tpu
cleanup_tpu_training = cleanup_multi_tpu


def current_mesh() -> xla_runtime.Mesh:
    """The mesh, set up with defaults where it was not."""
    setup_multi_tpu()
    assert _setup is not None
    return _setup.mesh


# ---------------------------------------------------------------- facts


def get_tpu_device() -> torch.device | None:
    """The device for ``tensor.to(...)``, which stands for all cores of this process; None without any."""
    return xla_runtime.device() if is_tpu_available() else None


def get_tpu_world_size() -> int:
    """Cores of all hosts; 1 without any."""
    return xla_runtime.device_count() if is_tpu_available() else 1


def get_tpu_rank() -> int:
    """Number of this process's first core; 0 without any. Processes see the same batches: do not divide data by it."""
    if not is_tpu_available():
        return 0
    return xla_runtime.process_index() * (xla_runtime.device_count() // xla_runtime.process_count())


def is_tpu_main_process() -> bool:
    """Whether this is the process that writes files."""
    return get_tpu_rank() == 0


def synchronize_tpu() -> bool:
    """Run what is pending and wait for it. Returns whether there are XLA devices."""
    if is_tpu_available():
        xla_runtime.sync(wait=True)
        return True
    return False


def get_tpu_memory_info() -> dict[str, Any]:
    """Memory of this process's first core.

    Returns:
        ``available``; bytes ``used``, ``limit`` and ``peak``; ``device``, ``rank``, ``world_size``; and ``error``
        where ``available`` is False: no core, or one that does not count. It does not raise.
    """
    from ..kernels.memory import get_tpu_memory_info as figures

    return figures() | {"rank": get_tpu_rank(), "world_size": get_tpu_world_size()}


def optimize_tpu_memory() -> bool:
    """Free what is held without need. Returns whether there are XLA devices; it does not raise without any."""
    gc.collect()
    return synchronize_tpu()


def get_tpu_status() -> dict[str, Any]:
    """What the cores of this process are and did.

    Returns:
        ``available``, ``initialized``, ``device``, ``memory_info`` (as ``get_tpu_memory_info``), ``error_count``
        (setups that failed), ``rank``, ``world_size``, ``is_main_process``, ``compiled_functions`` (programs compiled
        so far), ``mesh_shape`` (None before the setup); and ``error`` where ``available`` is False.
    """
    available = is_tpu_available()
    status: dict[str, Any] = {
        "available": available,
        "initialized": _setup is not None,
        "device": str(get_tpu_device()) if available else None,
        "memory_info": get_tpu_memory_info(),
        "error_count": _errors,
        "rank": get_tpu_rank(),
        "world_size": get_tpu_world_size(),
        "is_main_process": is_tpu_main_process(),
        "compiled_functions": xla_runtime.counters().compilations if available else 0,
        "mesh_shape": None if _setup is None else dict(_setup.mesh.shape),
    }
    if not available:
        status["error"] = (
            f"this process computes on {get_device().type}"
            if xla_runtime.is_installed()
            else f"torch_xla is not installed: {xla_runtime.INSTALL}"
        )
    return status


# ---------------------------------------------------------------- dividing models


def shard_spec(
    shape: Sequence[int], mesh: dict[str, int], minimum: int, tensor_axis: int | None = None
) -> xla_runtime.Spec:
    """How a weight is divided: ``tensor`` where the architecture says, ``fsdp`` along the longest other axis it fits.

    Args:
        shape: The weight's.
        mesh: Devices along each mesh axis.
        minimum: Weights with fewer elements are not divided along ``fsdp``.
        tensor_axis: Axis that ``tensor`` divides, or None.
    """
    spec: list[str | None] = [None] * len(shape)
    if len(shape) < 2:
        return tuple(spec)
    tensor, fsdp = mesh.get(TENSOR, 1), mesh[FSDP]
    if tensor_axis is not None and tensor > 1 and shape[tensor_axis] % tensor == 0:
        spec[tensor_axis] = TENSOR
    free = [axis for axis, name in enumerate(spec) if name is None and shape[axis] % fsdp == 0]
    if fsdp > 1 and free and math.prod(shape) >= minimum:
        spec[max(free, key=lambda axis: shape[axis])] = FSDP
    return tuple(spec)


def vocabulary_spec(shape: Sequence[int], mesh: dict[str, int], minimum: int) -> xla_runtime.Spec:
    """How an embedding or a head is divided: its vocabulary, over all devices where they divide it.

    The arguments are those of ``shard_spec``.
    """
    if mesh.get(TENSOR, 1) > 1 and math.prod(shape) >= minimum and shape[0] % math.prod(mesh.values()) == 0:
        return ((FSDP, TENSOR), *[None] * (len(shape) - 1))
    return shard_spec(shape, mesh, minimum, 0)


def _tensor_axis(name: str, plan: dict[str, str]) -> int | None:
    """The axis of a weight that tensor parallelism divides; ``plan`` maps patterns of module names to styles.

    Of an adapter that is the axis that it shares with the weight's.
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    parts = [part for part in module.split(".") if part not in ("base_model", "base_layer")]
    adapter = next((part for part in parts if part in ("lora_A", "lora_B")), None)
    layer = ".".join(parts if adapter is None else parts[: parts.index(adapter)])
    for pattern, style in plan.items():
        if style in _TENSOR_AXES and fnmatch.fnmatchcase(layer, f"*{pattern}"):
            axis = _TENSOR_AXES[style]
            return axis if adapter in (None, ("lora_B", "lora_A")[axis]) else None
    return None


def place(model: nn.Module) -> nn.Module:
    """Move a model to the cores in place, one weight after another, each sent in parts and never whole to one core.

    Weights that several modules share stay shared. Those that are on the cores already are only divided.

    Args:
        model: A transformers model, or PEFT's wrapper of one.

    Returns:
        The model.
    """
    mesh = current_mesh()
    assert _setup is not None
    config, device = _setup.config, xla_runtime.device()
    plan = {
        **(getattr(model, "_tp_plan", None) or {}),
        **(getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}),
    }
    _tell_divided_heads(model, mesh.shape.get(TENSOR, 1))
    moved: dict[int, nn.Parameter] = {}
    minimum, head = config.min_shard_elements, _head_modules(model)
    for module_name, module in model.named_modules():
        for kind, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in moved:
                name = f"{module_name}.{kind}" if module_name else kind
                moved[id(parameter)] = _placed(parameter, device)
                if config.auto_device_map and not xla_runtime.sharding(moved[id(parameter)]):
                    if parameter.dim() == 2 and (isinstance(module, nn.Embedding) or id(module) in head):
                        spec = vocabulary_spec(parameter.shape, dict(mesh.shape), minimum)
                    else:
                        spec = shard_spec(parameter.shape, dict(mesh.shape), minimum, _tensor_axis(name, plan))
                    if any(spec):
                        mesh.shard(moved[id(parameter)], spec)
                        vars(moved[id(parameter)])[_SPEC] = spec
            module._parameters[kind] = moved[id(parameter)]
        for kind, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[kind] = buffer.to(device)
    for module in model.modules():
        if type(module).forward is nn.Linear.forward and "forward" not in vars(module) and id(module) not in head:
            spec = vars(module.weight).get(_SPEC, ())
            # An adapter that is divided as its layer's features are needs nothing.
            if FSDP in spec or (TENSOR in spec and not module.weight.requires_grad):
                module.__dict__[_MESH] = mesh
                module.__dict__["forward"] = types.MethodType(_linear, module)
    return model


def _tell_divided_heads(model: nn.Module, tensor: int) -> None:
    heads = getattr(getattr(model, "config", None), "num_key_value_heads", None)
    if tensor > 1 and isinstance(heads, int) and heads % tensor:
        log.once(
            f"the mesh divides {heads} key and value heads by {tensor}: parts of heads are put together again in each "
            f"layer; let the axis {TENSOR!r} divide their number",
            key="tpu heads",
            warn=True,
        )


def _head_modules(model: nn.Module) -> set[int]:
    """Ids of the output head's modules, whose weight stays divided along the vocabulary."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {id(module) for module in head.modules()} if head is not None else set()


class _DividedLinear(torch.autograd.Function):
    """A linear layer that puts its weight together along ``fsdp`` for each pass and keeps it for none.

    Left to itself the compiler gathers a weight for the recomputation and once more for the gradient. Its own gradient
    is summed into the parts that the devices keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mesh: xla_runtime.Mesh,
        spec: xla_runtime.Spec,
    ) -> torch.Tensor:
        ctx.mesh, ctx.spec = mesh, spec
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        recomputed = xla_runtime.recomputed_input()
        whole = _gathered(weight, mesh, spec, after=recomputed)
        # A recomputed layer's backward follows at once.
        ctx.whole = None if recomputed is None else whole
        out = nn.functional.linear(hidden, whole, bias)
        if TENSOR in spec:
            # Features are divided between a pair of layers and nowhere else.
            features = TENSOR if spec[0] == TENSOR else None
            out = mesh.constrained(out, (FSDP, *[None] * (out.dim() - 2), features))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        rows = upstream[0].flatten(0, -2)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            whole = ctx.whole
            if whole is None:
                whole = _gathered(weight, ctx.mesh, ctx.spec, after=upstream[0])
            grad_hidden = upstream[0] @ whole
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.mesh.constrained(rows.t() @ hidden.flatten(0, -2), ctx.spec)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _gathered(
    weight: torch.Tensor, mesh: xla_runtime.Mesh, spec: xla_runtime.Spec, *, after: torch.Tensor | None
) -> torch.Tensor:
    return mesh.constrained(weight, tuple(None if name == FSDP else name for name in spec), after=after)


def _linear(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Forward of a linear layer whose weight is divided along ``fsdp``."""
    mesh, spec = self.__dict__[_MESH], vars(self.weight).get(_SPEC)
    if spec is None:  # Somebody gave the layer another weight.
        return nn.functional.linear(hidden, self.weight, self.bias)
    return _DividedLinear.apply(hidden, self.weight, self.bias, mesh, spec)


def _placed(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if parameter.device.type == device.type:
        return parameter
    placed = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
    placed.__dict__.update(parameter.__dict__)
    return placed


def divide_states(optimizer: torch.optim.Optimizer) -> None:
    """Divide optimizer states as the weights that they belong to; those of a checkpoint come whole."""
    mesh = current_mesh()
    for parameter, states in optimizer.state.items():
        spec = vars(parameter).get(_SPEC)
        for state in states.values():
            if (
                spec
                and isinstance(state, torch.Tensor)
                and state.shape == parameter.shape
                and not xla_runtime.sharding(state)
            ):
                mesh.shard(state, spec)


# ---------------------------------------------------------------- host copies


def host_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict in host memory; of an adapter's, what the adapter's files are made of.

    Every process has to call it. Tensors that are shared in the model are shared in the result.
    """
    state = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        embeddings = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
        state = {
            name: value
            for name, value in state.items()
            if value.requires_grad or id(value) in embeddings or any(part in name for part in _ADAPTER_PARTS)
        }
    distinct = {id(value): value for value in state.values()}
    on_device = [key for key, value in distinct.items() if value.device.type == "xla"]
    copies = {key: value.detach() for key, value in distinct.items()}
    copies |= zip(on_device, xla_runtime.read([distinct[key] for key in on_device]), strict=True)
    return {name: copies[id(value)] for name, value in state.items()}


def host_copy(value: Any) -> Any:
    """The same lists and dicts with tensors in host memory, all of them in one transfer."""
    found: list[torch.Tensor] = []

    def collect(part: Any) -> None:
        if isinstance(part, torch.Tensor) and part.device.type == "xla":
            found.append(part)
        elif isinstance(part, dict | list | tuple):
            for item in part.values() if isinstance(part, dict) else part:
                collect(item)

    collect(value)
    copies = iter(xla_runtime.read(found))

    def replaced(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return next(copies) if part.device.type == "xla" else part
        if isinstance(part, dict):
            return {key: replaced(item) for key, item in part.items()}
        return type(part)(replaced(item) for item in part) if isinstance(part, list | tuple) else part

    return replaced(value)


def save_pretrained(model: Any, save_directory: str, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
    """``save_pretrained`` of transformers or PEFT, which cannot read tensors on XLA devices, from copies on the host.

    Every process has to call it; the main process writes.

    Args:
        model: The model.
        save_directory: Where to.
        *args: As for the model's own.
        state_dict: As for the model's own, default the model's.
        **kwargs: As for the model's own.
    """
    state = host_state(model) if state_dict is None else state_dict
    kwargs.setdefault("is_main_process", is_tpu_main_process())
    return type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)

"""Decoding steps of ``generate`` as one recorded CUDA graph.

A step of a small batch waits for the host, which enqueues hundreds of kernels for each token. Recorded once, the step
is one launch. That needs a cache whose memory stays where it is, so one of the final length is made, and a model whose
step does the same each time. Where a request or a model does not fit, generation runs as transformers runs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from .. import log

# Steps before the recording, in which kernels are compiled and libraries set up.
WARM_UP = 2
# Fewer new tokens do not repay the recording, which costs about two of the steps it saves.
LEAST_TOKENS = 16
# Share of the free memory that the cache may take.
CACHE_FRACTION = 0.5
# Anything else that a request names or hands over changes what a step is, or what becomes of the cache.
_PLAIN_TENSORS = frozenset({"input_ids", "inputs", "attention_mask"})
_MUST_BE_UNSET = (
    "cache_implementation",
    "compile_config",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "guidance_scale",
    "past_key_values",
    "penalty_alpha",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
    "constraints",
    "force_words_ids",
)

_unrecordable: WeakSet[nn.Module] = WeakSet()


def obstacle(model: nn.Module, prompt: torch.Tensor | None, kwargs: Mapping[str, Any]) -> str | None:
    """Why the decoding steps of a request are not recorded; None when they can be.

    Args:
        model: A transformers model.
        prompt: Token ids [B, T] that generation begins with.
        kwargs: What ``generate`` was called with.
    """
    if prompt is None or prompt.dim() != 2:
        return "it begins with something other than token ids"
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cuda":
        return "graphs are CUDA's"
    if any(p.device != first.device or isinstance(p, DTensor) for p in model.parameters()):
        return "its weights are not all on one device"
    if model in _unrecordable:
        return "recording it has failed before"
    if any(isinstance(v, torch.Tensor) and name not in _PLAIN_TENSORS for name, v in kwargs.items()):
        return "it is given more than token ids"
    setting = _settings(model, kwargs)
    for name in _MUST_BE_UNSET:
        if setting(name):
            return f"{name} is set"
    if (setting("num_beams") or 1) != 1 or setting("use_cache") is False or setting("is_assistant"):
        return "it searches or keeps no cache"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "its steps differ"
    length = _length(setting, prompt)
    if length - prompt.shape[1] < LEAST_TOKENS:
        return f"{length - prompt.shape[1]} tokens do not repay it"
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    layers = StaticCache(config=config, max_cache_len=length).layers
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in layers):
        return "its cache holds states"
    # Once a window is full, its layer does something else at each step.
    if any(getattr(layer, "max_cache_len", length) < length for layer in layers):
        return "it goes beyond a window"
    rows = prompt.shape[0] * (setting("num_return_sequences") or 1)
    if _cache_bytes(config, rows, length, first) > CACHE_FRACTION * _free_bytes(first.device):
        return "a cache of the final length is too large"
    return None


def _settings(model: Any, kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, None) if value is None else value

    return setting


def _length(setting: Callable[[str], Any], prompt: torch.Tensor) -> int:
    """Tokens of a row when generation ends at the latest."""
    new = setting("max_new_tokens")
    return prompt.shape[1] + new if new is not None else setting("max_length") or 0


def _cache_bytes(config: Any, rows: int, length: int, weight: torch.Tensor) -> float:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = weight.dtype.itemsize if weight.is_floating_point() else 2
    return 2.0 * rows * length * config.num_hidden_layers * heads * size * itemsize


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def recorded_steps(model: Any, prompt: torch.Tensor | None, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Record and replay the decoding steps of one call of ``generate``, where that is possible.

    Args:
        model: A transformers model; its forward is replaced while this lasts.
        prompt: Token ids [B, T] that generation begins with.
        kwargs: What ``generate`` was called with.

    Yields:
        What to call transformers' ``generate`` with.
    """
    reason = obstacle(model, prompt, kwargs)
    if reason is not None or prompt is None:
        log.get_logger().debug("decoding steps are not recorded: %s", reason)
        yield kwargs
        return
    length = _length(_settings(model, kwargs), prompt)
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    before = model.__dict__.get("forward")
    steps = Steps(model, model.forward, cache)
    object.__setattr__(model, "forward", functools.wraps(model.forward)(lambda *args, **given: steps(*args, **given)))
    try:
        yield {**kwargs, "past_key_values": cache, "disable_compile": True}
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            object.__setattr__(model, "forward", before)
        steps.release()


class Steps:
    """A model's forward, whose decoding steps with one cache are recorded and replayed."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], cache: StaticCache) -> None:
        self.model, self.forward, self.cache = model, forward, cache
        # Layers that count their tokens on the host, too, where no replay does.
        self.counting = [layer for layer in cache.layers if isinstance(layer, StaticSlidingWindowLayer)]
        self.warm = 0
        self.recording: Recording | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, or replay it where it is the step that was recorded."""
        ids = kwargs.get("input_ids")
        step = ids is not None and ids.shape[1] == 1 and kwargs.get("past_key_values") is self.cache and not args
        if not step or self.model in _unrecordable:
            return self.forward(*args, **kwargs)
        if self.recording is None:
            if self.warm < WARM_UP:
                self.warm += 1
                return self.forward(**kwargs)
            counts = [layer.cumulative_length_int for layer in self.counting]
            try:
                self.recording = Recording(self.forward, kwargs)
            except RuntimeError as error:
                _unrecordable.add(self.model)
                reason = next(iter(str(error).splitlines()), "")
                name = type(self.model).__name__
                log.once(f"generate: decoding steps of {name} cannot be recorded ({reason}), and run one by one")
            finally:
                # Nothing of the step has run yet.
                for layer, count in zip(self.counting, counts):
                    layer.cumulative_length_int = count
        if self.recording is None or not self.recording.covers(kwargs):
            return self.forward(**kwargs)
        for layer in self.counting:
            layer.cumulative_length_int += 1
        return self.recording(kwargs)

    def release(self) -> None:
        """Give the graph's memory back."""
        if self.recording is not None:
            self.recording.release()
        self.recording = None


class Recording:
    """One call of a forward, recorded, to be replayed with other values in its tensors.

    Args:
        forward: What is recorded.
        kwargs: Its arguments: tensors, dicts of tensors, and what stays the same from call to call.
    """

    def __init__(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        self.kwargs = {name: _mapped(torch.clone, value) for name, value in kwargs.items()}
        self.graph, self.output = _record(functools.partial(forward, **self.kwargs))

    def covers(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call differs from the recorded one in the values of tensors only."""
        return kwargs.keys() == self.kwargs.keys() and all(_alike(kwargs[n], own) for n, own in self.kwargs.items())

    def __call__(self, kwargs: Mapping[str, Any]) -> Any:
        """Replay with these arguments. The output's memory is that of the replay before."""
        for name, own in self.kwargs.items():
            _copy(own, kwargs[name])
        self.graph.replay()
        return self.output

    def release(self) -> None:
        """Give the graph's memory back; the output is gone with it."""
        self.output = None
        self.graph.reset()


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One a device, because cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(index)


def _record(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    # What autocast converts in a recording belongs to the recording.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        # torch.cuda.graph would first give all cached memory back, which training then has to ask for again.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = call()
            except BaseException:  # a recording left open would fail every later call
                _abandon(graph)
                raise
            graph.capture_end()
    finally:
        torch.set_autocast_cache_enabled(cached)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, output


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    # It says again what made the recording fail.
    with contextlib.suppress(RuntimeError):
        graph.capture_end()


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) is dict:
        return {name: _mapped(function, item) for name, item in value.items()}
    return value


def _alike(value: Any, own: Any) -> bool:
    if isinstance(own, torch.Tensor):
        return isinstance(value, torch.Tensor) and (value.shape, value.dtype, value.device) == (
            own.shape,
            own.dtype,
            own.device,
        )
    if type(own) is dict:
        return type(value) is dict and value.keys() == own.keys() and all(_alike(value[n], v) for n, v in own.items())
    return value is own or (isinstance(own, bool | int | float | str) and value == own)


def _copy(own: Any, value: Any) -> None:
    if isinstance(own, torch.Tensor):
        own.copy_(value)
    elif type(own) is dict:
        for name, item in own.items():
            _copy(item, value[name])

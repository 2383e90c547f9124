"""Medians of the device's time for a call, and the measurement of all contenders of a workload."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from workload import Inputs, Workload

Result = dict[str, Any]
COPY_BYTES = 1 << 30
# Written before each timed call, so that nothing of it is found in the L2 cache.
FLUSH_BYTES = 256 << 20
MIN_CALLS, MAX_CALLS = 3, 100
# The device sleeps while the host enqueues the calls, so that launching is not timed; cycles of a fast clock.
CYCLES_A_SECOND = 2.0e9
MAX_SLEEP_S = 0.1


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)


def timed(function: Callable[[], Any], device: torch.device, milliseconds: float) -> tuple[float, float]:
    """Median time of one call on the device in milliseconds, and what the host needs to enqueue one in microseconds.

    About ``milliseconds`` are spent on timed calls. As ``triton.testing.do_bench``, but the device is kept busy until
    the calls are enqueued: on a fast device a short kernel otherwise waits for Python.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        return seconds * 1e3, seconds * 1e6
    flush = _flush_buffer(device)
    function()
    torch.cuda.synchronize()
    host = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(3):
        started = time.perf_counter()
        function()
        host.append(time.perf_counter() - started)
        flush.zero_()
    end.record()
    torch.cuda.synchronize()
    calls = min(max(math.ceil(milliseconds / (begin.elapsed_time(end) / 3)), MIN_CALLS), MAX_CALLS)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    torch.cuda._sleep(int(min(calls * (median(host) * 1.3 + 2e-5), MAX_SLEEP_S) * CYCLES_A_SECOND))
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events), median(host) * 1e6


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a device-to-device copy of one GiB."""
    count = COPY_BYTES // 2 if device.type == "cuda" else 1 << 20
    source = torch.zeros(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    milliseconds, _ = timed(lambda: target.copy_(source), device, 60)
    return 4 * count / (milliseconds * 1e-3)


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an op's result."""
    items = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return tuple(item for item in items if isinstance(item, torch.Tensor))


def _leaves(workload: Workload, inputs: Inputs) -> Inputs:
    """Copies of the inputs, with gradients where the workload asks for them."""
    return {name: t.clone().requires_grad_(name in workload.leaves) for name, t in inputs.items()}


def _backward(
    workload: Workload, outputs: tuple[torch.Tensor, ...], leaves: Inputs, *, keep: bool
) -> Callable[[], tuple[torch.Tensor | None, ...]]:
    """The backward, with its upstream gradients made before."""
    ends = [output for output in outputs if output.requires_grad]
    upstream = [torch.ones_like(end) for end in ends]
    wanted = [leaves[name] for name in workload.leaves]
    return lambda: torch.autograd.grad(ends, wanted, upstream, retain_graph=keep, allow_unused=True)


def once(workload: Workload, function: Callable[..., Any], inputs: Inputs) -> tuple[list[Any], int]:
    """Outputs and gradients of one call, and the bytes it took at its peak beyond its inputs."""
    leaves = _leaves(workload, inputs)
    on_gpu = torch.cuda.is_available()
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    outputs = as_tuple(function(**leaves))
    gradients = _backward(workload, outputs, leaves, keep=False)() if workload.leaves else ()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return [None if t is None else t.detach() for t in (*outputs, *gradients)], peak


def difference(ours: list[torch.Tensor], eager: list[torch.Tensor]) -> float:
    """Largest difference of two lists of tensors, each relative to the largest value of the second.

    Differences are taken in slices, because widening a tensor of gigabytes at once could exhaust the memory.
    """

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.shape != b.shape:
            raise ValueError(f"ours has shape {tuple(a.shape)} and eager {tuple(b.shape)}")
        largest = error = 0.0
        for part_a, part_b in zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26)):
            wide = part_b.float()
            largest = max(largest, float(wide.abs().max()))
            error = max(error, float((part_a.float() - wide).abs().nan_to_num(nan=float("inf")).max()))
        return error / max(largest, 1e-6)

    return max(relative(a, b) for a, b in zip(ours, eager, strict=True))


def _times(
    workload: Workload, function: Callable[..., Any], inputs: Inputs, device: torch.device, milliseconds: float
) -> Result:
    leaves = _leaves(workload, inputs)
    result: Result = {}
    result["forward_ms"], result["forward_host_us"] = timed(lambda: function(**leaves), device, milliseconds)
    if workload.leaves:
        outputs = as_tuple(function(**leaves))
        backward = _backward(workload, outputs, leaves, keep=True)
        result["backward_ms"], result["backward_host_us"] = timed(backward, device, milliseconds)
    return result


def contender_of(workload: Workload, name: str) -> Callable[..., Any] | None:
    """The function of a contender, or None when the workload has none of that name."""
    if name == "torch.compile":
        return torch.compile(workload.contenders["eager"]()) if "eager" in workload.contenders else None
    return workload.contenders[name]() if name in workload.contenders else None


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    workload: Workload, names: list[str], device: torch.device, *, milliseconds: float | None
) -> dict[str, Result]:
    """Time the named contenders of a workload, or only call each once (``milliseconds=None``).

    A failure of a contender is a result. Ours is compared with eager when both are named, in that order.
    """
    torch.manual_seed(0)
    gc.freeze()  # what is there now, such as imported packages, is not searched again after each contender
    inputs = workload.make(device)
    results: dict[str, Result] = {}
    expected = None
    for name in names:
        started = time.monotonic()
        try:
            function = contender_of(workload, name)
            if function is None:
                continue
            values, peak = once(workload, function, inputs)
            result: Result = {"peak_extra_mb": peak / 1e6}
            if name == "ours" and "eager" in names:
                expected = values
            elif name == "eager" and expected is not None and "error" not in results["ours"]:
                results["ours"]["difference_from_eager"] = error = difference(expected, values)
                expected = None
                if not error <= workload.tolerance:
                    results["ours"] = {"error": f"wrong result: differs from eager by {error:.3g}"}
            del values
            if milliseconds is not None:
                result |= _times(workload, function, inputs, device, milliseconds)
            results[name] = result
        except Exception as error:  # noqa: BLE001 - a peer's failure is recorded, whatever it is
            results[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        finally:
            results.setdefault(name, {})["seconds"] = time.monotonic() - started
            function = None
            _release(device)
    return {name: result for name, result in results.items() if result.keys() != {"seconds"}}

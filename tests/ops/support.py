"""Helpers of the kernel tests: interpreter switch, poisoned memory, and the comparison against float64 truth.

The rule of the comparison: inputs are rounded to the dtype under test and widened to float64, where the eager
reference gives the truth. The error of the kernel at the dtype may be at most ``factor`` times that of the eager
reference at the same dtype, plus half a unit in the last place of the largest true value (the rounding that storing the
result costs in any case) and ``FLOOR`` (rounding of float32 intermediates that cancel), in the maximum; and the same
with the root mean square, which shows drift.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FACTOR = 2.0
FLOOR = 4 * torch.finfo(torch.float32).eps


def interpret_kernels() -> None:
    """Turn every Triton function of Triton's library and of the kernel files into its interpreted form.

    The variable TRITON_INTERPRET is read when a function is decorated, so it must be set before the first import of
    triton by anybody; it would also leak to other tests and to child processes. Swapping the functions does neither.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton
    import triton.experimental.gluon  # loaded by the first launch, and refuses swapped functions if it comes later
    from triton.runtime.interpreter import InterpretedFunction

    from pantheraml.kernels import _triton, _variants

    for name in _variants.MODULES:
        importlib.import_module(f"pantheraml.kernels.{name}")
    interpreted: dict[Callable[..., object], InterpretedFunction] = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith(("triton.language", "pantheraml.kernels")):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                vars(module)[name] = interpreted.setdefault(value.fn, InterpretedFunction(value.fn))
    assert _triton.interpreted()
    _round_to_nearest()
    _multiply_bfloat16()


def _round_to_nearest() -> None:
    """Make the interpreter round float32 to bfloat16 and fp8 as GPUs do; it truncates to bfloat16 by itself."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    targets = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }

    def rounding(convert):
        def wrapper(self, src, dst_type, *rest):
            target = targets.get(dst_type.scalar)
            if target is None or src.dtype.scalar != tl.float32:
                return convert(self, src, dst_type, *rest)
            dtype, bits = target
            data = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32)).to(dtype).view(bits).numpy()
            return TensorHandle(data.reshape(src.data.shape), dst_type.scalar)

        return wrapper

    for name in ("create_fp_trunc", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, rounding(getattr(InterpreterBuilder, name)))


def _multiply_bfloat16() -> None:
    """Make the interpreter's matrix product read bfloat16 as numbers; it multiplies their bits by itself."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def wrapper(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = wrapper


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN, or with the largest value of an integer type."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        if tensor.dtype.itemsize == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3fn and e5m2
        else:
            tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def tensors_of(result) -> list[torch.Tensor]:
    """The tensors of an op's result: a tensor, or a tuple with tensors and None."""
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal float64 numbers that depend on nothing but ``seed`` and the shape."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum((i + 1) * s for i, s in enumerate(shape)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def run(
    function: Callable[..., object],
    inputs: Mapping[str, torch.Tensor],
    *,
    dtypes: Mapping[str, torch.dtype],
    grad: tuple[str, ...],
    round_to: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of ``function(**inputs)`` as float64.

    Args:
        function: Called with one leaf tensor per input, by name.
        inputs: Values of the leaves; floating ones are converted to ``dtypes[name]``, others only moved.
        dtypes: Dtype of each floating input.
        grad: Names of the leaves that require a gradient.
        round_to: The upstream gradients (fixed random numbers) are rounded to it, whatever the outputs' dtype is.
        device: Where to run.
    """
    leaves = {}
    for name, value in inputs.items():
        leaf = value.to(device=device, dtype=dtypes.get(name, value.dtype)).clone()
        leaves[name] = leaf.requires_grad_() if name in grad else leaf
    outputs = tensors_of(function(**leaves))
    collected = {f"output {i}": output for i, output in enumerate(outputs)}
    if grad:
        differentiable = [output for output in outputs if output.requires_grad]
        assert differentiable, "no output requires a gradient"
        upstream = [
            random(*output.shape, seed=100 + i).to(round_to).to(output.device, output.dtype)
            for i, output in enumerate(differentiable)
        ]
        before = [gradient.clone() for gradient in upstream]
        saved = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        torch.autograd.backward(differentiable, upstream)
        assert all(torch.equal(g, b) for g, b in zip(upstream, before)), "backward wrote into the incoming gradient"
        for name, leaf in leaves.items():
            assert torch.equal(leaf.detach(), saved[name]), f"backward wrote into the input {name}"
            if name in grad:
                assert leaf.grad is not None, f"no gradient for {name}"
                collected[f"gradient of {name}"] = leaf.grad
    return {name: value.detach().double() for name, value in collected.items()}


def assert_error(
    name: str,
    ours: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    *,
    factor: float = FACTOR,
) -> None:
    """Check one float64 tensor against the rule at the top of this file."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} elements are not finite"
    half_ulp = torch.finfo(dtype).eps / 2
    for measure, reduce in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = reduce(ours - truth), factor * reduce(eager - truth) + half_ulp * reduce(truth) + FLOOR
        assert error <= allowed, f"{name}: {measure} error {error:.3e}, allowed {allowed:.3e} ({dtype})"


def assert_matches(
    kernel: Callable[..., object],
    reference: Callable[..., object],
    inputs: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    grad: tuple[str, ...] = (),
    keep: Mapping[str, torch.dtype] | None = None,
    factor: float = FACTOR,
) -> None:
    """Compare outputs and gradients of a kernel with float64 truth, by the rule at the top of this file.

    Args:
        kernel: The op on its Triton backend, called with the inputs by name. Slice or transpose inside to test strides.
        reference: The eager specification, called alike.
        inputs: Float64 values (see ``random``), or integer tensors.
        dtype: The dtype under test, of every floating input that ``keep`` does not name.
        device: Where the kernel runs.
        grad: Inputs that require a gradient.
        keep: Dtypes of inputs that differ from ``dtype``, such as float32 weights.
        factor: Allowed multiple of the eager error.
    """
    dtypes = {name: dtype for name, value in inputs.items() if value.is_floating_point()} | dict(keep or {})
    rounded = {name: value.to(dtypes.get(name, value.dtype)) for name, value in inputs.items()}
    common = {"grad": grad, "round_to": dtype, "device": device}
    truth = run(reference, rounded, dtypes=dict.fromkeys(dtypes, torch.float64), **common)
    eager = run(reference, rounded, dtypes=dtypes, **common)
    ours = run(kernel, rounded, dtypes=dtypes, **common)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_error(name, ours[name], eager[name], truth[name], dtype, factor=factor)

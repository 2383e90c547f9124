"""Workloads of quantised matrices: 4-bit and fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from workload import DTYPE, Inputs, Model, Workload, randn

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


def _quantized(inputs: Inputs, out: int, width: int) -> Any:
    from pantheraml.kernels.nf4 import Quantized4Bit

    names = ("nested_absmax", "nested_code", "nested_offset")
    nested = {name: inputs[name] for name in names} | {"nested_blocksize": 256}
    shape = torch.Size((out, width))
    return Quantized4Bit(inputs["packed"], inputs["absmax"], inputs["code"], 64, shape, DTYPE, **nested)


class _State:
    """The record that bitsandbytes and its users read, made once for a set of inputs."""

    def __init__(self, out: int, width: int) -> None:
        self.shape, self.made, self.key = torch.Size((out, width)), None, 0

    def __call__(self, inputs: Inputs) -> Any:
        if self.key != inputs["packed"].data_ptr():
            from bitsandbytes.functional import QuantState

            self.key = inputs["packed"].data_ptr()
            code = inputs["nested_code"]
            inner = QuantState(inputs["nested_absmax"], code=code, blocksize=256, dtype=torch.float32)
            self.made = QuantState(
                inputs["absmax"],
                shape=self.shape,
                code=inputs["code"],
                blocksize=64,
                quant_type="nf4",
                dtype=DTYPE,
                offset=inputs["nested_offset"],
                state2=inner,
            )
        return self.made


def _nf4_inputs(out: int, width: int, device: torch.device) -> Inputs:
    blocks = out * width // 64
    return {
        "packed": torch.randint(0, 256, (out * width // 2, 1), dtype=torch.uint8, device=device),
        "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        "code": torch.tensor(NF4, device=device),
        "nested_absmax": torch.rand(-(-blocks // 256), device=device),
        "nested_code": torch.rand(256, device=device),
        "nested_offset": torch.tensor(0.1, device=device),
    }


def nf4_dequantize(model: Model, tokens: int) -> Workload:
    """The gate's weight, double quantised, to bf16."""
    from pantheraml.kernels import nf4_dequantize as ours
    from pantheraml.kernels.reference.nf4 import nf4_dequantize as reference

    out, width = model.intermediate, model.hidden
    state = _State(out, width)

    def bitsandbytes() -> Callable[..., Any]:
        from bitsandbytes.functional import dequantize_4bit

        return lambda **t: dequantize_4bit(t["packed"], state(t))

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import fast_dequantize

        return lambda **t: fast_dequantize(t["packed"], state(t))

    count = out * width
    return Workload(
        f"{out}×{width}",
        lambda device: _nf4_inputs(out, width, device),
        (),
        {
            "ours": lambda: lambda **t: ours(_quantized(t, out, width)),
            "eager": lambda: lambda **t: reference(_quantized(t, out, width), DTYPE),
            "bitsandbytes": bitsandbytes,
            "unsloth": unsloth,
        },
        count // 2 + count // 64 + count * DTYPE.itemsize,
    )


def nf4_matvec(model: Model, tokens: int) -> Workload:
    """One vector through the gate's 4-bit weight."""
    from pantheraml.kernels.nf4_product import nf4_matvec as ours
    from pantheraml.kernels.reference.nf4 import nf4_dequantize as reference

    out, width = model.intermediate, model.hidden
    state = _State(out, width)

    def bitsandbytes() -> Callable[..., Any]:
        from bitsandbytes.functional import gemv_4bit

        return lambda x, **t: gemv_4bit(x[None], t["packed"].t(), state=state(t))

    def unsloth() -> Callable[..., Any]:
        from unsloth.kernels import fast_gemv

        return lambda x, **t: fast_gemv(x[None], t["packed"], state(t))

    return Workload(
        f"{out}×{width} · 1",
        lambda device: {"x": randn(1, width, device=device)} | _nf4_inputs(out, width, device),
        (),
        {
            "ours": lambda: lambda x, **t: ours(x, _quantized(t, out, width)),
            "eager": lambda: lambda x, **t: x @ reference(_quantized(t, out, width), DTYPE).t(),
            "bitsandbytes": bitsandbytes,
            "unsloth": unsloth,
        },
        out * width // 2 + out * width // 64,
    )


def fp8_transpose(model: Model, tokens: int) -> Workload:
    """The gate's weight in fp8."""
    from pantheraml.kernels.fp8 import fp8_transpose as ours

    out, width = model.intermediate, model.hidden
    return Workload(
        f"{out}×{width}",
        lambda device: {"x": randn(out, width, device=device).to(torch.float8_e4m3fn)},
        (),
        {"ours": lambda: ours, "eager": lambda: lambda x: x.t().contiguous()},
        2 * out * width,
    )


def fp8_quantize_rows(model: Model, tokens: int) -> Workload:
    """Activations by row."""
    from pantheraml.kernels.fp8 import fp8_quantize_rows as ours
    from pantheraml.kernels.reference.fp8 import quantize_rows

    width = model.hidden
    return Workload(
        f"D={width}",
        lambda device: {"x": randn(tokens, width, device=device)},
        (),
        {"ours": lambda: ours, "eager": lambda: lambda x: quantize_rows(x.float())},
        3 * tokens * width,
        # One step of three mantissa bits: torch multiplies with the rounded inverse where the kernel divides.
        tolerance=0.08,
    )


def fp8_quantize_blocks(model: Model, tokens: int) -> Workload:
    """The gate's weight by 128 × 128 tile."""
    from pantheraml.kernels.fp8 import fp8_quantize_blocks as ours
    from pantheraml.kernels.reference.fp8 import quantize_blocks

    out, width = model.intermediate, model.hidden
    return Workload(
        f"{out}×{width}",
        lambda device: {"x": randn(out, width, device=device)},
        (),
        {"ours": lambda: ours, "eager": lambda: lambda x: quantize_blocks(x, torch.float8_e4m3fn)},
        3 * out * width,
        tolerance=0.08,
    )


OPS = {
    "nf4_dequantize": nf4_dequantize,
    "nf4_matvec": nf4_matvec,
    "fp8_transpose": fp8_transpose,
    "fp8_quantize_rows": fp8_quantize_rows,
    "fp8_quantize_blocks": fp8_quantize_blocks,
}

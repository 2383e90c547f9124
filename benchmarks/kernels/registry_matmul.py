"""Workloads of the ops around matrix products: heads, LoRA, 4-bit and fp8 weights, experts. See ``registry``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from registry import DTYPE, MODELS, QUICK_MODELS, QUICK_TOKENS, TOKENS, Contender, Inputs, Model, Workload, randn

VOCABULARY = {"Llama-3.2-1B": 128_256, "Gemma-2-2B": 256_000, "Qwen3-4B": 151_936, "Llama-3.1-8B": 128_256}
# The largest logits that eager and its float32 copies leave room for on 80 GB.
MAX_LOGITS = 8192 * 256_000
RANK, SCALING = 16, 2.0
EXPERTS = 32
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
LLAMA = MODELS[3]


def cross_entropy(model: Model, tokens: int) -> Workload:
    """Over logits, the gradient apart from them."""
    from pantheraml.kernels import cross_entropy as ours

    vocabulary = VOCABULARY[model.name]

    def make(device: torch.device) -> Inputs:
        return {
            "logits": randn(tokens, vocabulary, device=device),
            "labels": torch.randint(0, vocabulary, (tokens,), device=device),
        }

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as Function

        return lambda logits, labels: Function.apply(logits, labels, None)[0]

    def unsloth() -> Callable[..., Any]:
        import unsloth  # noqa: F401
        from unsloth.kernels import fast_cross_entropy_loss

        return lambda logits, labels: fast_cross_entropy_loss(logits[None], labels[None])

    size = tokens * vocabulary * DTYPE.itemsize
    return Workload(
        "cross_entropy",
        f"V={vocabulary}",
        tokens,
        make,
        ("logits",),
        {
            "ours": lambda: ours,
            "eager": lambda: lambda logits, labels: torch.nn.functional.cross_entropy(logits.float(), labels),
            "liger": liger,
            "unsloth": unsloth,
        },
        size,
        2 * size,
    )


class _BareHead(torch.autograd.Function):
    """The products that a frozen head cannot do without, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden, weight):
        logits = torch.mm(hidden, weight.t())
        ctx.save_for_backward(torch.mm(logits, weight))
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad):
        return ctx.saved_tensors[0], None


def _linear_cross_entropy(op: str, model: Model, tokens: int, leaves: tuple[str, ...], products: int) -> Workload:
    from pantheraml.kernels import linear_cross_entropy as ours

    vocabulary, width = VOCABULARY[model.name], model.hidden

    def make(device: torch.device) -> Inputs:
        return {
            "hidden": randn(tokens, width, device=device),
            "weight": randn(vocabulary, width, device=device) * 0.02,
            "labels": torch.randint(0, vocabulary, (tokens,), device=device),
        }

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

        return lambda hidden, weight, labels: Function.apply(hidden, weight, labels)[0]

    def eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)

    contenders: dict[str, Contender] = {"ours": lambda: ours, "eager": lambda: eager, "liger": liger}
    if leaves == ("hidden",):
        contenders["bare GEMMs"] = lambda: lambda hidden, weight, labels: _BareHead.apply(hidden, weight)
    flops = 2.0 * products * tokens * vocabulary * width
    return Workload(
        op, f"H={width} V={vocabulary}", tokens, make, leaves, contenders, forward_flops=flops, tolerance=4e-2
    )


def linear_cross_entropy(model: Model, tokens: int) -> Workload:
    """Frozen head."""
    return _linear_cross_entropy("linear_cross_entropy", model, tokens, ("hidden",), 2)


def linear_cross_entropy_trained(model: Model, tokens: int) -> Workload:
    """With the head's gradient."""
    return _linear_cross_entropy("linear_cross_entropy_trained", model, tokens, ("hidden", "weight"), 3)


class _BareLinear(torch.autograd.Function):
    """The frozen product alone; its adapters' gradients are unfilled memory."""

    @staticmethod
    def forward(ctx: Any, x, weight, A, B):
        ctx.save_for_backward(weight, A, B)
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad):
        weight, A, B = ctx.saved_tensors
        return torch.mm(grad, weight), None, torch.empty_like(A), torch.empty_like(B)


def _lora_linear(name: str, out: int, width: int, tokens: int) -> Workload:
    from pantheraml.kernels import lora_linear as ours
    from pantheraml.kernels.reference.lora import lora_linear as reference

    def make(device: torch.device) -> Inputs:
        return {
            "x": randn(tokens, width, device=device),
            "weight": randn(out, width, device=device) * 0.02,
            "A": torch.randn(RANK, width, device=device) * 0.02,
            "B": torch.randn(out, RANK, device=device) * 0.02,
        }

    def eager(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return reference(x, weight, [(A, B, SCALING)])

    flops = 2.0 * tokens * out * width
    return Workload(
        "lora_linear",
        f"{name} {width}→{out} r={RANK}",
        tokens,
        make,
        ("x", "A", "B"),
        {
            "ours": lambda: lambda x, weight, A, B: ours(x, weight, A, B, SCALING),
            "eager": lambda: eager,
            "bare GEMMs": lambda: lambda x, weight, A, B: _BareLinear.apply(x, weight, A, B),
        },
        forward_flops=flops,
        backward_flops=flops,
    )


def lora_mlp(model: Model, tokens: int) -> Workload:
    """Gated MLP with adapters on all three layers."""
    from pantheraml.kernels.lora import Adapter, Projection
    from pantheraml.kernels.lora import lora_mlp as ours

    shapes = {"g": (model.intermediate, model.hidden), "u": (model.intermediate, model.hidden)}
    shapes["d"] = (model.hidden, model.intermediate)

    def make(device: torch.device) -> Inputs:
        inputs = {"x": randn(tokens, model.hidden, device=device)}
        for name, (out, width) in shapes.items():
            inputs[f"{name}W"] = randn(out, width, device=device) * 0.02
            inputs[f"{name}A"] = torch.randn(RANK, width, device=device) * 0.02
            inputs[f"{name}B"] = torch.randn(out, RANK, device=device) * 0.02
        return inputs

    def call(backend: str) -> Callable[..., Any]:
        def run(**t: torch.Tensor) -> torch.Tensor:
            layers = [Projection(t[f"{n}W"], [Adapter(t[f"{n}A"], t[f"{n}B"], SCALING)]) for n in shapes]
            return ours(t["x"], *layers, backend=backend)

        return run

    flops = 6.0 * tokens * model.hidden * model.intermediate
    return Workload(
        "lora_mlp",
        f"D={model.hidden} I={model.intermediate} r={RANK}",
        tokens,
        make,
        ("x", *(f"{n}{p}" for n in shapes for p in "AB")),
        {"ours": lambda: call("auto"), "eager": lambda: call("reference")},
        forward_flops=flops,
        backward_flops=flops,
    )


def _quantized(inputs: Inputs, out: int, width: int) -> Any:
    from pantheraml.kernels.nf4 import Quantized4Bit

    names = ("nested_absmax", "nested_code", "nested_offset")
    nested = {name: inputs[name] for name in names} | {"nested_blocksize": 256}
    shape = torch.Size((out, width))
    return Quantized4Bit(inputs["packed"], inputs["absmax"], inputs["code"], 64, shape, DTYPE, **nested)


def _bitsandbytes_state(inputs: Inputs, out: int, width: int) -> Any:
    from bitsandbytes.functional import QuantState

    inner = QuantState(inputs["nested_absmax"], code=inputs["nested_code"], blocksize=256, dtype=torch.float32)
    return QuantState(
        inputs["absmax"],
        shape=torch.Size((out, width)),
        code=inputs["code"],
        blocksize=64,
        quant_type="nf4",
        dtype=DTYPE,
        offset=inputs["nested_offset"],
        state2=inner,
    )


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

    def bitsandbytes() -> Callable[..., Any]:
        from bitsandbytes.functional import dequantize_4bit

        return lambda **t: dequantize_4bit(t["packed"], _bitsandbytes_state(t, out, width))

    count = out * width
    return Workload(
        "nf4_dequantize",
        f"{out}x{width}",
        tokens,
        lambda device: _nf4_inputs(out, width, device),
        (),
        {
            "ours": lambda: lambda **t: ours(_quantized(t, out, width)),
            "eager": lambda: lambda **t: reference(_quantized(t, out, width), DTYPE),
            "bitsandbytes": bitsandbytes,
        },
        count // 2 + count // 64 + count * DTYPE.itemsize,
    )


def nf4_matvec(model: Model, tokens: int) -> Workload:
    """One vector through the gate's 4-bit weight."""
    from pantheraml.kernels.nf4 import nf4_matvec as ours
    from pantheraml.kernels.reference.nf4 import nf4_dequantize as reference

    out, width = model.intermediate, model.hidden

    def bitsandbytes() -> Callable[..., Any]:
        from bitsandbytes.functional import gemv_4bit

        return lambda x, **t: gemv_4bit(x[None], t["packed"].t(), state=_bitsandbytes_state(t, out, width))

    return Workload(
        "nf4_matvec",
        f"{out}x{width}",
        1,
        lambda device: {"x": randn(1, width, device=device)} | _nf4_inputs(out, width, device),
        (),
        {
            "ours": lambda: lambda x, **t: ours(x, _quantized(t, out, width)),
            "eager": lambda: lambda x, **t: x @ reference(_quantized(t, out, width), DTYPE).t(),
            "bitsandbytes": bitsandbytes,
        },
        out * width // 2 + out * width // 64,
    )


def fp8_transpose(model: Model, tokens: int) -> Workload:
    """The gate's weight in fp8."""
    from pantheraml.kernels.fp8 import fp8_transpose as ours

    out, width = model.intermediate, model.hidden
    return Workload(
        "fp8_transpose",
        f"{out}x{width}",
        tokens,
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
        "fp8_quantize_rows",
        f"D={width}",
        tokens,
        lambda device: {"x": randn(tokens, width, device=device)},
        (),
        {"ours": lambda: ours, "eager": lambda: lambda x: quantize_rows(x.float())},
        3 * tokens * width,
        # One step of three mantissa bits: torch multiplies with the rounded inverse where the kernel divides.
        tolerance=0.08,
    )


def grouped_gemm(model: Model, tokens: int) -> Workload:
    """32 experts of uneven size with adapters."""
    from pantheraml.kernels import grouped_gemm as ours
    from pantheraml.kernels.reference.grouped_gemm import lora_grouped_gemm as reference

    width, out = 2048, 1024

    def make(device: torch.device) -> Inputs:
        counts = torch.multinomial(torch.rand(EXPERTS) + 0.2, tokens, replacement=True).bincount(minlength=EXPERTS)
        return {
            "x": randn(tokens, width, device=device),
            "weight": randn(EXPERTS, out, width, device=device) * 0.02,
            "ends": counts.cumsum(0).to(device=device, dtype=torch.int32),
            "A": randn(EXPERTS, RANK, width, device=device) * 0.02,
            "B": randn(EXPERTS, out, RANK, device=device) * 0.02,
        }

    flops = 2.0 * tokens * width * out
    return Workload(
        "grouped_gemm",
        f"G={EXPERTS} {width}→{out} r={RANK}",
        tokens,
        make,
        ("x", "A", "B"),
        {
            "ours": lambda: lambda x, weight, ends, A, B: ours(x, weight, ends, A, B, SCALING),
            "eager": lambda: lambda x, weight, ends, A, B: reference(x, weight, ends, A, B, SCALING),
        },
        forward_flops=flops,
        backward_flops=flops,
        tolerance=4e-2,
    )


def lora_linear(model: Model, tokens: int) -> Iterator[Workload]:
    """Every shape of a layer's projections."""
    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes = {
        "q": (heads, model.hidden),
        "k": (kv_heads, model.hidden),
        "gate": (model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }
    for name, (out, width) in shapes.items():
        yield _lora_linear(name, out, width, tokens)


def _all_shapes(make: Callable[[Model, int], Workload], quick: bool) -> Iterator[tuple[str, Workload]]:
    for model in QUICK_MODELS if quick else MODELS:
        for tokens in QUICK_TOKENS if quick else TOKENS:
            if tokens * VOCABULARY[model.name] <= MAX_LOGITS:
                yield model.name, make(model, tokens)


def _llama(make: Callable[[Model, int], Any], quick: bool) -> Iterator[tuple[str, Workload]]:
    for tokens in QUICK_TOKENS if quick else TOKENS:
        made = make(LLAMA, tokens)
        for workload in (made,) if isinstance(made, Workload) else made:
            yield LLAMA.name, workload


def _weights(make: Callable[[Model, int], Workload], quick: bool) -> Iterator[tuple[str, Workload]]:
    """Ops on weights do not depend on the number of tokens."""
    for model in QUICK_MODELS if quick else MODELS:
        yield model.name, make(model, 0)


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Iterator[tuple[str, Workload]]]]] = {
    "cross_entropy": (cross_entropy, _all_shapes),
    "linear_cross_entropy": (linear_cross_entropy, _all_shapes),
    "linear_cross_entropy_trained": (linear_cross_entropy_trained, _all_shapes),
    "lora_linear": (lora_linear, _llama),
    "lora_mlp": (lora_mlp, _llama),
    "nf4_dequantize": (nf4_dequantize, _weights),
    "nf4_matvec": (nf4_matvec, _weights),
    "fp8_transpose": (fp8_transpose, _weights),
    "fp8_quantize_rows": (fp8_quantize_rows, _llama),
    "grouped_gemm": (grouped_gemm, _llama),
}


def workloads(op: str, *, quick: bool) -> Iterator[tuple[str, Workload]]:
    """Model name and workload of ``op`` for every shape it is timed at."""
    make, shapes = OPS[op]
    return shapes(make, quick)

"""Experts as one node against float64 truth of the plain formula: outputs, every gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import four_bit_stack
from pantheraml.kernels.experts import experts_mlp
from pantheraml.kernels.four_bit_stack import FourBitStack
from pantheraml.kernels.grouped_gemm import Stack
from pantheraml.kernels.reference.grouped_gemm import experts_mlp as reference
from pantheraml.kernels.reference.nf4 import Quantized4Bit

from .support import DTYPES, assert_matches, random

EXPERTS = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 5], [0, 3], [3, 5], [2, 0]])
HIDDEN, INNER, RANK, GROUPS = 12, 20, 4, 6
WAYS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float16), ("triton", torch.bfloat16), *(("auto", dtype) for dtype in DTYPES.values())],
    ids=["triton-fp16", "triton-bf16", *(f"auto-{name}" for name in DTYPES)],
)
ADAPTERS = ("A1", "B1", "A2", "B2")
WEIGHTS, BIASES = ("W1", "W2"), ("b1", "b2")
GPT_OSS = {"interleaved": True, "limit": 1.5, "alpha": 1.702, "up_offset": 1.0}


def tensors():
    return {
        "x": random(len(EXPERTS), HIDDEN),
        "weights": random(len(EXPERTS), 2, seed=1).sigmoid(),
        "W1": random(GROUPS, 2 * INNER, HIDDEN, seed=2, scale=0.3),
        "W2": random(GROUPS, HIDDEN, INNER, seed=3, scale=0.3),
        "b1": random(GROUPS, 2 * INNER, seed=4),
        "b2": random(GROUPS, HIDDEN, seed=5),
        "A1": random(GROUPS, RANK, HIDDEN, seed=6, scale=0.3),
        "B1": random(GROUPS, 2 * INNER, RANK, seed=7, scale=0.3),
        "A2": random(GROUPS, RANK, INNER, seed=8, scale=0.3),
        "B2": random(GROUPS, HIDDEN, RANK, seed=9, scale=0.3),
        "experts": EXPERTS,
    }


def call(op, options):
    def run(x, weights, experts, W1, W2, b1=None, b2=None, A1=None, B1=None, A2=None, B2=None):
        up, down = Stack(W1, b1, A1, B1, 1.7), Stack(W2, b2, A2, B2, 0.6)
        return op(x, experts, weights, up, down, **options)

    return run


def compare(names, grad, backend, dtype, device, options, keep=None):
    inputs = {name: t for name, t in tensors().items() if name in (*names, *WEIGHTS, "x", "weights", "experts")}
    kernel, eager = call(experts_mlp, {**options, "backend": backend}), call(reference, options)
    assert_matches(kernel, eager, inputs, dtype=dtype, device=device, grad=grad, keep=keep)


@WAYS
@pytest.mark.parametrize(
    ("names", "grad"),
    [
        (ADAPTERS, ("x", "weights", *ADAPTERS)),
        ((), ("x", "weights")),
        ((), ("x", "weights", *WEIGHTS)),
        ((*BIASES, *ADAPTERS), ("x", "weights", *ADAPTERS)),
        ((*BIASES, *ADAPTERS), ("x", "weights", *WEIGHTS, *BIASES, *ADAPTERS)),
    ],
    ids=["adapters", "frozen", "trained experts", "adapters beside biases", "everything"],
)
@pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["silu", "gpt-oss"])
def test_outputs_and_gradients(options, names, grad, backend, dtype, device):
    compare(names, grad, backend, dtype, device, options)


def test_weights_of_zero_and_float32_weights(device):
    """The gradient of a weight does not divide by it."""
    inputs = tensors()
    inputs["weights"][1:4, 0] = 0.0
    kernel, eager = call(experts_mlp, {"backend": "triton"}), call(reference, {})
    keep = dict.fromkeys(("weights", *ADAPTERS), torch.float32)
    grad = ("x", "weights", *ADAPTERS)
    assert_matches(kernel, eager, inputs, dtype=torch.bfloat16, device=device, grad=grad, keep=keep)


@pytest.mark.parametrize("grad", [("x",), ("weights",), ("A2",), ("B1",), ("b1",), ("W2",)], ids="+".join)
def test_one_gradient_alone(grad, device):
    compare((*ADAPTERS, *BIASES), grad, "auto", torch.float32, device, {})


def test_gradcheck():
    inputs = tensors()
    experts = inputs.pop("experts")
    names = list(inputs)
    leaves = tuple(inputs[name].requires_grad_() for name in names)
    op = call(experts_mlp, GPT_OSS)
    assert torch.autograd.gradcheck(lambda *values: op(experts=experts, **dict(zip(names, values))), leaves)


def test_kept_for_the_backward():
    """Of the rows of all choices only the outputs of the first product stay, and thin ones."""
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in tensors().items()}
    for name in ("x", "weights", *ADAPTERS):
        inputs[name] = inputs[name].requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        call(experts_mlp, {})(**inputs)
    known = {t.data_ptr() for t in inputs.values()}
    rows = [t for t in kept if t.is_floating_point() and t.data_ptr() not in known]
    assert sorted(t.shape[1] for t in rows) == [RANK, RANK, 2 * INNER]


def wrong(**changed):
    inputs = {**tensors(), **changed}
    return lambda: call(experts_mlp, changed.pop("options", {}))(**inputs)


WRONG = {
    "experts of other tokens": (ConfigError, wrong(experts=EXPERTS[:3])),
    "float experts": (ArgumentError, wrong(experts=EXPERTS.double())),
    "weights": (ConfigError, wrong(weights=torch.ones(7, 3))),
    "no way back": (ConfigError, wrong(W2=torch.zeros(GROUPS, HIDDEN + 1, INNER), A2=None, B2=None, b2=None)),
    "inner width": (ConfigError, wrong(W2=torch.zeros(GROUPS, HIDDEN, INNER + 1))),
    "A alone": (ConfigError, wrong(B1=None)),
}


@pytest.mark.parametrize(("error", "run"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, run):
    with pytest.raises(error):
        run()


def test_the_kernels_refuse_float64(device):
    with pytest.raises(UnsupportedError):
        call(experts_mlp, {"backend": "triton"})(**{n: t.to(device) for n, t in tensors().items()})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_shapes(dtype, backend, gpu):
    tokens, hidden, inner, rank, groups = 1000, 512, 384, 16, 32
    inputs = {
        "x": random(tokens, hidden),
        "weights": random(tokens, 4, seed=1).softmax(1),
        "W1": random(groups, 2 * inner, hidden, seed=2, scale=hidden**-0.5),
        "W2": random(groups, hidden, inner, seed=3, scale=inner**-0.5),
        "A1": random(groups, rank, hidden, seed=6, scale=hidden**-0.5),
        "B1": random(groups, 2 * inner, rank, seed=7, scale=rank**-0.5),
        "A2": random(groups, rank, inner, seed=8, scale=inner**-0.5),
        "B2": random(groups, hidden, rank, seed=9, scale=rank**-0.5),
        "experts": random(tokens, groups, seed=11).topk(4, 1).indices,
    }
    kernel, eager = call(experts_mlp, {"backend": backend}), call(reference, {})
    assert_matches(kernel, eager, inputs, dtype=dtype, device=gpu, grad=("x", "weights", *ADAPTERS))


def quantize(weight, *, nested):
    """``weight`` in 4 bits, with codes and scales at random: what they stand for is what is compared."""
    generator = torch.Generator().manual_seed(11)
    blocks = -(-weight.numel() // BLOCK)
    common = {
        "packed": torch.randint(256, (weight.numel() // 2,), dtype=torch.uint8, generator=generator),
        "code": torch.linspace(-1, 1, 16),
        "blocksize": BLOCK,
        "shape": weight.shape,
        "dtype": torch.float32,
    }
    if not nested:
        return Quantized4Bit(absmax=torch.rand(blocks, generator=generator), **common)
    return Quantized4Bit(
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
        nested_absmax=torch.rand(-(-blocks // NESTED), generator=generator),
        nested_code=torch.linspace(-0.5, 0.5, 256),
        nested_offset=torch.tensor(0.6),
        nested_blocksize=NESTED,
        **common,
    )


# Blocks of one matrix lie in several blocks of scales, and matrices of I x O = 480 and 240 are whole blocks of 16.
BLOCK, NESTED = 16, 8


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_stacks_in_4_bits_are_those_that_they_stand_for(nested, transposed):
    given = {name: t.float() if t.is_floating_point() else t for name, t in tensors().items()}
    packed = {}
    for name in WEIGHTS:
        shape = given[name].mT.contiguous() if transposed else given[name]
        packed[name] = FourBitStack(quantize(shape, nested=nested), transposed)
        assert packed[name].shape == given[name].shape
        given[name] = packed[name].dense(torch.float32)
    leaves = ("x", "weights", *BIASES, *ADAPTERS)

    def run(weights):
        own = {name: given[name].clone().requires_grad_() for name in leaves}
        y = call(experts_mlp, GPT_OSS)(**{**given, **own, **weights})
        y.backward(torch.ones_like(y))
        return y, [own[name].grad for name in leaves]

    (y, grads), (due, due_grads) = run(packed), run({})
    assert torch.equal(y, due)
    for name, grad, other in zip(leaves, grads, due_grads, strict=True):
        assert torch.equal(grad, other), name
    # Fewer rows than experts, as in a step of generation: only the chosen ones are made dense.
    with torch.no_grad():
        for rows in (1, 2):
            few = {**given, **packed} | {name: given[name][:rows] for name in ("x", "weights", "experts")}
            torch.testing.assert_close(call(experts_mlp, GPT_OSS)(**few), due[:rows], rtol=1e-5, atol=1e-6)


def test_only_chosen_experts_are_made_dense(monkeypatch):
    made = []
    original = four_bit_stack.nf4_dequantize
    monkeypatch.setattr(four_bit_stack, "nf4_dequantize", lambda q, **k: made.append(q.shape[0]) or original(q, **k))
    given = {name: t.float() if t.is_floating_point() else t for name, t in tensors().items()}
    packed = {name: FourBitStack(quantize(given[name], nested=True)) for name in WEIGHTS}
    few = {**given, **packed} | {name: given[name][:2] for name in ("x", "weights", "experts")}
    with torch.no_grad():
        call(experts_mlp, {})(**few)
        assert made == [4, 4]
        call(experts_mlp, {})(**{**few, **{name: given[name][:3] for name in ("x", "weights", "experts")}})
        assert made == [4, 4, GROUPS, GROUPS]
    few["x"].requires_grad_()
    call(experts_mlp, {})(**few).sum().backward()
    # Forward and backward of both.
    assert made[4:] == [GROUPS] * 4

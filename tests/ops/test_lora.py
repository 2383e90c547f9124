"""LoRA layers against float64 truth of the plain formula."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ConfigError, UnsupportedError
from pantheraml.kernels import low_rank
from pantheraml.kernels import projections as projections_module
from pantheraml.kernels.lora import Adapter, Projection, lora_linear, lora_mlp, lora_qkv
from pantheraml.kernels.nf4 import Quantized4Bit
from pantheraml.kernels.nf4_product import MAX_VECTORS
from pantheraml.kernels.reference.lora import lora_linear as reference
from pantheraml.kernels.reference.nf4 import nf4_dequantize

from .support import DTYPES, FACTOR, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
WIDTH, WIDE, RANK, SCALING = 24, 37, 4, 1.7
TRAINED = ("x", "A", "B", "bias")
# Four products in a row, added in another order than eager's: one unlucky maximum can exceed twice eager's.
CHAIN = 4.0


def leaves(out=WIDE, width=WIDTH, rank=RANK, rows=11):
    return {
        "x": random(rows, width),
        "weight": random(out, width, seed=1, scale=0.3),
        "A": random(rank, width, seed=2, scale=0.3),
        "B": random(out, rank, seed=3),
        "bias": random(out, seed=4),
    }


def eager(x, weight, A, B, bias, **options):
    return reference(x, weight, [(A, B, SCALING)], bias=bias, **options)


def ours(x, weight, A, B, bias, **options):
    return lora_linear(x, weight, A, B, SCALING, bias=bias, **options)


@DTYPE
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 24, 4, 11), (16, 97, 1, 3)], ids=str)
def test_linear(shape, dtype, device):
    assert_matches(ours, eager, leaves(*shape), dtype=dtype, device=device, grad=TRAINED)


@pytest.mark.parametrize("grad", [("x",), ("A",), ("B",), ("A", "B"), ("bias",)], ids="+".join)
def test_only_what_is_trained_gets_a_gradient(grad, device):
    assert_matches(ours, eager, leaves(), dtype=torch.float32, device=device, grad=grad)


def test_float32_masters_under_bfloat16(device):
    keep = dict.fromkeys(("A", "B", "bias"), torch.float32)
    assert_matches(ours, eager, leaves(), dtype=torch.bfloat16, device=device, grad=TRAINED, keep=keep)


def test_computes_in_the_dtype_of_x_under_autocast():
    tensors = {name: value.float() for name, value in leaves().items()}
    plain = ours(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(**tensors), plain)


def test_several_adapters(device):
    inputs = leaves() | {"A2": random(2, WIDTH, seed=5), "B2": random(WIDE, 2, seed=6)}

    def kernel(x, weight, A, B, bias, A2, B2):
        return lora_linear(x, weight, A, B, SCALING, bias=bias, adapters=[Adapter(A2, B2, 0.3)])

    def expected(x, weight, A, B, bias, A2, B2):
        return reference(x, weight, [(A, B, SCALING), (A2, B2, 0.3)], bias=bias)

    assert_matches(kernel, expected, inputs, dtype=torch.float32, device=device, grad=(*TRAINED, "A2", "B2"))


def test_frozen_layer_without_adapter(device):
    kernel = lambda x, weight: lora_linear(x, weight)  # noqa: E731
    expected = lambda x, weight: torch.nn.functional.linear(x, weight)  # noqa: E731
    inputs = {name: leaves()[name] for name in ("x", "weight")}
    assert_matches(kernel, expected, inputs, dtype=torch.bfloat16, device=device, grad=("x",))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_and_dora(dora, dropout, device):
    inputs = leaves() | ({"magnitude": random(WIDE, seed=7).abs()} if dora else {})

    def seeded(op):
        def call(**tensors):
            torch.manual_seed(11)
            return op(**tensors, dropout=dropout)

        return call

    grad = (*TRAINED, "magnitude") if dora else TRAINED
    # A mask depends on how many random bits an element takes, so all three runs are at one dtype.
    truth_like = {name: value.float() for name, value in inputs.items()}
    results = []
    for op in (ours, eager):
        tensors = {name: value.to(device).requires_grad_(name in grad) for name, value in truth_like.items()}
        y = seeded(op)(**tensors)
        results.append((y, *torch.autograd.grad(y.square().sum(), [tensors[name] for name in grad])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_dropout_of_several_adapters_draws_for_each():
    tensors = {name: value.double() for name, value in leaves().items()}
    more = (random(2, WIDTH, seed=5), random(WIDE, 2, seed=6), 0.3)
    torch.manual_seed(1)
    first = ours(**tensors, dropout=0.5, adapters=[Adapter(*more)])
    torch.manual_seed(1)
    pairs = [(tensors["A"], tensors["B"], SCALING), more]
    second = reference(tensors["x"], tensors["weight"], pairs, bias=tensors["bias"], dropout=0.5)
    torch.testing.assert_close(first, second)


def quantized_weight(device):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(random(40, 64).bfloat16(), quant_type="nf4", compress_statistics=True)
    state.to(device)
    return Quantized4Bit.from_quant_state(packed.to(device), state)


@pytest.mark.parametrize("kind", ["nf4", "function"])
def test_bases_that_are_not_dense(kind, device):
    record = quantized_weight(device)
    dense = nf4_dequantize(record, torch.bfloat16)
    calls = []

    def gather():
        calls.append(1)
        return dense

    base = record if kind == "nf4" else gather
    inputs = leaves(40, 64)
    del inputs["weight"]
    assert_matches(
        lambda **t: lora_linear(t["x"], base, t["A"], t["B"], SCALING, bias=t["bias"], backend="triton"),
        lambda **t: eager(weight=dense.to(t["x"]), **t),
        inputs,
        dtype=torch.bfloat16,
        device=device,
        grad=TRAINED,
    )
    assert len(calls) == (0 if kind == "nf4" else 2)


@pytest.mark.parametrize("adapters", [True, False], ids=["adapter", "frozen"])
@pytest.mark.parametrize(("rows", "fused"), [(1, True), (2, True), (MAX_VECTORS, True), (MAX_VECTORS + 1, False)])
def test_few_rows_read_a_4_bit_weight_as_it_is(rows, fused, adapters, device, monkeypatch):
    """As generation does: the weight is written out for more rows only, and for the backward."""
    record = quantized_weight(device)
    dense = nf4_dequantize(record, torch.bfloat16)
    calls = []
    for name in ("nf4_matvec", "nf4_dequantize"):
        original = getattr(projections_module, name)
        monkeypatch.setattr(
            projections_module, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1]
        )
    inputs = leaves(40, 64, rows=rows)
    del inputs["weight"]
    names = ("A", "B") if adapters else ()
    inputs = {name: inputs[name] for name in ("x", "bias", *names)}

    def kernel(x, bias, A=None, B=None):
        return lora_linear(x, record, A, B, SCALING, bias=bias, backend="triton")

    def expected(x, bias, A=None, B=None):
        y = x @ dense.to(x).t() + bias
        return y if A is None else y + SCALING * (x @ A.t()) @ B.t()

    assert_matches(
        kernel, expected, inputs, dtype=torch.bfloat16, device=device, grad=("x", "bias", *names), factor=CHAIN
    )
    assert calls == ["nf4_matvec" if fused else "nf4_dequantize", "nf4_dequantize"]


def test_saves_only_what_the_backward_needs():
    tensors = {name: value.float() for name, value in leaves(64, 32, 2, 128).items()}
    for name in ("x", "A", "B"):
        tensors[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(tensors["x"], lambda: tensors["weight"], tensors["A"], tensors["B"], SCALING)
    sizes = sorted(tuple(t.shape) for t in kept)
    assert sizes == sorted([(128, 32), (128, 2), (2, 32), (64, 2)])


def projections(t, names, *, adapters=True, magnitude=False):
    return [
        Projection(
            t[f"{n}W"],
            [Adapter(t[f"{n}A"], t[f"{n}B"], SCALING)] if adapters else [],
            t.get(f"{n}b"),
        )
        for n in names
    ]


def several(outs, widths, *, bias=True):
    inputs = {"x": random(2, 5, widths[0])}
    for i, (out, width) in enumerate(zip(outs, widths)):
        own = leaves(out, width)
        names = {"W": "weight", "A": "A", "B": "B"} | ({"b": "bias"} if bias else {})
        inputs |= {f"{i}{short}": own[name].roll(i, 0) for short, name in names.items()}
    return inputs, tuple(name for name in inputs if not name.endswith("W"))


@DTYPE
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_qkv(bias, dtype, device):
    inputs, grad = several((16, 8, 8), (WIDTH,) * 3, bias=bias)

    def call(backend):
        return lambda **t: lora_qkv(t["x"], *projections(t, "012"), backend=backend)

    assert_matches(call("auto"), call("reference"), inputs, dtype=dtype, device=device, grad=grad)


@pytest.mark.parametrize("used", [0, 2])
def test_qkv_with_unused_outputs(used):
    inputs, grad = several((16, 8, 8), (WIDTH,) * 3)
    results = []
    for backend in ("auto", "reference"):
        tensors = {name: value.clone().requires_grad_(name in grad) for name, value in inputs.items()}
        y = lora_qkv(tensors["x"], *projections(tensors, "012"), backend=backend)[used]
        wanted = [tensors[name] for name in grad if name == "x" or name.startswith(str(used))]
        results.append(torch.autograd.grad(y.square().sum(), wanted))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "kind", ["alike", "biases", "other rank", "other scaling", "frozen B", "other strides", "unused output"]
)
def test_projections_of_one_input_by_kernels(kind, device, monkeypatch):
    """Projections that are alike share launches; what sets one apart shows in its results."""
    inputs, grad = several((16, 8, 8), (WIDTH,) * 3, bias=kind == "biases")
    if kind == "other rank":
        inputs |= {"1A": random(2, WIDTH, seed=8), "1B": random(8, 2, seed=9)}
    scalings = (SCALING, 0.3 if kind == "other scaling" else SCALING, SCALING)
    frozen = {"frozen B": ("1B",), "unused output": ("1A", "1B")}.get(kind, ())

    def call(backend):
        def run(x, **t):
            if kind == "other strides":
                t["1B"] = t["1B"].t().contiguous().t()
            q, k, v = (
                Projection(t[f"{i}W"], [Adapter(t[f"{i}A"], t[f"{i}B"], scaling)], t.get(f"{i}b"))
                for i, scaling in enumerate(scalings)
            )
            outputs = lora_qkv(x, q, k, v, backend=backend)
            return outputs[::2] if kind == "unused output" else outputs

        return run

    shared = []
    gradients = low_rank.gradients
    monkeypatch.setattr(low_rank, "gradients", lambda dys, *a, **o: shared.append(len(dys)) or gradients(dys, *a, **o))
    grad = tuple(name for name in grad if name not in frozen)
    assert_matches(call("triton"), call("reference"), inputs, dtype=torch.float16, device=device, grad=grad)
    assert (3 in shared) == (kind in ("alike", "biases"))


@DTYPE
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp(activation, dtype, device):
    inputs, grad = several((WIDE, WIDE, WIDTH), (WIDTH, WIDTH, WIDE), bias=False)

    def call(backend):
        return lambda **t: lora_mlp(t["x"], *projections(t, "012"), activation, backend=backend)

    assert_matches(call("triton"), call("reference"), inputs, dtype=dtype, device=device, grad=grad, factor=CHAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "trained", ["x", "0A", "2A", "2B", "1b"], ids=["input", "gate A", "down A", "down B", "up bias"]
)
def test_mlp_with_one_trained_tensor(trained, dtype, device):
    """In half precision, and without biases, the activation adds what the adapters give."""
    inputs, _ = several((WIDE, WIDE, WIDTH), (WIDTH, WIDTH, WIDE), bias=trained == "1b" or dtype == torch.float32)
    factor = FACTOR if dtype == torch.float32 else CHAIN

    def call(backend):
        return lambda **t: lora_mlp(t["x"], *projections(t, "012"), backend=backend)

    assert_matches(
        call("triton"), call("reference"), inputs, dtype=dtype, device=device, grad=(trained,), factor=factor
    )


def test_mlp_goes_backward_twice(device):
    """Gate and up become their gradients in the last backward alone."""
    inputs, _ = several((WIDE, WIDE, WIDTH), (WIDTH, WIDTH, WIDE), bias=False)
    tensors = {name: value.half().to(device) for name, value in inputs.items()}
    x = tensors["x"].requires_grad_()
    y = lora_mlp(x, *projections(tensors, "012"), backend="triton")
    (first,) = torch.autograd.grad(y.float().sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{"activation": "swish"}, {"alpha": 2.0, "activation": "gelu"}, {"limit": -1.0}])
def test_mlp_refuses_options_that_mean_nothing(options):
    inputs, _ = several((WIDE, WIDE, WIDTH), (WIDTH, WIDTH, WIDE), bias=False)
    tensors = {name: value.half() for name, value in inputs.items()}
    for backend in ("auto", "reference"):
        with pytest.raises(ConfigError, match="lora_mlp"):
            lora_mlp(tensors["x"], *projections(tensors, "012"), backend=backend, **options)


def test_mlp_with_dropout_keeps_the_formula():
    inputs, _ = several((WIDE, WIDE, WIDTH), (WIDTH, WIDTH, WIDE))
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(5)
        results.append(lora_mlp(inputs["x"], *projections(inputs, "012"), dropout=0.3, backend=backend))
    torch.testing.assert_close(*results)


def test_no_rows():
    tensors = {name: value.float() for name, value in leaves(rows=0).items()}
    for name in TRAINED:
        tensors[name].requires_grad_()
    y = ours(**tensors)
    assert y.shape == (0, WIDE)
    y.sum().backward()
    assert not tensors["A"].grad.any()


def test_strided_input(device):
    inputs = leaves(rows=WIDTH)
    kernel, expected = (lambda x, op=op, **t: op(x.t(), **t) for op in (ours, eager))
    assert_matches(kernel, expected, inputs, dtype=torch.bfloat16, device=device, grad=TRAINED)


def test_gradcheck():
    tensors = {name: value.requires_grad_(name != "weight") for name, value in leaves(3, 4, 2, 3).items()}
    assert torch.autograd.gradcheck(lambda *values: ours(**dict(zip(tensors, values))), tuple(tensors.values()))


X, W = torch.zeros(2, 8), torch.zeros(5, 8)
A, B = torch.zeros(2, 8), torch.zeros(5, 2)
WRONG = {
    "width": (ConfigError, {"weight": torch.zeros(5, 7)}),
    "A": (ConfigError, {"A": torch.zeros(2, 7)}),
    "B": (ConfigError, {"B": torch.zeros(4, 2)}),
    "A alone": (ConfigError, {"B": None}),
    "dropout": (ConfigError, {"dropout": 1.0}),
    "trained base": (UnsupportedError, {"weight": W.clone().requires_grad_()}),
    "packed base": (UnsupportedError, {"weight": W.to(torch.uint8)}),
    "two with DoRA": (ConfigError, {"adapters": [Adapter(A, B, 1.0)], "magnitude": torch.ones(5)}),
}


@pytest.mark.parametrize(("error", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, change):
    with pytest.raises(error):
        lora_linear(**({"x": X, "weight": W, "A": A, "B": B} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_shape(dtype, gpu):
    inputs = leaves(4096, 2048, 16, 512)
    keep = dict.fromkeys(("A", "B"), torch.float32)
    assert_matches(ours, eager, inputs, dtype=dtype, device=gpu, grad=TRAINED, keep=keep)

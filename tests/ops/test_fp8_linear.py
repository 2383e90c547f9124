"""Products with frozen fp8 weights.

Kernels that quantise must agree with the reference on a CPU bit for bit (but for nested 4-bit scales, where a GPU may
fuse a multiplication with an addition). Products are compared with float64: each of the numbers that e4m3 rounds is off
by at most 2**-4 of itself, or by half the smallest step under its scale.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import fp8_linear, fp8_operands
from pantheraml.kernels.fp8 import fp8_quantize_rows, fp8_transpose
from pantheraml.kernels.fp8_linear import Fp8Input, Fp8Weight, Nf4Fp8Weight, fp8_input_gradient, fp8_product
from pantheraml.kernels.lora import Adapter, Projection, lora_linear, lora_mlp, lora_qkv
from pantheraml.kernels.nf4 import Quantized4Bit, nf4_dequantize
from pantheraml.kernels.projections import Group, Term, project
from pantheraml.kernels.reference import fp8_linear as reference

from .support import DTYPES, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
E4M3 = torch.float8_e4m3fn
HALF_ULP, SMALLEST, LARGEST = 2.0**-4, 2.0**-9, 448.0
KINDS = ("rows", "tiles", "nf4")
KIND = pytest.mark.parametrize("kind", KINDS)
WIDTH, OUT, TOKENS = 192, 144, 11


def bits(x):
    return x.contiguous().view(torch.uint8).cpu()


def four_bit(out=OUT, width=WIDTH, *, seed=1, nested=True, blocksize=64, device="cpu"):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(out, width, seed=seed, scale=0.3).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)
    state.to(device)
    return Quantized4Bit.from_quant_state(packed.to(device), state)


def weight_of(kind, out=OUT, width=WIDTH, *, seed=1, device="cpu", **options):
    """A weight of each kind, and what its fp8 values stand for in float64."""
    if kind == "nf4":
        weight = Nf4Fp8Weight.of(four_bit(out, width, seed=seed, device=device))
        truth = weight.forward_values().double() * weight.scales
    else:
        dense = random(out, width, seed=seed, scale=0.3).to(device, torch.bfloat16)
        weight = Fp8Weight.quantize(dense, block=kind == "tiles", **options)
        truth = weight.dense(torch.float64)
    return weight, truth.double()


def bound(x, w, row_scales, dtype):
    """Largest error of ``x @ w.T`` when x is rounded to e4m3 under ``row_scales`` and the result to ``dtype``."""
    sizes = x.abs() @ w.abs().t()
    absolute = SMALLEST / 2 * row_scales * w.abs().sum(1)
    return HALF_ULP * sizes + absolute + (torch.finfo(dtype).eps + 1e-5) * sizes


@DTYPE
@pytest.mark.parametrize("widths", [(16,), (96, 33), (200, 48, 5)], ids=str)
def test_joined_rows(widths, dtype, device):
    parts = [random(7, width, seed=i, scale=3.0**i).to(device, dtype) for i, width in enumerate(widths)]
    parts[0] = random(7, 2 * widths[0]).to(device, dtype)[:, : widths[0]]
    parts[0][2] = 0
    factors = [random(width, seed=9 + i).abs().float().to(device) for i, width in enumerate(widths)]
    values, scales = fp8_operands.quantize_joined_rows(parts, factors, backend="triton")
    expected = reference.joined_rows([p.cpu() for p in parts], [f.cpu() for f in factors], E4M3)
    assert torch.equal(scales.cpu(), expected[1])
    assert torch.equal(bits(values), bits(expected[0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad, device):
    part = torch.ones(2, 32, device=device)
    part[0, 3] = bad
    values, scales = fp8_operands.quantize_joined_rows([part], [torch.ones(32, device=device)], backend="triton")
    back = values.float() * scales
    assert not torch.isfinite(back[0]).all()
    assert torch.equal(back[1], part[1])


def test_rows_of_tiny_numbers_do_not_overflow(device):
    part = torch.full((2, 32), 1e-38, device=device)
    part[1] = 0
    values, scales = fp8_operands.quantize_joined_rows([part], [torch.ones(32, device=device)], backend="triton")
    assert torch.isfinite(values.float() * scales).all()


@DTYPE
@pytest.mark.parametrize("shape", [(1, 16), (37, 128), (5, 300)], ids=str)
def test_groups(shape, dtype, device):
    x = random(*shape, scale=3.0).to(device, dtype)
    x[0, :16] = 0
    values, scales = fp8_operands.quantize_groups([x], rows=shape[0] + 3, backend="triton")
    padded = torch.nn.functional.pad(x.cpu(), (0, 0, 0, 3))
    expected = reference.groups(padded, E4M3, 128)
    assert torch.equal(bits(values), bits(expected[0]))
    assert torch.equal(scales[:, : shape[0]].cpu(), expected[1][:, : shape[0]])
    assert torch.isfinite(scales).all()


def test_groups_of_several_matrices(device):
    parts = [random(6, width, seed=i).to(device, torch.bfloat16) for i, width in enumerate((128, 256, 40))]
    joined = fp8_operands.quantize_groups(parts, backend="triton")
    expected = reference.groups(torch.cat(parts, 1).cpu(), E4M3, 128)
    assert torch.equal(bits(joined[0]), bits(expected[0]))
    assert torch.equal(joined[1].cpu(), expected[1])


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("shape", [(16, 64), (37, 192), (144, 640)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_four_bits_to_fp8(shape, nested, transposed, device):
    quantized = four_bit(*shape, nested=nested, device=device)
    largest = nf4_dequantize(four_bit(*shape, nested=nested), dtype=torch.float32).abs().amax(1, keepdim=True)
    scales = (largest / torch.finfo(E4M3).max * (1 + random(shape[0], 1, seed=4).abs())).float()
    buffer = torch.zeros(
        (shape[1], shape[0] + 7) if transposed else (shape[0], shape[1] + 7), dtype=E4M3, device=device
    )
    out = buffer[:, : shape[0] if transposed else shape[1]]
    result = fp8_operands.nf4_to_fp8(quantized, scales.to(device), transposed=transposed, out=out, backend="triton")
    assert result is out
    expected = reference.nf4_to_fp8(four_bit(*shape, nested=nested), scales, E4M3)
    expected = expected.t() if transposed else expected
    if device.type == "cpu" or not nested:
        assert torch.equal(bits(out), bits(expected))
    else:
        torch.testing.assert_close(out.cpu().float(), expected.float(), rtol=2 * HALF_ULP, atol=SMALLEST)
        assert (bits(out) != bits(expected)).float().mean() < 1e-3
    assert not bits(buffer)[:, out.shape[1] :].any()


@pytest.mark.parametrize("blocksize", [32, 64, 128, 512])
def test_four_bit_row_scales_fill_the_range(blocksize):
    weight = Nf4Fp8Weight.of(four_bit(32, 1024, blocksize=blocksize))
    values = weight.forward_values().float()
    assert torch.equal(values.abs().amax(1), torch.full((32,), LARGEST))
    stored = weight.dense(torch.float32)
    error = (values * weight.scales - stored).abs()
    assert (error <= HALF_ULP * stored.abs() + weight.scales * SMALLEST).all()


@DTYPE
@pytest.mark.parametrize("tiles", [False, True], ids=["rows", "tiles"])
def test_dequantize(tiles, dtype, device):
    weight = Fp8Weight.quantize(random(144, 208).bfloat16().to(device), block=tiles)
    ours = fp8_operands.dequantize(weight.values, weight.scales, dtype, backend="triton")
    expected = fp8_operands.dequantize(weight.values.cpu(), weight.scales.cpu(), dtype, backend="reference")
    assert torch.equal(ours.cpu(), expected)


def test_transpose_into_part_of_a_buffer(device):
    x = torch.randint(0, 100, (37, 48), dtype=torch.uint8, device=device)
    buffer = torch.zeros(48, 60, dtype=torch.uint8, device=device)
    fp8_transpose(x, out=buffer[:, 7:44], backend="triton")
    assert torch.equal(buffer[:, 7:44], x.t())
    assert not buffer[:, :7].any()
    assert not buffer[:, 44:].any()


@KIND
@DTYPE
def test_product_is_within_the_rounding_of_its_input(kind, dtype):
    weight, w = weight_of(kind)
    x, bias = random(TOKENS, WIDTH).to(dtype), random(OUT, seed=3).to(dtype)
    y = fp8_product(Fp8Input(x), weight, bias=bias)
    assert y.dtype == dtype
    truth = x.double() @ w.t()
    scales = x.double().abs().amax(1, keepdim=True) / LARGEST
    allowed = bound(x.double(), w, scales, dtype) + 2 * torch.finfo(dtype).eps * (truth.abs() + bias.double().abs())
    error = (y.double() - truth - bias.double()).abs()
    assert (error <= allowed).all()
    # 2**-4 / sqrt(12) at the most for one factor rounded; far from zero, so the input was quantised.
    relative = error.norm() / truth.norm()
    assert 0.01 < relative < 0.036


@KIND
@DTYPE
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gradient_is_within_the_rounding_of_the_upstream_gradients(kind, count, dtype):
    outs = [OUT if kind != "tiles" else 128, 256, 16, 48, 128][:count]
    pairs = [weight_of(kind, out, seed=i) for i, out in enumerate(outs)]
    grads = [random(TOKENS, out, seed=20 + i, scale=2.0**i).to(dtype) for i, out in enumerate(outs)]
    kept = [grad.clone() for grad in grads]
    ours = fp8_input_gradient(grads, [weight for weight, _ in pairs])
    assert all(torch.equal(a, b) for a, b in zip(grads, kept))
    truth = sum(grad.double() @ w for grad, (_, w) in zip(grads, pairs))
    sizes = sum(grad.double().abs() @ w.abs() for grad, (_, w) in zip(grads, pairs))
    # Under the smallest step: of a scale that is at most max(|dy| |w|) / 448, times values of at most 448.
    largest = max(float(grad.double().abs().amax() * w.abs().amax()) for grad, (_, w) in zip(grads, pairs))
    absolute = SMALLEST / 2 * largest / LARGEST * sum(outs)
    allowed = (HALF_ULP + count * torch.finfo(dtype).eps + 1e-5) * sizes + absolute
    error = (ours.double() - truth).abs()
    assert (error <= allowed).all()
    assert error.norm() < 0.036 * truth.norm()


def test_a_kept_copy_gives_the_same_gradient():
    grads = [random(TOKENS, OUT, seed=5).bfloat16()]
    plain, _ = weight_of("rows")
    kept, _ = weight_of("rows", keep_transposed=True)
    assert kept.transposed is not None
    assert torch.equal(fp8_input_gradient(grads, [plain]), fp8_input_gradient(grads, [kept]))
    both = fp8_input_gradient(grads * 2, [plain, kept])
    torch.testing.assert_close(both, 2 * fp8_input_gradient(grads, [plain]))


@pytest.mark.parametrize("tokens", [0, 1])
@KIND
def test_few_tokens(kind, tokens):
    weight, _ = weight_of(kind)
    x = random(tokens, WIDTH).bfloat16()
    assert fp8_product(Fp8Input(x), weight).shape == (tokens, OUT)
    assert fp8_input_gradient([random(tokens, OUT).bfloat16()], [weight]).shape == (tokens, WIDTH)


def tensors(dtype=torch.float32, rank=4, out=OUT):
    return {
        "x": random(2, TOKENS, WIDTH).to(dtype),
        "A": random(rank, WIDTH, seed=2, scale=0.3).float(),
        "B": random(out, rank, seed=3).float(),
        "bias": random(out, seed=4).float(),
    }


@KIND
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_lora_on_an_fp8_base(kind, backend, device):
    """Only the base's products are rounded to fp8: the adapters' gradients are those of the 32-bit layer."""
    if device.type != "cpu" and backend != "reference":
        pytest.skip("the matrix units give bfloat16; see the test below")
    weight, w = weight_of(kind, device=device)
    leaves = {name: value.to(device).requires_grad_() for name, value in tensors().items()}
    y = lora_linear(leaves["x"], weight, leaves["A"], leaves["B"], 1.7, bias=leaves["bias"], backend=backend)
    upstream = random(2, TOKENS, OUT, seed=8).to(device, torch.float32)
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream)))

    exact = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    update = 1.7 * (exact["x"] @ exact["A"].t()) @ exact["B"].t()
    expected = exact["x"] @ w.t() + update + exact["bias"]
    truth = dict(zip(exact, torch.autograd.grad(expected, list(exact.values()), upstream.double())))
    for name in ("A", "B", "bias"):
        torch.testing.assert_close(gradients[name].double(), truth[name], rtol=1e-4, atol=1e-4)
    base = (leaves["x"].detach().double() @ w.t()).norm()
    assert 0.005 * base < (y.double() - expected).norm() < 0.036 * base
    part = upstream.double() @ w
    assert 0.005 * part.norm() < (gradients["x"].double() - truth["x"]).norm() < 0.036 * part.norm()


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_residual_and_buffer_of_a_product(adapted):
    weight, _ = weight_of("rows")
    t = {name: value.bfloat16() for name, value in tensors().items()}
    A, B = (t["A"], t["B"]) if adapted else (None, None)
    term = Term(Projection(weight), None, t["bias"], A, B, 1.7, "auto")
    x, residual = t["x"].flatten(0, 1), random(2 * TOKENS, OUT, seed=6).bfloat16()
    group = Group.of([term], x)
    (plain,), _ = project(x, x, group)
    buffer = torch.empty_like(residual)
    (added,), _ = project(x, x, group, residual=residual, out=buffer)
    assert added is buffer
    (same,), _ = project(x, x, group, rows=fp8_quantize_rows(x))
    assert torch.equal(same, plain)
    # Roundings to bfloat16 on either side, in another order, of sums no larger than those of the magnitudes: the thin
    # product, four sums and the result.
    x, A, B, bias, residual = (value.double() for value in (x, t["A"], t["B"], t["bias"], residual))
    update = 1.7 * (x @ A.t()) @ B.t() if adapted else torch.zeros(plain.shape)
    size = residual.abs() + 1.7 * (x.abs() @ A.abs().t()) @ B.abs().t() * adapted
    size += (plain.double() - update - bias).abs() + bias.abs()
    error = (added.double() - plain.double() - residual).abs()
    assert (error <= 3 * torch.finfo(torch.bfloat16).eps * size).all()


def test_projections_of_one_input_quantise_it_once(monkeypatch):
    calls = []
    for name in ("fp8_quantize_rows", "quantize_joined_rows"):
        original = getattr(fp8_linear, name)
        monkeypatch.setattr(fp8_linear, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1])
    projections = [Projection(weight_of("rows", seed=i)[0]) for i in range(3)]
    calls.clear()
    x = random(TOKENS, WIDTH).bfloat16().requires_grad_()
    outputs = lora_qkv(x, *projections)
    assert calls == ["fp8_quantize_rows"]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert calls == ["fp8_quantize_rows", "quantize_joined_rows"]


@pytest.mark.parametrize("kinds", list(itertools.combinations(("dense", *KINDS, "rows"), 3)), ids="-".join)
def test_mixed_projections_equal_the_sum_of_single_ones(kinds):
    bases, leaves = [], []
    for i, kind in enumerate(kinds):
        dense = random(128, WIDTH, seed=i, scale=0.3).float()
        bases.append(dense if kind == "dense" else weight_of(kind, 128, seed=i)[0])
        leaves.append((random(4, WIDTH, seed=30 + i).float(), random(128, 4, seed=40 + i).float()))
    projections = [Projection(base, (Adapter(A, B, 0.5),)) for base, (A, B) in zip(bases, leaves)]
    upstream = [random(TOKENS, 128, seed=50 + i).float() for i in range(3)]
    x = random(TOKENS, WIDTH).float().requires_grad_()
    outputs = lora_qkv(x, *projections)
    (joined,) = torch.autograd.grad(outputs, x, upstream)
    total = torch.zeros_like(joined)
    for base, (A, B), y, grad in zip(bases, leaves, outputs, upstream):
        single = lora_linear(x, base, A, B, 0.5)
        torch.testing.assert_close(single, y, rtol=1e-4, atol=1e-4)  # one product with all A adds in another order
        total += torch.autograd.grad(single, x, grad)[0]
    # Joined gradients of the row-wise kinds share one scale a row, which rounds differently.
    assert (joined - total).norm() <= 0.036 * total.norm()
    if sum(kind in ("rows", "nf4") for kind in kinds) < 2:
        torch.testing.assert_close(joined, total, rtol=1e-4, atol=1e-4)


@KIND
def test_mlp(kind):
    weights = [weight_of(kind, 256, 128, seed=1), weight_of(kind, 256, 128, seed=2), weight_of(kind, 128, 256, seed=3)]
    x = random(TOKENS, 128, scale=0.5).float().requires_grad_()
    y = lora_mlp(x, *(Projection(weight) for weight, _ in weights))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    exact = x.detach().double().requires_grad_()
    gate, up, down = (w for _, w in weights)
    expected = (torch.nn.functional.silu(exact @ gate.t()) * (exact @ up.t())) @ down.t()
    (truth,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    # Three roundings one after another, of 2.6 % each in the root mean square.
    assert (y.double() - expected).norm() < 0.08 * expected.norm()
    assert (gradient.double() - truth).norm() < 0.08 * truth.norm()


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"dora": True}, {"dora": True, "dropout": 0.3}], ids=str)
def test_dropout_and_dora_on_an_fp8_base(options):
    weight, _ = weight_of("rows")
    dense = weight.dense(torch.float32)
    magnitude = random(OUT, seed=7).abs().float() if options.get("dora") else None
    results = []
    for base in (weight, dense):
        torch.manual_seed(3)
        leaves = {name: value.clone().requires_grad_() for name, value in tensors().items()}
        y = lora_linear(
            leaves["x"], base, leaves["A"], leaves["B"], 1.7, dropout=options.get("dropout", 0.0), magnitude=magnitude
        )
        results.append((y, *torch.autograd.grad(y.sum(), [leaves["x"], leaves["A"]])))
    for ours, expected in zip(*results):
        assert (ours - expected).norm() < 0.06 * expected.norm()


def test_tiles_are_multiplied_in_16_bits_where_no_unit_takes_them(monkeypatch):
    weight, w = weight_of("tiles")
    monkeypatch.setattr(fp8_linear, "_eager", lambda *_: False)
    monkeypatch.setattr(fp8_linear, "tiles_supported", lambda _: False)
    x = random(TOKENS, WIDTH).bfloat16()
    y = fp8_product(Fp8Input(x), weight)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w.bfloat16()))
    grad = random(TOKENS, OUT).bfloat16()
    torch.testing.assert_close(fp8_input_gradient([grad, grad], [weight, weight]), 2 * (grad @ w.bfloat16()))


VALUES = torch.zeros(32, 64).to(E4M3)
WRONG = {
    "width": (UnsupportedError, lambda: Fp8Weight.quantize(torch.zeros(32, 40))),
    "vector": (UnsupportedError, lambda: Fp8Weight.quantize(torch.zeros(32))),
    "dtype of the values": (ArgumentError, lambda: Fp8Weight(VALUES.float(), torch.ones(32, 1))),
    "layout of the values": (ArgumentError, lambda: Fp8Weight(VALUES.t(), torch.ones(64, 1))),
    "dtype of the scales": (ArgumentError, lambda: Fp8Weight(VALUES, torch.ones(32, 1).double())),
    "number of scales": (ConfigError, lambda: Fp8Weight(VALUES, torch.ones(31, 1))),
    "transposed copy": (ConfigError, lambda: Fp8Weight(VALUES, torch.ones(32, 1), transposed=VALUES)),
    "x": (ConfigError, lambda: lora_linear(torch.zeros(2, 32), Fp8Weight(VALUES, torch.ones(32, 1)))),
    "four matrices": (ConfigError, lambda: fp8_operands.quantize_joined_rows([torch.ones(1, 16)] * 4, [])),
    "buffer": (ConfigError, lambda: fp8_transpose(VALUES, out=torch.zeros(64, 31).to(E4M3))),
    "blocks over rows": (UnsupportedError, lambda: Nf4Fp8Weight.of(four_bit(16, 80))),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, call):
    with pytest.raises(error):
        call()


def needs_units(least=(8, 9)):
    if torch.cuda.get_device_capability() < least:
        pytest.skip("no such matrix units")


@pytest.mark.gpu
@KIND
def test_lora_on_the_matrix_units(kind, gpu):
    """Real shapes, bfloat16: forward and all gradients beside the float32 products of the same fp8 numbers."""
    needs_units()
    weight, w = weight_of(kind, 14336, 4096, device=gpu)
    x = torch.randn(2049, 4096, dtype=torch.bfloat16, device=gpu)
    A = torch.randn(16, 4096, device=gpu) * 0.02
    B = torch.randn(14336, 16, device=gpu) * 0.02
    upstream = torch.randn(2049, 14336, dtype=torch.bfloat16, device=gpu)
    results = []
    for backend in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = lora_linear(leaves[0], weight, *leaves[1:], 2.0, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    # Narrow sums inside the matrix units, bfloat16 results; without tiles in the units the input is not rounded.
    rounded = kind != "tiles" or fp8_linear.tiles_supported(gpu)
    for name, ours, expected in zip(("y", "x", "A", "B"), *results):
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert error <= (1e-2 if rounded else 0.04), f"{name}: {error}"
    truth = x.double() @ w.t() + 2.0 * (x.double() @ A.double().t()) @ B.double().t()
    assert (results[0][0].double() - truth).norm() <= 0.036 * truth.norm()


@pytest.mark.gpu
def test_joined_projections_on_the_matrix_units(gpu):
    needs_units()
    projections = [
        Projection(weight_of("rows", out, 4096, seed=i, device=gpu)[0]) for i, out in enumerate((4096, 1024, 1024))
    ]
    x = torch.randn(1001, 4096, dtype=torch.bfloat16, device=gpu, requires_grad=True)
    results = []
    for backend in ("auto", "reference"):
        outputs = lora_qkv(x, *projections, backend=backend)
        upstream = [torch.cos(torch.arange(y.numel(), device=gpu)).view(y.shape).to(y.dtype) for y in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, x, upstream)))
    for ours, expected in zip(*results):
        assert (ours.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


@pytest.mark.gpu
def test_tiles_run_in_the_units_of_hopper(gpu):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not Hopper")
    assert fp8_linear.tiles_supported(gpu)

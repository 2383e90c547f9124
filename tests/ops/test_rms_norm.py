"""RMSNorm against float64 truth.

Widths: 1 (smallest), 7 and 97 (odd, prime, short rows share a program), 128 (a head), 513, 1,025 and 2,304
(Gemma-2-2B) of three pieces, the last of one column and of a quarter of its columns, and 1,536, of three that all
exist. Rows: none, one, fewer and more than a program holds or than there are programs.
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import rms_norm, rms_norm_fp8
from pantheraml.kernels.reference.rms_norm import rms_norm as reference
from pantheraml.kernels.utils import MAX_WIDTH

from .support import DTYPES, assert_error, assert_matches, random

LLAMA = {"casting": "input"}
GEMMA = {"casting": "float32", "offset": 1.0}
OLMO = {"casting": "float32"}
FORMS = {"llama": LLAMA, "gemma": GEMMA, "olmo": OLMO}
SHAPES = {"1x1": (1, 1), "3x7": (3, 7), "2x5x97": (2, 5, 97), "33x128": (33, 128)}
SHAPES |= {"3x513": (3, 513), "9x1025": (9, 1025), "3x1536": (3, 1536), "5x2304": (5, 2304)}
SMALL = (5, 97)
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def both(**options):
    """The kernel and the reference with the same options."""
    return (
        lambda **tensors: rms_norm(**tensors, **options, backend="triton"),
        lambda **tensors: reference(**tensors, **options),
    )


@DTYPE
@FORM
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients(shape, form, dtype, device):
    inputs = {"x": random(*shape), "weight": random(shape[-1], seed=1)}
    assert_matches(*both(**form), inputs, dtype=dtype, device=device, grad=("x", "weight"))


@DTYPE
@FORM
def test_residual(form, dtype, device):
    inputs = {"x": random(*SMALL), "weight": random(97, seed=1), "residual": random(*SMALL, seed=2)}
    assert_matches(*both(**form), inputs, dtype=dtype, device=device, grad=("x", "weight", "residual"))


@DTYPE
@pytest.mark.parametrize("width", [1025, 1536, 2304])
def test_residual_of_rows_in_pieces(width, dtype, device):
    inputs = {"x": random(5, width), "weight": random(width, seed=1), "residual": random(5, width, seed=2)}
    assert_matches(*both(**GEMMA), inputs, dtype=dtype, device=device, grad=("x", "weight", "residual"))
    assert_matches(*both(), inputs, dtype=dtype, device=device, grad=("x", "residual"))


def test_residual_sum_is_rounded_before_it_is_normalised(device):
    x, residual = (random(7, 64, seed=s).bfloat16().to(device) for s in (0, 1))
    y, total = rms_norm(x, residual=residual, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, backend="triton"))


def test_gradient_through_one_output_only(device):
    x, residual, weight = random(4, 16).float(), random(4, 16, seed=1).float(), random(16, seed=2).float()
    for chosen in (0, 1):
        gradients = []
        for op in both():
            leaves = [t.to(device).clone().requires_grad_() for t in (x, residual, weight)]
            op(x=leaves[0], residual=leaves[1], weight=leaves[2])[chosen].square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for ours, expected in zip(*gradients):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@DTYPE
def test_without_weight(dtype, device):
    assert_matches(*both(), {"x": random(*SMALL)}, dtype=dtype, device=device, grad=("x",))


def test_frozen_weight_gets_no_gradient(device):
    inputs = {"x": random(*SMALL), "weight": random(97, seed=1)}
    assert_matches(*both(), inputs, dtype=torch.bfloat16, device=device, grad=("x",))


@pytest.mark.parametrize("form", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_float32_weight_with_bfloat16_input(form, device):
    inputs = {"x": random(*SMALL), "weight": random(97, seed=1)}
    assert_matches(
        *both(**form),
        inputs,
        dtype=torch.bfloat16,
        device=device,
        grad=("x", "weight"),
        keep={"weight": torch.float32},
    )
    x, weight = random(2, 8).bfloat16().to(device), random(8).float().to(device)
    expected = reference(x, weight, **form).dtype
    assert rms_norm(x, weight, **form, backend="triton").dtype == expected


def test_float32_residual_stream(device):
    inputs = {"x": random(*SMALL), "residual": random(*SMALL, seed=1)}
    keep = {"residual": torch.float32}
    assert_matches(*both(), inputs, dtype=torch.bfloat16, device=device, grad=("x", "residual"), keep=keep)


STRIDED = {
    # q of a packed projection [B, T, (H + 2) * D]: two row strides, read in place
    "packed-heads": lambda x: x.view(2, 3, 4, 24)[:, :, :2, :16],
    # every other row: one stride
    "skipped-rows": lambda x: x.view(8, 72)[::2],
    # [B, H, T, D] from [B, T, H, D] with T cut: three strides, copied
    "transposed": lambda x: x.view(2, 6, 2, 24)[:, :5].transpose(1, 2),
    "column-major": lambda x: x.view(24, 24).t(),
    "expanded": lambda x: x.view(24, 24)[:1].expand(5, 24),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_inputs(view, device):
    kernel, expected = (lambda x, op=op: op(x=view(x)) for op in both())
    assert_matches(kernel, expected, {"x": random(24, 24)}, dtype=torch.bfloat16, device=device, grad=("x",))


def test_non_contiguous_upstream_gradient(device):
    kernel, expected = (lambda x, op=op: op(x=x).transpose(0, 1) for op in both())
    assert_matches(kernel, expected, {"x": random(3, 5, 16)}, dtype=torch.float32, device=device, grad=("x",))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_empty(shape, device):
    inputs = {"x": random(*shape), "weight": random(16)}
    kernel, expected = both()
    assert_matches(kernel, expected, inputs, dtype=torch.float32, device=device)
    x, weight = (t.float().to(device).requires_grad_() for t in inputs.values())
    kernel(x=x, weight=weight).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_large_values_do_not_overflow(device):
    inputs = {"x": random(3, 64, scale=2e4)}
    assert_matches(*both(), inputs, dtype=torch.float16, device=device, grad=("x",))


def test_is_deterministic(device):
    x, weight = random(70, 64).bfloat16().to(device), random(64).bfloat16().to(device)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        rms_norm(*leaves, backend="triton").float().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for first, second in zip(gradients(), gradients()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_fp8_rows(form, with_residual, device):
    x, weight, residual = (t.bfloat16().to(device) for t in (random(6, 96), random(96, seed=1), random(6, 96, seed=2)))
    options = {**form, "residual": residual if with_residual else None}
    ours = rms_norm_fp8(x, weight, **options, backend="triton")
    eager = rms_norm_fp8(x, weight, **options, backend="reference")
    wide = {"residual": residual.double()} if with_residual else {}
    truth = reference(x.double(), weight.double(), **form, **wide)
    truth = truth[0] if with_residual else truth
    assert ours.values.dtype == eager.values.dtype == torch.float8_e4m3fn
    assert ours.scales.shape == (6, 1)
    assert torch.equal(ours.total, eager.total)
    torch.testing.assert_close(ours.rstd, eager.rstd, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.scales, eager.scales, rtol=1e-5, atol=0)
    dequantised = [(r.values.double() * r.scales.double()) for r in (ours, eager)]
    assert_error("values", *dequantised, truth, torch.float8_e4m3fn, factor=1.05)
    assert ours.values.float().abs().amax(-1).min() == 448, "the row's largest value fills the range"


def test_fp8_of_a_zero_row(device):
    result = rms_norm_fp8(torch.zeros(2, 16, device=device), backend="triton")
    assert torch.equal(result.values.float(), torch.zeros(2, 16, device=device))
    assert torch.equal(result.scales, torch.ones(2, 1, device=device))


def test_fp8_refuses_to_drop_a_gradient():
    with pytest.raises(UnsupportedError, match="not differentiable"):
        rms_norm_fp8(torch.zeros(2, 16, requires_grad=True))


@FORM
def test_reference_gradcheck(form):
    x, weight, residual = random(3, 5), random(5, seed=1), random(3, 5, seed=2)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda x, w, r: reference(x, w, **form, residual=r), leaves)


def test_refusals(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ConfigError, match=r"weight of shape \(8,\) and got \(4,\)"):
        rms_norm(x, torch.zeros(4, device=device))
    with pytest.raises(ConfigError, match="residual of shape"):
        rms_norm(x, residual=torch.zeros(1, 8, device=device))
    with pytest.raises(ConfigError, match="offset"):
        rms_norm(x, offset=1.0)
    with pytest.raises(ConfigError, match="casting"):
        rms_norm(x, casting="llama")
    with pytest.raises(ArgumentError, match="floating-point"):
        rms_norm(x.long())
    with pytest.raises(ArgumentError, match="different devices"):
        rms_norm(x, torch.zeros(8, device="meta"))
    with pytest.raises(UnsupportedError, match="too wide"):
        rms_norm(torch.zeros(1, MAX_WIDTH + 1, device=device), backend="triton")


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("width", [64, 768, 1025, 1536, 2048, 2304, 2560, 3584, 4096, 8192, 12288, 16384])
def test_real_sizes(width, dtype, gpu):
    inputs = {"x": random(1021, width), "weight": random(width, seed=1)}
    assert_matches(*both(), inputs, dtype=dtype, device=gpu, grad=("x", "weight"))
    inputs["residual"] = random(1021, width, seed=2)
    assert_matches(*both(**GEMMA), inputs, dtype=dtype, device=gpu, grad=("x", "weight", "residual"))
    assert_matches(*both(**GEMMA), inputs, dtype=dtype, device=gpu, grad=("x", "residual"))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    rows, width = 2**31 // 4096 + 3, 4096
    x = torch.randn(rows, width, device=gpu, dtype=torch.bfloat16).requires_grad_()
    y = rms_norm(x, backend="triton")
    tail = x.detach()[-4:]
    torch.testing.assert_close(y.detach()[-4:], reference(tail), rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = tail.clone().requires_grad_()
    reference(tail).sum().backward()
    torch.testing.assert_close(gradient[-4:], tail.grad, rtol=2e-2, atol=2e-2)

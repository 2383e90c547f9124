"""LayerNorm against float64 truth, over the same widths as RMSNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import layer_norm
from pantheraml.kernels.reference.layer_norm import layer_norm as reference
from pantheraml.kernels.utils import MAX_WIDTH

from .support import DTYPES, assert_matches, random

SHAPES = {"1x1": (1, 1), "3x7": (3, 7), "2x5x97": (2, 5, 97), "33x128": (33, 128)}
SHAPES |= {"3x513": (3, 513), "9x1025": (9, 1025), "3x1536": (3, 1536), "5x2304": (5, 2304)}
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def kernel(**tensors):
    return layer_norm(**tensors, backend="triton")


def inputs_of(*shape):
    # a mean far from zero, which a variance taken as mean(x²) - mean² would not survive
    return {"x": random(*shape) + 10.0, "weight": random(shape[-1], seed=1), "bias": random(shape[-1], seed=2)}


@DTYPE
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients(shape, dtype, device):
    inputs = inputs_of(*shape)
    assert_matches(kernel, reference, inputs, dtype=dtype, device=device, grad=("x", "weight", "bias"))


@DTYPE
@pytest.mark.parametrize("names", [("x",), ("x", "weight"), ("x", "bias")], ids="+".join)
def test_without_weight_or_bias(names, dtype, device):
    inputs = {name: tensor for name, tensor in inputs_of(5, 97).items() if name in names}
    assert_matches(kernel, reference, inputs, dtype=dtype, device=device, grad=names)


@pytest.mark.parametrize("grad", [("x",), ("bias",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("width", [97, 1025])
def test_only_what_is_trained(width, grad, device):
    assert_matches(kernel, reference, inputs_of(5, width), dtype=torch.float32, device=device, grad=grad)


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_float32_parameters(names, device):
    keep = dict.fromkeys(names, torch.float32)
    grad = ("x", "weight", "bias")
    assert_matches(kernel, reference, inputs_of(5, 97), dtype=torch.bfloat16, device=device, grad=grad, keep=keep)


STRIDED = {
    "packed-heads": lambda x: x.view(2, 3, 4, 24)[:, :, :2, :16],
    "column-major": lambda x: x.view(24, 24).t(),
    "expanded": lambda x: x.view(24, 24)[:1].expand(5, 24),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_inputs(view, device):
    ours, expected = (lambda x, op=op: op(x=view(x)) for op in (kernel, reference))
    assert_matches(ours, expected, {"x": random(24, 24)}, dtype=torch.bfloat16, device=device, grad=("x",))


@pytest.mark.parametrize("width", [1, 97, 1000, 1025])
def test_a_mean_far_above_the_deviation_does_not_cost_digits(width, device):
    """The rounding of a mean near 1000 is 3e-5 in float32, sixty times what is allowed here."""
    x = (random(7, width) + 1000.0).float()
    expected = reference(x.double())
    ours = layer_norm(x.to(device), backend="triton").cpu().double()
    assert (ours - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * max(expected.abs().max(), 1.0)


@pytest.mark.parametrize("width", [97, 1025, 1536])
def test_a_mean_that_misses_by_as_much_as_the_deviation(width, device):
    """Rows of two neighbouring float32 numbers: what the first mean misses belongs neither to x nor to the variance."""
    x = 1e5 + 2.0**-7 * (random(7, width) > 0).float()
    expected = reference(x.double())
    ours = layer_norm(x.to(device), backend="triton").cpu().double()
    assert (ours - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("x", [0.3, 1000.3, 1e5])
@pytest.mark.parametrize("width", [97, 1025])
def test_a_constant_row_has_no_deviation(width, x, device):
    assert not layer_norm(torch.full((3, width), x, device=device), backend="triton").any()


@pytest.mark.parametrize("x", [0.3, -1.7, 12.34567, 1e4])
def test_a_single_column_has_no_deviation(x, device):
    leaf = torch.full((3, 1), x, device=device, requires_grad=True)
    y = layer_norm(leaf, backend="triton")
    y.backward(torch.full_like(y, 0.7))
    assert not y.any()
    assert not leaf.grad.any()


def test_empty(device):
    leaves = {name: t.float().to(device).requires_grad_() for name, t in inputs_of(0, 16).items()}
    kernel(**leaves).sum().backward()
    assert leaves["x"].grad.shape == (0, 16)
    assert not leaves["weight"].grad.any()
    assert not leaves["bias"].grad.any()


def test_is_deterministic(device):
    def gradients():
        leaves = [t.bfloat16().to(device).requires_grad_() for t in inputs_of(70, 64).values()]
        layer_norm(*leaves, backend="triton").float().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients()))


def test_reference_is_that_of_torch():
    x, weight, bias = inputs_of(4, 9).values()
    torch.testing.assert_close(reference(x, weight, bias, 1e-3), F.layer_norm(x, (9,), weight, bias, 1e-3))


def test_reference_gradcheck():
    leaves = [t.requires_grad_() for t in inputs_of(3, 5).values()]
    assert torch.autograd.gradcheck(reference, leaves)


def test_refusals(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ConfigError, match=r"bias of shape \(8,\)"):
        layer_norm(x, bias=x)
    with pytest.raises(ArgumentError, match="floating-point"):
        layer_norm(x.int())
    with pytest.raises(UnsupportedError, match="too wide"):
        layer_norm(torch.zeros(1, MAX_WIDTH + 1, device=device), backend="triton")


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("width", [64, 768, 1025, 1536, 2304, 2560, 3584, 4096, 8192, 12288, 16384])
def test_real_sizes(width, dtype, gpu):
    for grad in (("x", "weight", "bias"), ("x",), ("x", "bias")):
        assert_matches(kernel, reference, inputs_of(1021, width), dtype=dtype, device=gpu, grad=grad)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    x = torch.randn(2**31 // 4096 + 3, 4096, device=gpu, dtype=torch.bfloat16).requires_grad_()
    y = layer_norm(x, backend="triton")
    tail = x.detach()[-4:].clone().requires_grad_()
    expected = reference(tail)
    torch.testing.assert_close(y.detach()[-4:], expected.detach(), rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected.sum().backward()
    torch.testing.assert_close(gradient[-4:], tail.grad, rtol=2e-2, atol=2e-2)

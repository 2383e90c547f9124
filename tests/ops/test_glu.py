"""Gated linear units against float64 truth.

Widths: 1, 7, 97 (odd, prime), 128 (aligned), 1,300 (more than one block of a row when rows lie apart).
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import glu, glu_fp8, packed_glu
from pantheraml.kernels.glu import GluSpec, glu_backward
from pantheraml.kernels.reference.glu import ACTIVATIONS
from pantheraml.kernels.reference.glu import glu as reference
from pantheraml.kernels.reference.glu import packed_glu as packed_reference

from .support import DTYPES, assert_error, assert_matches, poison, random

GPT_OSS = {"limit": 1.5, "alpha": 1.702, "up_offset": 1.0}
SHAPES = {"1x1": (1, 1), "3x7": (3, 7), "2x5x97": (2, 5, 97), "33x128": (33, 128), "3x1300": (3, 1300)}
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
LAYOUT = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def inputs_of(*shape: int, scale: float = 2.0):
    return {"gate": random(*shape, scale=scale), "up": random(*shape, seed=1)}


def both(*args, op=glu, oracle=reference, **options):
    return (
        lambda *tensors, **named: op(*tensors, **named, **options, backend="triton"),
        lambda *tensors, **named: oracle(*tensors, **named, **options),
    )


def both_packed(**options):
    return both(op=packed_glu, oracle=packed_reference, **options)


@DTYPE
@ACTIVATION
def test_activations(activation, dtype, device):
    kernel, expected = both(activation=activation)
    assert_matches(kernel, expected, inputs_of(5, 97), dtype=dtype, device=device, grad=("gate", "up"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, device):
    kernel, expected = both()
    assert_matches(kernel, expected, inputs_of(*shape), dtype=torch.bfloat16, device=device, grad=("gate", "up"))


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 2600), (4, 6)], ids=str)
def test_packed(shape, interleaved, dtype, device):
    kernel, expected = both_packed(interleaved=interleaved)
    assert_matches(
        kernel, expected, {"gate_up": random(*shape, scale=2)}, dtype=dtype, device=device, grad=("gate_up",)
    )


@DTYPE
@LAYOUT
def test_limits(interleaved, dtype, device):
    kernel, expected = both_packed(interleaved=interleaved, **GPT_OSS)
    inputs = {"gate_up": random(5, 194, scale=2)}
    assert_matches(kernel, expected, inputs, dtype=dtype, device=device, grad=("gate_up",))


def test_gradient_at_the_limit_is_that_of_clamp(device):
    values = torch.tensor([[-2.0, -1.0, 0.5, 1.0, 2.0]], device=device)
    gradients = []
    for op in both(limit=1.0):
        gate, up = values.clone().requires_grad_(), values.clone().requires_grad_()
        op(gate, up).sum().backward()
        gradients.append(torch.cat([gate.grad, up.grad]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_nan_is_not_hidden_by_the_limit(device):
    nan = torch.full((1, 4), float("nan"), device=device)
    one = torch.ones(1, 4, device=device)
    assert glu(nan, one, limit=1.0, backend="triton").isnan().all()
    assert glu(one, nan, limit=1.0, backend="triton").isnan().all()


@ACTIVATION
def test_large_magnitudes_stay_finite(activation, device):
    inputs = inputs_of(3, 32, scale=30.0)
    assert_matches(*both(activation=activation), inputs, dtype=torch.float32, device=device, grad=("gate", "up"))


STRIDED = {
    "halves-of-packed": lambda x: (x[..., :48], x[..., 48:]),
    "rows-apart": lambda x: (x[::2, :40], x[1::2, 40:80]),
    "transposed": lambda x: (x[:, :6].t(), x[:, 6:12].t()),
    "expanded": lambda x: (x[:1].expand(4, 96), x[:4]),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_inputs(view, device):
    kernel, expected = (lambda x, op=op: op(*view(x)) for op in both())
    assert_matches(kernel, expected, {"x": random(6, 96)}, dtype=torch.bfloat16, device=device, grad=("x",))


@LAYOUT
def test_odd_row_stride(interleaved, device):
    kernel, expected = (lambda x, op=op: op(x[:, :12]) for op in both_packed(interleaved=interleaved))
    assert_matches(kernel, expected, {"x": random(5, 13)}, dtype=torch.float32, device=device, grad=("x",))


@LAYOUT
def test_non_contiguous_upstream_gradient(interleaved, device):
    kernel, expected = (lambda x, op=op: op(x).transpose(0, 1) for op in both_packed(interleaved=interleaved))
    assert_matches(kernel, expected, {"x": random(3, 5, 16)}, dtype=torch.float32, device=device, grad=("x",))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_into_a_buffer(backend, device):
    gate, up = (t.float().to(device).requires_grad_() for t in inputs_of(5, 10).values())
    buffer = poison(torch.empty(5, 16, device=device))
    result = glu(gate, up, out=buffer[:, :10], backend=backend)
    assert result.data_ptr() == buffer.data_ptr()
    assert buffer[:, 10:].isnan().all()
    expected = reference(gate, up)
    torch.testing.assert_close(buffer[:, :10], expected, rtol=1e-5, atol=1e-6)
    weights = random(5, 10, seed=5).float().to(device)
    gradients = [torch.autograd.grad((value * weights).sum(), (gate, up)) for value in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_packed_into_a_buffer(device):
    x, buffer = random(5, 20).float().to(device), torch.zeros(5, 16, device=device)
    packed_glu(x, out=buffer[:, 3:13], backend="triton")
    torch.testing.assert_close(buffer[:, 3:13], packed_reference(x), rtol=1e-5, atol=1e-6)
    assert not buffer[:, :3].any()
    assert not buffer[:, 13:].any()


def test_backward_into_buffers_with_the_output_again(device):
    gate, up = (t.float().to(device).requires_grad_() for t in inputs_of(5, 10).values())
    dout = random(5, 10, seed=5).float().to(device)
    buffer = poison(torch.empty(5, 40, device=device))
    again = poison(torch.empty(5, 12, device=device))
    with torch.no_grad():
        glu_backward(dout, gate, up, GluSpec(), dgate=buffer[:, :10], dup=buffer[:, 20:30], out=again[:, :10])
    expected = reference(gate, up)
    dgate, dup = torch.autograd.grad(expected, (gate, up), dout)
    torch.testing.assert_close(buffer[:, :10], dgate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffer[:, 20:30], dup, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again[:, :10], expected.detach(), rtol=1e-5, atol=1e-6)
    assert buffer[:, 10:20].isnan().all()
    assert buffer[:, 30:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_empty(shape, device):
    gate = torch.zeros(shape, device=device, requires_grad=True)
    result = glu(gate, gate, backend="triton")
    result.sum().backward()
    assert result.shape == gate.grad.shape == shape
    packed_glu(torch.zeros(shape, device=device), interleaved=True, backend="triton")


@pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["swiglu", "gpt-oss"])
def test_fp8_rows(options, device):
    gate, up = (t.bfloat16().to(device) for t in inputs_of(6, 300).values())
    ours, eager = (glu_fp8(gate, up, **options, backend=backend) for backend in ("triton", "reference"))
    truth = reference(gate.double(), up.double(), **options)
    assert ours[0].dtype == torch.float8_e4m3fn
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-5, atol=0)
    dequantised = [values.double() * scales.double() for values, scales in (ours, eager)]
    assert_error("values", *dequantised, truth, torch.float8_e4m3fn, factor=1.05)
    assert ours[0].float().abs().amax(-1).min() == 448


def test_fp8_refuses_to_drop_a_gradient():
    x = torch.zeros(2, 16, requires_grad=True)
    with pytest.raises(UnsupportedError, match="not differentiable"):
        glu_fp8(x, x)


@ACTIVATION
def test_reference_gradcheck(activation):
    leaves = [t.requires_grad_() for t in inputs_of(3, 5).values()]
    assert torch.autograd.gradcheck(lambda g, u: reference(g, u, activation, limit=1.5, up_offset=1.0), leaves)


def test_refusals(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ConfigError, match=r"up of shape \(2, 8\)"):
        glu(x, x[:1])
    with pytest.raises(ConfigError, match="unknown activation 'swish'"):
        glu(x, x, "swish")
    with pytest.raises(ConfigError, match="alpha"):
        glu(x, x, "gelu", alpha=1.7)
    with pytest.raises(ConfigError, match="limit must be positive"):
        glu(x, x, limit=-1.0)
    with pytest.raises(ArgumentError, match="one dtype"):
        glu(x, x.half())
    with pytest.raises(ArgumentError, match="floating-point"):
        glu(x.int(), x.int())
    with pytest.raises(ConfigError, match="even last dimension"):
        packed_glu(x[:, :7])
    with pytest.raises(ConfigError, match="strides"):
        glu(x, x, out=torch.zeros(8, 2, device=device).t(), backend="triton")
    with pytest.raises(ConfigError, match="out of shape"):
        glu(x, x, out=torch.zeros(2, 4, device=device))


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("width", [8192, 9216, 9728, 14336])
def test_real_sizes(width, dtype, gpu):
    for interleaved in (False, True):
        kernel, expected = both_packed(interleaved=interleaved)
        inputs = {"gate_up": random(257, 2 * width)}
        assert_matches(kernel, expected, inputs, dtype=dtype, device=gpu, grad=("gate_up",))


@pytest.mark.gpu
@LAYOUT
def test_more_than_two_to_the_31_elements(interleaved, gpu):
    rows, width = 2**31 // 8192 + 3, 8192
    x = torch.randn(rows, width, device=gpu, dtype=torch.bfloat16).requires_grad_()
    y = packed_glu(x, interleaved=interleaved, backend="triton")
    tail = x.detach()[-4:].clone().requires_grad_()
    expected = packed_reference(tail, interleaved=interleaved)
    torch.testing.assert_close(y.detach()[-4:], expected.detach(), rtol=2e-2, atol=2e-2)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected.sum().backward()
    torch.testing.assert_close(gradient[-4:], tail.grad, rtol=2e-2, atol=2e-2)

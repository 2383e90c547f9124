"""fp8 quantisation, transposes and products.

Values must agree with the reference on a CPU bit for bit: both round the same quotients once. (On a GPU torch divides
by a number by multiplying with its rounded inverse.)
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels.fp8 import (
    Fp8Matrix,
    fp8_dequantize,
    fp8_matmul,
    fp8_quantize_blocks,
    fp8_quantize_rows,
    fp8_transpose,
)

from .support import DTYPES, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# The last ones are rows of several pieces, whole and not.
SHAPES = {"1x1": (1, 1), "5x97": (5, 97), "130x200": (130, 200), "128x128": (128, 128)}
SHAPES |= {"3x2304": (3, 2304), "3x2311": (3, 2311), "3x4096": (3, 4096)}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
QUANTIZERS = {"rows": fp8_quantize_rows, "tiles": fp8_quantize_blocks}
QUANTIZER = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def bits(x):
    return x.view(torch.uint8)


def value(shape, dtype, device, seed=0):
    x = random(*shape, seed=seed, scale=3.0).to(dtype)
    if shape[0] > 2:
        x[1] = 0.0
    return x.to(device)


@DTYPE
@SHAPE
@QUANTIZER
def test_kernel_agrees_with_the_reference(quantize, shape, dtype, device):
    x = value(shape, dtype, device)
    ours = quantize(x, transposed=True, backend="triton")
    expected = quantize(x.cpu(), backend="reference")
    assert torch.equal(ours.scales.cpu(), expected.scales)
    assert torch.equal(bits(ours.values).cpu(), bits(expected.values))
    assert torch.equal(bits(ours.transposed).cpu(), bits(expected.values).t())


@QUANTIZER
def test_error_is_that_of_three_mantissa_bits(quantize):
    x = value((130, 200), torch.float32, "cpu")
    matrix = quantize(x)
    back = fp8_dequantize(matrix, torch.float32, block=128 if quantize is fp8_quantize_blocks else None)
    # Half a unit of three mantissa bits; below the smallest normal number, half the smallest step of the scale.
    assert ((back - x).abs() <= x.abs() / 16 + matrix.scales.max() * 2.0**-10).all()


@QUANTIZER
def test_strided_input(quantize, device):
    x = value((12, 64), torch.bfloat16, device)[::2, :33]
    ours, expected = quantize(x, backend="triton"), quantize(x.cpu().contiguous(), backend="reference")
    assert torch.equal(bits(ours.values).cpu(), bits(expected.values))


@QUANTIZER
def test_no_rows(quantize, device):
    matrix = quantize(torch.empty(0, 16, device=device), transposed=True, backend="triton")
    assert matrix.values.shape == (0, 16)
    assert matrix.transposed.shape == (16, 0)


def test_leading_dimensions_of_rows(device):
    x = value((6, 32), torch.bfloat16, device)
    deep = fp8_quantize_rows(x.view(2, 3, 32), backend="triton")
    assert deep.scales.shape == (2, 3, 1)
    assert torch.equal(bits(deep.values).view(6, 32), bits(fp8_quantize_rows(x, backend="triton").values))


@pytest.mark.parametrize("shape", [(1, 1), (5, 97), (129, 257), (0, 4)], ids=str)
def test_transpose(shape, device):
    x = torch.randint(0, 255, shape, dtype=torch.uint8, device=device)
    ours = fp8_transpose(x, backend="triton")
    assert ours.is_contiguous()
    assert torch.equal(ours, x.t())
    assert torch.equal(fp8_transpose(x.t(), backend="triton"), x)


def test_reference_matmul():
    x, weight = random(5, 32).float(), random(48, 32, seed=1).float()
    bias = random(48, seed=2).float()
    a, b = fp8_quantize_rows(x), fp8_quantize_rows(weight)
    exact = fp8_dequantize(a, torch.float32).double() @ fp8_dequantize(b, torch.float32).double().t() + bias
    y = fp8_matmul(a, b, bias=bias, out_dtype=torch.float32, backend="reference")
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_matmul_refuses_a_device_without_fp8():
    a = fp8_quantize_rows(torch.randn(4, 32))
    with pytest.raises(UnsupportedError, match="fp8 matrix units"):
        fp8_matmul(a, a)


MATRIX = Fp8Matrix(torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(4, 1))
WRONG = {
    "cube": (ConfigError, lambda: fp8_quantize_blocks(torch.zeros(2, 2, 2))),
    "transposed cube": (ConfigError, lambda: fp8_quantize_rows(torch.zeros(2, 2, 2), transposed=True)),
    "integers": (ArgumentError, lambda: fp8_quantize_rows(torch.zeros(2, 2).int())),
    "wide transpose": (ArgumentError, lambda: fp8_transpose(torch.zeros(2, 2))),
    "kernel for dequantisation": (UnsupportedError, lambda: fp8_dequantize(MATRIX, torch.float32, backend="triton")),
    "widths": (ConfigError, lambda: fp8_matmul(MATRIX, Fp8Matrix(MATRIX.values[:, :16], MATRIX.scales))),
    "tile scales": (ConfigError, lambda: fp8_matmul(MATRIX, Fp8Matrix(MATRIX.values, torch.ones(1, 1)))),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, call):
    with pytest.raises(error):
        call()


@pytest.mark.gpu
def test_real_shapes(gpu):
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device=gpu)
    for quantize in QUANTIZERS.values():
        ours, expected = quantize(x, transposed=True, backend="triton"), quantize(x.cpu(), backend="reference")
        assert torch.equal(bits(ours.values).cpu(), bits(expected.values))
        assert torch.equal(bits(ours.transposed).cpu(), bits(expected.values).t())


@pytest.mark.gpu
def test_matmul_on_the_matrix_units(gpu):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matrix units")
    x, weight = (torch.randn(n, 1024, dtype=torch.bfloat16, device=gpu) for n in (300, 512))
    bias = torch.randn(512, dtype=torch.bfloat16, device=gpu)
    a, b = fp8_quantize_rows(x), fp8_quantize_rows(weight)
    ours, expected = (fp8_matmul(a, b, bias=bias, backend=backend).float() for backend in ("auto", "reference"))
    assert (ours - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.gpu
def test_more_elements_than_int32_counts(gpu):
    x = torch.randint(0, 255, (2**16 + 1, 2**15 + 16), dtype=torch.uint8, device=gpu)
    assert x.numel() > 2**31
    assert torch.equal(fp8_transpose(x, backend="triton")[-3:], x.t()[-3:])

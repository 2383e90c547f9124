"""4-bit weights against bitsandbytes, which the kernels never import."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels.nf4 import MATVEC_MAX_VECTORS, Quantized4Bit, nf4_dequantize, nf4_matvec
from pantheraml.kernels.reference.nf4 import nf4_dequantize as reference

from .support import DTYPES, assert_error, random

functional = pytest.importorskip("bitsandbytes.functional")

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
SHAPES = {"6x128": (6, 128), "odd 5x77": (5, 77), "less than a block": (3, 5), "130x256": (130, 256)}


def quantize(shape, dtype=torch.bfloat16, *, kind="nf4", nested=True, blocksize=64, device="cpu"):
    """A weight quantised by bitsandbytes on the CPU, and what bitsandbytes makes of it."""
    weight = random(*shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    expected = functional.dequantize_4bit(packed, state)
    state.to(device)
    return Quantized4Bit.from_quant_state(packed.to(device), state), expected


@DTYPE
@NESTED
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dequantize_agrees_with_bitsandbytes(shape, kind, nested, dtype, device):
    quantized, expected = quantize(shape, dtype, kind=kind, nested=nested, device=device)
    ours = nf4_dequantize(quantized, backend="triton").cpu()
    assert ours.dtype == dtype
    # A fused multiply-add may round a nested scale to its neighbour, which moves a product by one place.
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(reference(quantized, dtype).cpu(), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 2048, 4096])
def test_blocksizes(blocksize, device):
    quantized, expected = quantize((9, 500), blocksize=blocksize, device=device)
    ours = nf4_dequantize(quantized, backend="triton").cpu()
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_into_a_wider_buffer(backend, device):
    quantized, _ = quantize((7, 96), device=device)
    buffer = torch.zeros(7, 101, dtype=torch.bfloat16, device=device)
    view = buffer[:, :96]
    assert nf4_dequantize(quantized, out=view, backend=backend) is view
    assert torch.equal(view, nf4_dequantize(quantized, backend=backend))
    assert not buffer[:, 96:].any()


def test_dtype_of_the_result(device):
    quantized, _ = quantize((4, 64), device=device)
    wide = nf4_dequantize(quantized, dtype=torch.float32, backend="triton")
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), nf4_dequantize(quantized, backend="triton"))


@DTYPE
@NESTED
@pytest.mark.parametrize("vectors", [1, 3, MATVEC_MAX_VECTORS + 1])
@pytest.mark.parametrize("shape", [(7, 64), (33, 192), (5, 77)], ids=str)
def test_matvec(shape, vectors, nested, dtype, device):
    quantized, _ = quantize(shape, dtype, nested=nested, device=device)
    x = random(vectors, shape[1], seed=3).to(dtype).to(device)
    weight = reference(quantized, torch.float32).double()
    eager = (x @ reference(quantized, dtype).t()).double()
    ours = nf4_matvec(x, quantized, backend="triton")
    assert ours.dtype == dtype
    assert_error("matvec", ours.double(), eager, x.double() @ weight.t(), dtype)


def test_matvec_takes_strided_vectors_and_leading_dimensions(device):
    quantized, _ = quantize((9, 64), torch.float32, device=device)
    x = random(2, 2, 70).float().to(device)[:, :, 3:67]
    ours = nf4_matvec(x, quantized, backend="triton")
    assert ours.shape == (2, 2, 9)
    torch.testing.assert_close(ours, x @ reference(quantized, torch.float32).t(), rtol=1e-4, atol=1e-4)
    assert nf4_matvec(x[:0], quantized, backend="triton").shape == (0, 2, 9)


def test_matvec_has_no_backward():
    quantized, _ = quantize((9, 64))
    x = torch.randn(1, 64, dtype=torch.bfloat16).requires_grad_()
    with pytest.raises(UnsupportedError, match="backward"):
        nf4_matvec(x, quantized)
    with torch.no_grad():
        nf4_matvec(x, quantized)


GOOD = {
    "packed": torch.zeros(32, dtype=torch.uint8),
    "absmax": torch.zeros(1),
    "code": torch.zeros(16),
    "blocksize": 64,
    "shape": torch.Size((1, 64)),
    "dtype": torch.float32,
}
WRONG = {
    "packed dtype": (ArgumentError, {"packed": torch.zeros(32)}),
    "packed size": (ConfigError, {"packed": torch.zeros(31, dtype=torch.uint8)}),
    "scales": (ConfigError, {"absmax": torch.zeros(2)}),
    "scale dtype": (ArgumentError, {"absmax": torch.zeros(1, dtype=torch.uint8)}),
    "blocksize": (ConfigError, {"blocksize": 48}),
    "half nested": (ConfigError, {"nested_absmax": torch.zeros(1)}),
}


@pytest.mark.parametrize(("error", "change"), WRONG.values(), ids=WRONG.keys())
def test_record_checks_itself(error, change):
    Quantized4Bit(**GOOD)
    with pytest.raises(error):
        Quantized4Bit(**(GOOD | change))


def test_repacked_weights_are_refused():
    packed, state = functional.quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedError, match="repacked"):
        Quantized4Bit.from_quant_state(packed, state)


@pytest.mark.parametrize("out", [torch.zeros(4, 63), torch.zeros(4, 64, device="meta")], ids=["shape", "device"])
def test_wrong_buffers(out):
    quantized, _ = quantize((4, 64))
    with pytest.raises(ConfigError):
        nf4_dequantize(quantized, out=out)


@pytest.mark.gpu
def test_real_shape(gpu):
    quantized, expected = quantize((4096, 14336), device=gpu)
    ours = nf4_dequantize(quantized, backend="triton").cpu()
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


@pytest.mark.gpu
def test_more_elements_than_int32_counts(gpu):
    rows, width = 2**17 + 1, 2**14
    assert rows * width > 2**31
    packed = torch.randint(0, 256, (rows * width // 2,), dtype=torch.uint8, device=gpu)
    absmax = torch.rand(rows * width // 64, device=gpu)
    code = torch.linspace(-1, 1, 16, device=gpu)
    whole = Quantized4Bit(packed, absmax, code, 64, torch.Size((rows, width)), torch.bfloat16)
    ours = nf4_dequantize(whole, backend="triton")
    tail = Quantized4Bit(
        packed[-width // 2 :], absmax[-width // 64 :], code, 64, torch.Size((1, width)), torch.bfloat16
    )
    assert torch.equal(ours[-1:], reference(tail, torch.bfloat16))
    x = torch.randn(1, width, dtype=torch.bfloat16, device=gpu)
    torch.testing.assert_close(
        nf4_matvec(x, whole, backend="triton")[0, -1:].float(),
        (x.float() @ ours[-1:].float().t())[0],
        rtol=2e-2,
        atol=0.2,
    )

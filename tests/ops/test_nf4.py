"""4-bit weights against bitsandbytes, which the kernels never import."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import nf4_product
from pantheraml.kernels.nf4 import Quantized4Bit, nf4_dequantize
from pantheraml.kernels.nf4_product import nf4_matvec
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


def assert_products(quantized, vectors, dtype):
    """The kernel's error against float64 is no larger than that of the dequantised weight in ``dtype``."""
    x = random(vectors, quantized.shape[1], seed=3).to(dtype).to(quantized.device)
    weight = reference(quantized, torch.float32).double()
    eager = (x @ reference(quantized, dtype).t()).double()
    ours = nf4_matvec(x, quantized, backend="triton")
    assert ours.dtype == dtype
    assert_error("matvec", ours.double(), eager, x.double() @ weight.t(), dtype)


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
@pytest.mark.parametrize("vectors", [1, 2, 3, 9, nf4_product.MAX_VECTORS + 1])
@pytest.mark.parametrize("shape", [(7, 64), (33, 256), (18, 320), (7, 96), (5, 77)], ids=str)
def test_matvec(shape, vectors, nested, dtype, device):
    """Rows that are no whole program or, in the last shapes, no whole chunk, block or piece."""
    quantized, _ = quantize(shape, dtype, nested=nested, device=device)
    assert_products(quantized, vectors, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("blocksize", [16, 32, 128, 512])
def test_matvec_of_other_blocks(blocksize, vectors, kind, device):
    """Shorter blocks than a kernel's pieces, and longer ones, which end within a row."""
    weight, dtype = random(9, 320).to(torch.bfloat16), torch.bfloat16
    if blocksize == 16:  # bitsandbytes has none so short
        nibbles = torch.randint(0, 256, (weight.numel() // 2,), dtype=torch.uint8)
        code = functional.get_4bit_type(kind, device="cpu")
        scale = torch.rand(weight.numel() // blocksize)
        parts = (part.to(device) for part in (nibbles, scale, code))
        quantized = Quantized4Bit(*parts, blocksize, weight.shape, dtype)
    else:
        quantized, _ = quantize(weight.shape, dtype, kind=kind, blocksize=blocksize, device=device)
    assert_products(quantized, vectors, dtype)


def test_matvec_of_scales_that_do_not_lie_in_words(device):
    """A slice of a stack begins at any scale, and may begin at any byte."""
    whole, _ = quantize((3, 5, 256), device=device)
    for start in (1, 2):
        first = start * 5 * 256
        nested = {"nested_code": whole.nested_code, "nested_offset": whole.nested_offset, "nested_blocksize": 4}
        scales = whole.absmax[first // 64 - 1 :][:20]
        outer = whole.nested_absmax.repeat(5)[:5]
        for packed in (whole.packed[first // 2 :][: 5 * 128], whole.packed[first // 2 - 1 :][: 5 * 128]):
            part = Quantized4Bit(
                packed, scales, whole.code, 64, torch.Size((5, 256)), whole.dtype, nested_absmax=outer, **nested
            )
            for vectors in (1, 4):
                assert_products(part, vectors, torch.bfloat16)


def test_matvec_is_repeatable_and_no_vector_depends_on_the_others(device):
    quantized, _ = quantize((33, 1024), device=device)
    x = random(8, 1024).to(torch.bfloat16).to(device)
    all_of_them = nf4_matvec(x, quantized, backend="triton")
    assert torch.equal(all_of_them, nf4_matvec(x, quantized, backend="triton"))
    assert torch.equal(all_of_them[:5], nf4_matvec(x[:5], quantized, backend="triton"))
    x[3] = float("nan")
    poisoned = nf4_matvec(x, quantized, backend="triton")
    assert poisoned[3].isnan().all()
    assert torch.equal(poisoned[[0, 1, 2, 4, 5, 6, 7]], all_of_them[[0, 1, 2, 4, 5, 6, 7]])


def test_matvec_does_not_write_out_what_it_can_read(device, monkeypatch):
    quantized, _ = quantize((9, 128), device=device)
    calls = []
    original = nf4_product.nf4_dequantize
    monkeypatch.setattr(nf4_product, "nf4_dequantize", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    for dtype, most in ((torch.bfloat16, nf4_product.MAX_VECTORS), (torch.float32, nf4_product.MAX_FEW_VECTORS)):
        x = random(most + 1, 128).to(dtype).to(device)
        for vectors in range(1, most + 1):
            nf4_matvec(x[:vectors], quantized, backend="triton")
        assert not calls
        nf4_matvec(x, quantized, backend="triton")
        assert len(calls) == 1
        calls.clear()


def test_launches_fill_the_chip_and_no_more():
    """The forms that were fastest on an H100, of 132 multiprocessors, for the products of an 8B and a 1B model."""
    few = nf4_product._few
    assert few(1, 14336, 128, 132) == few(1, 4096, 448, 132) == few(1, 4096, 128, 132) == (1, 2, 1)
    assert few(1, 1024, 128, 132) == (1, 2, 4)
    assert few(1, 2048, 64, 132) == (1, 2, 2)
    assert few(2, 14336, 128, 132) == few(2, 4096, 128, 132) == (2, 4, 1)
    assert few(2, 1024, 128, 132) == (2, 2, 2)
    assert few(1, 1, 2, 132) == (1, 2, 1)
    many = nf4_product._many
    assert many(3, 64)[1:] == many(8, 64)[1:] == (16, 8)
    assert many(9, 64) == many(16, 64) == (16, 32, 4)
    assert many(8, 1)[2] == many(8, 4)[2] == 1


def test_matvec_takes_strided_vectors_and_leading_dimensions(device):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        quantized, _ = quantize((9, 64), dtype, device=device)
        for shape, columns in (((2, 2, 70), slice(3, 67)), ((2, 2, 72), slice(4, 68)), ((3, 1, 70), slice(0, 64))):
            x = random(*shape).to(dtype).to(device)[:, :, columns]
            ours = nf4_matvec(x, quantized, backend="triton")
            assert ours.shape == (*shape[:2], 9)
            expected = x @ reference(quantized, dtype).t()
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        assert nf4_matvec(x[:0], quantized, backend="triton").shape == (0, 1, 9)


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
    for vectors in (1, 2, 4):
        x = torch.randn(vectors, width, dtype=torch.bfloat16, device=gpu)
        torch.testing.assert_close(
            nf4_matvec(x, whole, backend="triton")[:, -1:].float(),
            x.float() @ ours[-1:].float().t(),
            rtol=2e-2,
            atol=0.2,
        )


@pytest.mark.gpu
@DTYPE
@NESTED
@pytest.mark.parametrize("vectors", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (2048, 2048)], ids=str)
def test_matvec_of_real_shapes(shape, vectors, nested, dtype, gpu):
    quantized, _ = quantize(shape, dtype, nested=nested, device=gpu)
    assert_products(quantized, vectors, dtype)

"""Products with a thin factor against float64 truth of the plain formulas."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import low_rank
from pantheraml.kernels.low_rank import Tile, gradients, narrow, widen

from .support import assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# rows, width, rank: one tile and less, several ragged tiles, a rank that pads, one that does not
SHAPES = pytest.mark.parametrize(
    ("rows", "width", "rank"), [(1, 16, 1), (37, 97, 5), (70, 300, 16), (33, 256, 48)], ids=str
)
SMALL = Tile(32, 32, 4, 2)


@DTYPE
@SHAPES
@pytest.mark.parametrize("splits", [None, 3])
def test_narrow(splits, rows, width, rank, dtype, device):
    inputs = {"x": random(rows, width), "A": random(rank, width, seed=1)}
    kernel = lambda x, A: narrow(x, A, tile=SMALL, splits=splits)  # noqa: E731
    assert_matches(kernel, lambda x, A: x @ A.t(), inputs, dtype=dtype, device=device)


@DTYPE
@SHAPES
@pytest.mark.parametrize("base", [False, True], ids=["plain", "base"])
def test_widen(base, rows, width, rank, dtype, device):
    inputs = {"thin": random(rows, rank), "factor": random(width, rank, seed=1)}
    if base:
        inputs["base"] = random(rows, width, seed=2)

    def kernel(thin, factor, base=None):
        return widen(thin, factor, 0.7, base=base, tile=SMALL)

    def expected(thin, factor, base=None):
        product = thin @ factor.t() * 0.7
        return product if base is None else base + product

    assert_matches(kernel, expected, inputs, dtype=dtype, device=device)


@DTYPE
@SHAPES
@pytest.mark.parametrize("wanted", ["thin", "gradient", "both"])
def test_gradients(wanted, rows, width, rank, dtype, device):
    inputs = {"dy": random(rows, width), "factor": random(width, rank, seed=1), "skinny": random(rows, rank, seed=2)}

    def kernel(dy, factor, skinny):
        thin = torch.empty_like(skinny) if wanted != "gradient" else None
        gradient = torch.empty_like(factor) if wanted != "thin" else None
        gradients([dy], [factor], skinny, 0.7, thin=thin, gradient=gradient, tile=SMALL, parts=2)
        return thin, gradient

    def expected(dy, factor, skinny):
        results = (dy @ factor * 0.7, dy.t() @ skinny * 0.7)
        return {"thin": results[:1], "gradient": results[1:], "both": results}[wanted]

    assert_matches(kernel, expected, inputs, dtype=dtype, device=device)


@DTYPE
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("widths", [(97, 33), (130, 16, 70)], ids=str)
def test_several_factors_share_a_launch(widths, splits, dtype, device):
    """What is left of a sum over x goes through each factor, and comes out whole for the backward."""
    rows, features, rank = 70, 140, 5
    inputs = {"x": random(rows, features), "A": random(rank * len(widths), features, seed=1)}
    inputs |= {f"B{i}": random(width, rank, seed=2 + i) for i, width in enumerate(widths)}

    def kernel(x, A, **factors):
        parts = low_rank.narrow_parts(x, A, read=0, tile=SMALL, splits=splits)
        assert parts.shape == (splits, rows, rank * len(widths))
        total = torch.empty(parts.shape[1:], dtype=x.dtype, device=x.device)
        several = low_rank.widen_each(parts, list(factors.values()), 0.7, total=total, tile=SMALL)
        first = widen(parts[:, :, :rank], factors["B0"], 0.7, base=several[0], total=total[:, :rank], tile=SMALL)
        return total, *several, first

    def expected(x, A, **factors):
        thin = x @ A.t()
        columns = thin.split(rank, 1)
        several = [t @ B.t() * 0.7 for t, B in zip(columns, factors.values())]
        return thin, *several, 2 * several[0]

    assert_matches(kernel, expected, inputs, dtype=dtype, device=device)


@DTYPE
@pytest.mark.parametrize("wanted", ["thin", "gradient", "both"])
@pytest.mark.parametrize("widths", [(97, 33), (130, 16, 70)], ids=str)
@pytest.mark.parametrize("limit", [low_rank.SUMS_BYTES, 1], ids=["together", "apart"])
def test_several_gradients_share_a_launch(limit, widths, wanted, dtype, device, monkeypatch):
    monkeypatch.setattr(low_rank, "SUMS_BYTES", limit)
    rows, rank = 70, 5
    inputs = {f"dy{i}": random(rows, width, seed=i) for i, width in enumerate(widths)}
    inputs |= {f"B{i}": random(width, rank, seed=3 + i) for i, width in enumerate(widths)}
    inputs["skinny"] = random(rows, rank * len(widths), seed=6)

    def split(tensors):
        return [x for name, x in tensors.items() if "dy" in name], [x for name, x in tensors.items() if "B" in name]

    def kernel(skinny, **tensors):
        dys, factors = split(tensors)
        thin = torch.empty_like(skinny) if wanted != "gradient" else None
        gradient = skinny.new_empty(sum(widths), rank) if wanted != "thin" else None
        gradients(dys, factors, skinny, 0.7, thin=thin, gradient=gradient, tile=SMALL, parts=2)
        return thin, gradient

    def expected(skinny, **tensors):
        dys, factors = split(tensors)
        thin = torch.cat([dy @ B * 0.7 for dy, B in zip(dys, factors)], 1)
        gradient = torch.cat([dy.t() @ s * 0.7 for dy, s in zip(dys, skinny.split(rank, 1))])
        return {"thin": (thin,), "gradient": (gradient,), "both": (thin, gradient)}[wanted]

    assert_matches(kernel, expected, inputs, dtype=dtype, device=device)


def test_wide_tensors_have_wide_tiles_where_memory_allows():
    """Of the sizes of shared memory that NVIDIA's chips have, 64 KiB (T4) are too few for two of their stages."""
    kibibytes = {size: low_rank.gradient_tile(16, 14336, size * 1024).columns for size in (64, 99, 163, 227)}
    assert kibibytes == {64: 256, 99: 512, 163: 512, 227: 512}
    assert low_rank.gradient_tile(16, 4096, 227 * 1024) == low_rank.GRADIENTS[16]
    assert low_rank.gradient_tile(64, 14336, 227 * 1024) == low_rank.GRADIENTS[64]


def test_float32_masters_are_rounded_as_they_are_read(device):
    x, A, s = (t.to(device) for t in (random(9, 40).bfloat16(), random(4, 40, seed=1).float(), random(9, 4).bfloat16()))
    assert torch.equal(narrow(x, A), narrow(x, A.bfloat16()))
    assert torch.equal(widen(s, A.t()), widen(s, A.t().bfloat16()))
    thin = [torch.empty(9, 4, dtype=torch.bfloat16, device=device) for _ in range(2)]
    gradients([x], [A.t()], None, thin=thin[0])
    gradients([x], [A.t().bfloat16()], None, thin=thin[1])
    assert torch.equal(*thin)


@pytest.mark.parametrize("rank", [16, 32])
def test_gradients_of_wide_tensors(rank, device, monkeypatch):
    monkeypatch.setattr(low_rank, "shared_memory", lambda _device: 227 * 1024)
    inputs = {"dy": random(33, 8200), "factor": random(8200, rank, seed=1), "skinny": random(33, rank, seed=2)}

    def kernel(dy, factor, skinny):
        thin, gradient = torch.empty_like(skinny), torch.empty_like(factor)
        gradients([dy], [factor], skinny, 0.7, thin=thin, gradient=gradient)
        return thin, gradient

    assert_matches(
        kernel,
        lambda dy, factor, skinny: (dy @ factor * 0.7, dy.t() @ skinny * 0.7),
        inputs,
        dtype=torch.bfloat16,
        device=device,
    )


def test_writes_into_given_places(device):
    """A column slice of a wider thin tensor, a transposed float32 gradient, a wider output buffer."""
    dy, B, s = (t.bfloat16().to(device) for t in (random(40, 50), random(50, 4, seed=1), random(40, 4, seed=2)))
    thin = torch.zeros(40, 12, dtype=torch.bfloat16, device=device)
    dA = torch.zeros(4, 50, device=device)
    gradients([dy], [B], s, thin=thin[:, 4:8], gradient=dA.t())
    torch.testing.assert_close(thin[:, 4:8].float(), dy.float() @ B.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dA, s.float().t() @ dy.float(), rtol=1e-4, atol=1e-4)
    assert not thin[:, :4].any()
    assert not thin[:, 8:].any()
    buffer = torch.ones(40, 64, dtype=torch.bfloat16, device=device)
    widen(s, B, base=buffer[:, :50], out=buffer[:, :50])
    torch.testing.assert_close(buffer[:, :50].float(), 1 + s.float() @ B.float().t(), rtol=1e-2, atol=1e-2)
    assert (buffer[:, 50:] == 1).all()


def test_strided_rows(device):
    x, A = random(20, 80).bfloat16().to(device)[:, 8:72], random(4, 64, seed=1).bfloat16().to(device)
    torch.testing.assert_close(narrow(x, A), narrow(x.contiguous(), A))


def test_which_it_serves():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert low_rank.serves(x, 16)
    assert not low_rank.serves(x.float(), 16)
    assert not low_rank.serves(x, low_rank.MAX_RANK + 1)
    assert not low_rank.serves(x.t(), 16)
    assert not low_rank.serves(x[:0], 16)


def test_is_deterministic(device):
    dy, s = random(300, 64).bfloat16().to(device), random(300, 8, seed=1).bfloat16().to(device)
    first, second = (torch.empty(64, 8, device=device) for _ in range(2))
    gradients([dy], None, s, gradient=first)
    gradients([dy], None, s, gradient=second)
    assert torch.equal(first, second)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("rank", [8, 16, 48, 128])
def test_real_shapes(rank, dtype, gpu):
    rows, width = 2048, 4096
    x, A = {"x": random(rows, width), "A": random(rank, width, seed=1)}, random(rows, rank, seed=2)
    assert_matches(narrow, lambda x, A: x @ A.t(), x, dtype=dtype, device=gpu)
    inputs = {"dy": x["x"], "B": x["A"].t(), "s": A}

    def kernel(dy, B, s):
        thin, gradient = torch.empty_like(s), torch.empty_like(B)
        gradients([dy], [B], s, 2.0, thin=thin, gradient=gradient)
        return thin, gradient, widen(s, B, 2.0)

    def expected(dy, B, s):
        return dy @ B * 2.0, dy.t() @ s * 2.0, s @ B.t() * 2.0

    assert_matches(kernel, expected, inputs, dtype=dtype, device=gpu)


@pytest.mark.parametrize("read", [0, 16, None])
def test_parts_are_added_up_first_where_reading_them_takes_longer(read, device, monkeypatch):
    x, A = random(70, 96).to(device, torch.float16), random(16, 96, seed=1).to(device, torch.float16)
    # Three float32 parts for one number of 16 bits, of 70 rows.
    monkeypatch.setattr(low_rank, "FOLDED_BYTES", 70 * 16 * 10 - 1)
    parts = low_rank.narrow_parts(x, A, read=read, tile=SMALL, splits=3)
    assert parts.shape == (3 if read == 0 else 1, 70, 16)
    assert parts.dtype == (torch.float32 if read == 0 else torch.float16)
    torch.testing.assert_close(parts.sum(0, dtype=torch.float32).half(), low_rank.narrow(x, A, tile=SMALL, splits=3))

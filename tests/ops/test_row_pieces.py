"""Rows cut into pieces, and sums of partial sums."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import UnsupportedError
from pantheraml.kernels import _row_pieces
from pantheraml.kernels._row_pieces import row_pieces, sum_partials
from pantheraml.kernels.utils import MAX_THREADS, MAX_WIDTH, SHORT_TILE

WIDTHS = sorted({w + d for e in range(17) for w in (2**e, 3 * 2**e // 2) for d in (-1, 0, 1)} & set(range(1, 65537)))


@pytest.mark.parametrize("lanes", [32, 64])
def test_pieces_cover_a_row_and_fit_a_program(lanes):
    for width in WIDTHS:
        pieces = row_pieces(width, lanes=lanes)
        for size in (pieces.n, pieces.columns, pieces.rows, pieces.num_warps):
            assert size & (size - 1) == 0, (width, pieces)
        assert pieces.m & (pieces.m - 1) == 0
        assert pieces.m < pieces.n
        held = (pieces.n + pieces.m) * pieces.columns
        assert held >= width
        assert held < (1.5 if width > 1024 else 2) * width, f"{width}: lanes without a column"
        assert pieces.full == (pieces.n * pieces.columns <= width, held <= width)
        assert pieces.rows == 1 or pieces.elements <= SHORT_TILE
        threads = pieces.num_warps * lanes
        assert threads <= MAX_THREADS
        assert pieces.elements // threads <= _row_pieces.ELEMENTS_PER_THREAD or threads == MAX_THREADS, (width, pieces)


@pytest.mark.parametrize(
    ("width", "pieces"), [(2048, (2, 0, 1024)), (2304, (2, 1, 1024)), (2560, (2, 1, 1024)), (128, (1, 0, 128))]
)
def test_pieces_of_known_widths(width, pieces):
    assert row_pieces(width)[:3] == pieces


def test_tiles_are_fetched_ahead_only_into_shared_memory_that_is_there():
    for width in WIDTHS:
        pieces = row_pieces(width)
        for element_bytes in (4, 6, 8, 12):
            stages = pieces.stages(element_bytes)
            if stages > 1:
                held = (stages - 1) * pieces.elements * pieces.resident * element_bytes
                assert held <= _row_pieces.SHARED_BYTES
    assert row_pieces(4096).stages(4) == 3
    assert row_pieces(65536).stages(4) == 1


def test_too_wide():
    with pytest.raises(UnsupportedError, match="65537 elements are too wide"):
        row_pieces(MAX_WIDTH + 1, where="layer_norm")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float32,) * 2, (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("programs", [0, 1, 300])
@pytest.mark.parametrize("width", [1, 37, 64])
def test_sums(width, programs, dtypes, device):
    generator = torch.Generator().manual_seed(width + programs)
    partials = [torch.randn(programs, width, generator=generator).to(device) for _ in dtypes]
    sums = sum_partials(partials, dtypes)
    assert [total.dtype for total in sums] == list(dtypes)
    for total, partial in zip(sums, partials):
        expected = partial.double().sum(0).to(total.dtype)
        torch.testing.assert_close(total, expected, rtol=torch.finfo(total.dtype).eps, atol=1e-4)

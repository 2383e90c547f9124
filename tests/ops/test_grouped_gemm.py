"""Grouped products against float64 truth of the plain formulas."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ConfigError, UnsupportedError
from pantheraml.kernels import grouped_products
from pantheraml.kernels.grouped_gemm import grouped_gemm
from pantheraml.kernels.grouped_products import Tile
from pantheraml.kernels.reference import grouped_gemm as reference

from .support import DTYPES, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# By the kernels, which multiply 16-bit dtypes, and by whatever serves the device.
WAYS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float16), ("triton", torch.bfloat16), *(("auto", dtype) for dtype in DTYPES.values())],
    ids=["triton-fp16", "triton-bf16", *(f"auto-{name}" for name in DTYPES)],
)
# Empty groups first, last and in between; groups of one row, of whole tiles, and beyond one by a row.
ENDS = {
    "even": (4, 8, 12),
    "empty groups": (0, 7, 7, 13, 13),
    "one group": (5,),
    "no rows": (0, 0),
    "ragged": (1, 17, 33, 50, 50, 66),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a group and a matrix at the sizes of these tests."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(grouped_products, "TILE", Tile(16, 16, 16, 4, 2))


def tensors(ends, width=24, out=40, rank=4):
    groups = len(ends)
    return {
        "x": random(ends[-1], width),
        "weight": random(groups, out, width, seed=1, scale=0.3),
        "bias": random(groups, out, seed=4),
        "A": random(groups, rank, width, seed=2, scale=0.3),
        "B": random(groups, out, rank, seed=3, scale=0.3),
        "ends": torch.tensor(ends, dtype=torch.int32),
    }


def pair(backend, scaling=1.7):
    """The op and its specification, called with the tensors by name."""

    def of(op, **options):
        return lambda x, weight, ends, A=None, B=None, bias=None: op(
            x, weight, ends, A, B, scaling, bias=bias, **options
        )

    return of(grouped_gemm, backend=backend), of(reference.grouped_linear)


FORMS = {
    "adapters": ("x", "A", "B"),
    "adapters and bias": ("x", "A", "B", "bias"),
    "experts": ("x", "weight"),
    "experts and bias": ("x", "weight", "bias"),
    "everything": ("x", "weight", "A", "B", "bias"),
}


@WAYS
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("grad", FORMS.values(), ids=FORMS.keys())
def test_products_and_gradients(grad, ends, backend, dtype, device):
    inputs = {name: t for name, t in tensors(ends).items() if name in (*grad, "weight", "ends")}
    kernel, eager = pair(backend)
    assert_matches(kernel, eager, inputs, dtype=dtype, device=device, grad=grad)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_float32_adapters_and_transposed_experts(backend, device):
    inputs = tensors((3, 9))
    inputs["weight"] = inputs["weight"].transpose(1, 2).contiguous()
    inputs["B"] = inputs["B"].permute(1, 2, 0).contiguous()
    kernel, eager = pair(backend, 0.5)

    def strided(op):
        return lambda weight, B, **rest: op(weight=weight.transpose(1, 2), B=B.permute(2, 0, 1), **rest)

    keep = dict.fromkeys(("A", "B"), torch.float32)
    grad = ("x", "A", "B", "weight")
    assert_matches(strided(kernel), strided(eager), inputs, dtype=torch.bfloat16, device=device, grad=grad, keep=keep)


def test_rows_that_lie_apart(device):
    inputs = tensors((3, 9))
    kernel, eager = pair("triton")

    def sliced(op):
        return lambda x, **rest: op(x=torch.cat([x, x], 1)[:, : x.shape[1]], **rest)

    assert_matches(sliced(kernel), sliced(eager), inputs, dtype=torch.float16, device=device, grad=("x", "A"))


@pytest.mark.parametrize("trained", [("A", "B"), ("A",), ("B",), ("weight",), ("x",)], ids="+".join)
def test_only_what_is_asked_for_is_computed_and_kept(trained):
    inputs = {name: t.clone() for name, t in tensors((3, 9)).items()}
    for name in trained:
        inputs[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        kept: list[torch.Tensor] = []
        y = grouped_gemm(*(inputs[name] for name in ("x", "weight", "ends", "A", "B")))
    assert any(t is inputs["x"] for t in kept) == bool({"A", "weight"} & {*trained})
    y.sum().backward()
    assert [name for name in inputs if inputs[name].grad is not None] == sorted(trained, key=list(inputs).index)


def test_gradcheck():
    inputs = tensors((2, 2, 5), 3, 4, 2)
    leaves = tuple(inputs[name].requires_grad_() for name in ("x", "weight", "A", "B", "bias"))
    ends = inputs["ends"]
    op = lambda x, w, a, b, bias: grouped_gemm(x, w, ends, a, b, 0.7, bias=bias)  # noqa: E731
    assert torch.autograd.gradcheck(op, leaves)


X, WEIGHT, ENDS_2 = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.tensor([1, 4], dtype=torch.int32)
A, B = torch.zeros(2, 3, 8), torch.zeros(2, 6, 3)
WRONG = {
    "rank": (ConfigError, lambda: grouped_gemm(X[0], WEIGHT, ENDS_2)),
    "width": (ConfigError, lambda: grouped_gemm(X[:, :7], WEIGHT, ENDS_2)),
    "groups": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2[:1])),
    "A alone": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, A)),
    "B": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, A, B[:, :5])),
    "bias": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, bias=torch.zeros(6))),
    "float32 kernel": (UnsupportedError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, backend="triton")),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, call):
    with pytest.raises(error):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("rank", [4, 16], ids=["unaligned rank", "aligned rank"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_shapes(dtype, rank, backend, gpu):
    inputs = tensors((100, 100, 301, 512), 512, 768, rank)
    kernel, eager = pair(backend, 2.0)
    assert_matches(kernel, eager, inputs, dtype=dtype, device=gpu, grad=("x", "weight", "A", "B", "bias"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_tiles_of_chips_with_more_shared_memory(dtype, device, monkeypatch):
    module = grouped_products
    tiles = []
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "LARGE", Tile(32, 64, 32, 8, 3))
        monkeypatch.setattr(module, "shared_memory", lambda _: module.LARGE_SHARED)
    chosen = module._tile
    monkeypatch.setattr(module, "_tile", lambda *args: tiles.append(chosen(*args)) or tiles[-1])
    inputs = tensors((3, 9, 60), width=130, out=140)
    kernel, eager = pair("triton")
    assert_matches(kernel, eager, inputs, dtype=dtype, device=device, grad=("x", "weight", "A", "B", "bias"))
    # What is thin on one side stays with the small tile.
    assert len({tuple(tile) for tile in tiles}) == (2 if module.shared_memory(device) >= module.LARGE_SHARED else 1)

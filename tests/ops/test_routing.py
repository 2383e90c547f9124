"""Tokens to their experts and back, against float64 truth of the plain formulas."""

from __future__ import annotations

import sys

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError
from pantheraml.kernels.reference import grouped_gemm as reference
from pantheraml.kernels.routing import combine, permute, route, unpermute, weigh_

from .support import DTYPES, assert_error, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
BACKEND = pytest.mark.parametrize("backend", ["triton", "reference"])
EXPERTS = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 2], [0, 3]])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs a row at the sizes of these tests."""
    monkeypatch.setattr(sys.modules[combine.__module__], "BLOCK", 8)


def test_route():
    routing = route(EXPERTS, 5)
    flat = EXPERTS.reshape(-1)
    assert flat[routing.order].tolist() == sorted(flat.tolist())
    assert routing.ends.tolist() == [3, 3, 7, 10, 10]
    assert torch.equal(routing.order[routing.inverse], torch.arange(10))


@DTYPE
@BACKEND
@pytest.mark.parametrize("width", [8, 13, 1])
def test_permute_and_back(width, backend, dtype, device):
    def ours(x, weights, experts):
        routing = route(experts, 4)
        rows = permute(x, routing, backend=backend)
        return rows, unpermute(rows * 2, routing, weights, backend=backend)

    def eager(x, weights, experts):
        rows = reference.permute(x, experts)
        return rows, reference.unpermute(rows * 2, experts, weights)

    inputs = {"x": random(5, width), "weights": random(5, 2, seed=1), "experts": EXPERTS}
    assert_matches(ours, eager, inputs, dtype=dtype, device=device, grad=("x", "weights"))


@DTYPE
@BACKEND
def test_weighing_in_place(backend, dtype, device):
    left, right, weights = random(10, 21).to(dtype), random(10, 21, seed=1).to(dtype), random(5, 2, seed=2).to(dtype)
    order = route(EXPERTS, 4).order
    truth = [(left.double() * right.double()).sum(1), right.double() * weights.double().reshape(-1)[order][:, None]]
    memory = right.to(device, copy=True)
    dots = weigh_(left.to(device), memory, order.to(device), weights.to(device), backend=backend)
    assert dots.dtype == torch.float32
    assert_error("dots", dots.double().cpu(), truth[0].float().double(), truth[0], torch.float32)
    assert_error("weighed", memory.double().cpu(), truth[1].to(dtype).double(), truth[1], dtype)


@BACKEND
def test_no_tokens(backend, device):
    routing = route(torch.zeros(0, 2, dtype=torch.int64, device=device), 4)
    rows = permute(torch.zeros(0, 6, device=device), routing, backend=backend)
    assert unpermute(rows, routing, torch.zeros(0, 2, device=device), backend=backend).shape == (0, 6)
    assert routing.ends.tolist() == [0] * 4


X = torch.zeros(4, 8)
WRONG = {
    "experts in a row": (ConfigError, lambda: route(EXPERTS[0], 4)),
    "float experts": (ArgumentError, lambda: route(EXPERTS.float(), 4)),
    "other tokens": (ConfigError, lambda: permute(X, route(EXPERTS, 4))),
    "other weights": (ConfigError, lambda: unpermute(torch.zeros(10, 8), route(EXPERTS, 4), torch.ones(4, 2))),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, call):
    with pytest.raises(error):
        call()

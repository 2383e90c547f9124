"""Grouped products and routing against float64 truth of the plain formulas."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels.grouped_gemm import grouped_gemm, permute, route, unpermute
from pantheraml.kernels.reference import grouped_gemm as reference

from .support import DTYPES, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
ENDS = {"even": (4, 8, 12), "empty groups": (0, 7, 7, 13, 13), "one group": (5,), "no rows": (0, 0)}


def tensors(ends, width=16, out=24, rank=4):
    groups = len(ends)
    return {
        "x": random(ends[-1], width),
        "weight": random(groups, out, width, seed=1, scale=0.3),
        "A": random(groups, rank, width, seed=2, scale=0.3),
        "B": random(groups, out, rank, seed=3, scale=0.3),
        "ends": torch.tensor(ends, dtype=torch.int32),
    }


@DTYPE
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("grad", [("x", "A", "B"), ("x", "weight")], ids=["adapters", "experts"])
def test_products_and_gradients(grad, ends, dtype, device):
    inputs = tensors(ends)
    if "A" in grad:
        kernel = lambda x, weight, ends, A, B: grouped_gemm(x, weight, ends, A, B, 1.7)  # noqa: E731
        eager = lambda x, weight, ends, A, B: reference.lora_grouped_gemm(x, weight, ends, A, B, 1.7)  # noqa: E731
    else:
        del inputs["A"], inputs["B"]
        kernel, eager = grouped_gemm, reference.grouped_gemm
    assert_matches(kernel, eager, inputs, dtype=dtype, device=device, grad=grad)


def test_float32_adapters_and_transposed_experts(device):
    inputs = tensors((3, 9))
    inputs["weight"] = inputs["weight"].transpose(1, 2).contiguous()
    kernel, eager = (
        lambda x, weight, ends, A, B, op=op: op(x, weight.transpose(1, 2), ends, A, B, 0.5)
        for op in (grouped_gemm, reference.lora_grouped_gemm)
    )
    keep = dict.fromkeys(("A", "B"), torch.float32)
    assert_matches(kernel, eager, inputs, dtype=torch.bfloat16, device=device, grad=("x", "A", "B"), keep=keep)


EXPERTS = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 2], [0, 3]])


def test_route():
    routing = route(EXPERTS, 5)
    flat = EXPERTS.reshape(-1)
    assert flat[routing.order].tolist() == sorted(flat.tolist())
    assert routing.ends.tolist() == [3, 3, 7, 10, 10]
    assert torch.equal(routing.order[routing.inverse], torch.arange(10))


@DTYPE
def test_permute_and_back(dtype, device):
    def ours(x, weights, experts):
        routing = route(experts, 4)
        rows = permute(x, routing)
        return rows, unpermute(rows * 2, routing, weights)

    def eager(x, weights, experts):
        rows = reference.permute(x, experts)
        return rows, reference.unpermute(rows * 2, experts, weights)

    inputs = {"x": random(5, 12), "weights": random(5, 2, seed=1), "experts": EXPERTS}
    assert_matches(ours, eager, inputs, dtype=dtype, device=device, grad=("x", "weights"))


def test_whole_layer_equals_a_loop_over_tokens():
    inputs, choices = tensors((1, 2, 3, 4)), EXPERTS
    x, weights = random(5, 16), random(5, 2, seed=4)
    routing = route(choices, 4)
    y = unpermute(grouped_gemm(permute(x, routing), inputs["weight"], routing.ends), routing, weights)
    for token in range(5):
        parts = [weights[token, k] * (inputs["weight"][choices[token, k]] @ x[token]) for k in range(2)]
        torch.testing.assert_close(y[token], sum(parts))


def test_gradcheck():
    inputs = tensors((2, 2, 5), 3, 4, 2)
    leaves = tuple(inputs[name].requires_grad_() for name in ("x", "weight", "A", "B"))
    ends = inputs["ends"]
    assert torch.autograd.gradcheck(lambda x, w, a, b: grouped_gemm(x, w, ends, a, b, 0.7), leaves)


X, WEIGHT, ENDS_2 = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.tensor([1, 4], dtype=torch.int32)
A, B = torch.zeros(2, 3, 8), torch.zeros(2, 6, 3)
WRONG = {
    "width": (ConfigError, lambda: grouped_gemm(X[:, :7], WEIGHT, ENDS_2)),
    "groups": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2[:1])),
    "A alone": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, A)),
    "B": (ConfigError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, A, B[:, :5])),
    "kernel": (UnsupportedError, lambda: grouped_gemm(X, WEIGHT, ENDS_2, backend="triton")),
    "experts in a row": (ConfigError, lambda: route(EXPERTS[0], 4)),
    "float experts": (ArgumentError, lambda: route(EXPERTS.float(), 4)),
    "other tokens": (ConfigError, lambda: permute(X, route(EXPERTS, 4))),
    "other weights": (ConfigError, lambda: unpermute(torch.zeros(10, 8), route(EXPERTS, 4), torch.ones(4, 2))),
}


@pytest.mark.parametrize(("error", "call"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, call):
    with pytest.raises(error):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 16], ids=["unaligned rank", "aligned rank"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_shapes(dtype, rank, gpu):
    inputs = tensors((100, 100, 301, 512), 512, 768, rank)
    kernel, eager = (
        lambda x, weight, ends, A, B, op=op: op(x, weight, ends, A, B, 2.0)
        for op in (grouped_gemm, reference.lora_grouped_gemm)
    )
    assert_matches(kernel, eager, inputs, dtype=dtype, device=gpu, grad=("x", "weight", "A", "B"))

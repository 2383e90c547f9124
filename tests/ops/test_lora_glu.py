"""The activation with what adapters add around it, against float64 truth of the plain formulas."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import lora_glu
from pantheraml.kernels.glu import GluSpec
from pantheraml.kernels.lora_glu import Lift, lora_glu_backward, lora_glu_forward
from pantheraml.kernels.low_rank import Tile
from pantheraml.kernels.reference.glu import ACTIVATIONS, glu

from .support import assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# rows, width, rank, rank of the projection that follows: one tile and less, ragged ones, ranks that pad and that do not
SHAPES = pytest.mark.parametrize(
    ("rows", "width", "rank", "down_rank"),
    [(1, 16, 1, 1), (37, 97, 5, 20), (70, 160, 16, 16), (64, 64, 32, 7)],
    ids=str,
)
SMALL = Tile(16, 32, 4, 2)
SCALING = 0.7
PLAIN = GluSpec()


def inputs_of(rows, width, rank, down_rank):
    return {
        "gate": random(rows, width),
        "up": random(rows, width, seed=1),
        "thin": random(rows, 2 * rank, seed=2),
        "gate_factor": random(width, rank, seed=3, scale=rank**-0.5),
        "up_factor": random(width, rank, seed=4, scale=rank**-0.5),
        "down": random(down_rank, width, seed=5, scale=width**-0.5),
    }


def plain(gate, up, thin, gate_factor, up_factor, spec=PLAIN):
    rank = gate_factor.shape[1]
    g = gate + SCALING * thin[:, :rank] @ gate_factor.t()
    u = up + SCALING * thin[:, rank:] @ up_factor.t()
    return glu(g, u, spec.activation, limit=spec.limit, alpha=spec.alpha, up_offset=spec.up_offset)


def lift_of(thin, gate_factor, up_factor):
    return Lift(thin, gate_factor, up_factor, SCALING)


@DTYPE
@SHAPES
@pytest.mark.parametrize("wanted", ["activation", "thin", "both"])
def test_forward(wanted, rows, width, rank, down_rank, dtype, device):
    keep, with_down = wanted != "thin", wanted != "activation"

    def kernel(gate, up, down, **lift):
        out, sums = lora_glu_forward(
            gate, up, lift_of(**lift), down if with_down else None, GluSpec(), keep=keep, tile=SMALL, parts=2
        )
        assert (out is not None, sums is not None) == (keep, with_down)
        return out, None if sums is None else sums.sum(0).to(dtype)

    def expected(gate, up, down, **lift):
        out = plain(gate, up, **lift)
        return out if keep else None, out @ down.t() if with_down else None

    assert_matches(kernel, expected, inputs_of(rows, width, rank, down_rank), dtype=dtype, device=device)


def gradients(gate, up, dout, down, down_thin, spec=PLAIN, **lift):
    """Of gate, up and A, by autograd."""
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    with torch.enable_grad():
        out = plain(*leaves, **lift, spec=spec)
    found = torch.autograd.grad(out, leaves, dout if down_thin is None else dout + down_thin @ down)
    return *found, None if down_thin is None else down_thin.t() @ out.detach()


@DTYPE
@SHAPES
@pytest.mark.parametrize("with_down", [True, False], ids=["down", "no-down"])
def test_backward(with_down, rows, width, rank, down_rank, dtype, device):
    inputs = inputs_of(rows, width, rank, down_rank)
    inputs |= {"dout": random(rows, width, seed=6), "down_thin": random(rows, down_rank, seed=7)}

    def kernel(gate, up, dout, down, down_thin, **lift):
        following = (down_thin, down) if with_down else None
        grad = lora_glu_backward(dout, gate, up, lift_of(**lift), following, GluSpec(), tile=SMALL, parts=2)
        return gate, up, grad

    def expected(gate, up, dout, down, down_thin, **lift):
        return gradients(gate, up, dout, down, down_thin if with_down else None, **lift)

    assert_matches(kernel, expected, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, device):
    spec = GluSpec(activation, limit=0.9, up_offset=1.0, alpha=1.7 if activation == "silu" else None)
    inputs = inputs_of(20, 40, 4, 4) | {"dout": random(20, 40, seed=6), "down_thin": random(20, 4, seed=7)}

    def kernel(gate, up, dout, down, down_thin, **lift):
        out, sums = lora_glu_forward(gate, up, lift_of(**lift), down, spec)
        grad = lora_glu_backward(dout, gate, up, lift_of(**lift), (down_thin, down), spec)
        return out, sums.sum(0).to(out.dtype), gate, up, grad

    def expected(gate, up, dout, down, down_thin, **lift):
        out = plain(gate, up, **lift, spec=spec)
        return out, out @ down.t(), *gradients(gate, up, dout, down, down_thin, spec, **lift)

    # At the limit the gradient jumps: eager rounds what it compares before, and may be on the other side.
    assert_matches(kernel, expected, inputs, dtype=torch.float16, device=device)


def test_float32_masters_are_rounded_as_they_are_read_and_get_float32_gradients(device):
    inputs = {name: x.bfloat16().to(device) for name, x in inputs_of(33, 70, 4, 4).items()}
    dout, down_thin = random(33, 70, seed=6).bfloat16().to(device), random(33, 4, seed=7).bfloat16().to(device)
    results = []
    for masters in (torch.float32, torch.bfloat16):
        gate, up, thin = (inputs[name].clone() for name in ("gate", "up", "thin"))
        first, second, down = (inputs[name].to(masters) for name in ("gate_factor", "up_factor", "down"))
        lift = Lift(thin, first, second, SCALING)
        out, sums = lora_glu_forward(gate, up, lift, down, GluSpec())
        grad = lora_glu_backward(dout, gate, up, lift, (down_thin, down), GluSpec(), dtype=torch.float32)
        assert grad.dtype == torch.float32
        results.append((out, sums, gate, up, grad))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_rows_may_lie_apart(device):
    """Halves of a wider tensor, and columns of the thin products of more projections."""
    inputs = {name: x.half().to(device) for name, x in inputs_of(20, 48, 4, 4).items()}
    packed = torch.cat([inputs["gate"], inputs["up"]], 1)
    thin = torch.cat([inputs["thin"], inputs["thin"]], 1)[:, 8:]
    dout = random(20, 96, seed=6).half().to(device)[:, :48]
    results = []
    for gate, up, t, d in (
        (inputs["gate"], inputs["up"], inputs["thin"], dout.contiguous()),
        (packed[:, :48], packed[:, 48:], thin, dout),
    ):
        lift = Lift(t, inputs["gate_factor"], inputs["up_factor"], SCALING)
        forward = lora_glu_forward(gate, up, lift, inputs["down"], GluSpec())
        lora_glu_backward(d, gate, up, lift, None, GluSpec())
        results.append((*forward, gate, up))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_one_thin_product_for_both(device):
    """As of a projection that makes gate and up: its thin product twice, and the halves of its factor."""
    inputs = {name: x.half().to(device) for name, x in inputs_of(20, 48, 4, 4).items()}
    thin, dout = inputs["thin"][:, :4].contiguous(), random(20, 48, seed=6).half().to(device)
    results = []
    for t in (thin, torch.cat([thin, thin], 1)):
        gate, up = inputs["gate"].clone(), inputs["up"].clone()
        lift = Lift(t, inputs["gate_factor"], inputs["up_factor"], SCALING)
        forward = lora_glu_forward(gate, up, lift, inputs["down"], PLAIN)
        lora_glu_backward(dout, gate, up, lift, None, PLAIN)
        results.append((*forward, gate, up))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_programs_fill_the_chip():
    """112 blocks of columns on 132 processors: one part leaves 15 % of them idle for the whole time."""
    parts = lora_glu._parts(112, 132, 256)
    programs = 112 * parts
    assert parts > 1
    assert programs / (-(-programs // 132) * 132) > 0.95
    assert lora_glu._parts(112, 132, 1) == 1

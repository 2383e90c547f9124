"""Rotary embedding against float64 truth.

Head widths: 2 (smallest), 6 and 34 (half no power of two), 64, 80 with 32 turned (Phi), 128, 512. Heads: one, three,
more than a program takes at a time, and fewer for k than for q.
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError
from pantheraml.kernels import rotary
from pantheraml.kernels.reference.rotary import rotary as reference
from pantheraml.kernels.rotary import MAX_BLOCKS, token_settings
from pantheraml.kernels.utils import LANES, MAX_THREADS

from .support import DTYPES, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUT = pytest.mark.parametrize("layout", ["half", "interleaved"])
HEAD_AXIS = pytest.mark.parametrize("head_axis", [1, 2], ids=["BHTD", "BTHD"])
# B, q heads, k heads, T, D, R
SHAPES = {
    "smallest": (1, 1, 1, 1, 2, 2),
    "odd": (2, 3, 1, 5, 6, 6),
    "partial": (1, 4, 2, 3, 80, 32),
    "half-17": (2, 5, 5, 3, 34, 34),
    "many-heads": (1, 33, 11, 2, 64, 64),
    "gqa-128": (2, 4, 1, 3, 128, 128),
    "blocks-of-q-and-k": (1, 9, 5, 2, 512, 512),
}


def both(**options):
    return (
        lambda q, k, cos, sin, **named: rotary(q, k, cos, sin, **options, **named, backend="triton"),
        lambda q, k, cos, sin, **named: reference(q, k, cos, sin, **options, **named),
    )


def inputs_of(batch, q_heads, k_heads, length, width, turned, *, head_axis=1, angles=None):
    def make(heads, seed):
        shape = (heads, length) if head_axis == 1 else (length, heads)
        return random(batch, *shape, width, seed=seed)

    angle = random(*(angles or (batch, length)), turned, seed=9, scale=3.0)
    # independent in both halves, so that swapping them would show
    return {"q": make(q_heads, 0), "k": make(k_heads, 1), "cos": angle.cos(), "sin": angle.sin()}


@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients(shape, layout, dtype, device):
    inputs = inputs_of(*shape)
    assert_matches(*both(layout=layout), inputs, dtype=dtype, device=device, grad=("q", "k"))


@LAYOUT
@HEAD_AXIS
def test_head_axis(head_axis, layout, device):
    inputs = inputs_of(2, 3, 2, 5, 16, 8, head_axis=head_axis)
    options = {"layout": layout, "head_axis": head_axis}
    assert_matches(*both(**options), inputs, dtype=torch.bfloat16, device=device, grad=("q", "k"))


@pytest.mark.parametrize("angles", [(5,), (1, 5), (2, 5)], ids=str)
def test_shapes_of_cos(angles, device):
    inputs = inputs_of(2, 3, 2, 5, 16, 16, angles=angles)
    assert_matches(*both(), inputs, dtype=torch.float32, device=device, grad=("q", "k"))


def test_float32_angles(device):
    inputs = inputs_of(2, 3, 2, 5, 16, 16)
    keep = {"cos": torch.float32, "sin": torch.float32}
    assert_matches(*both(), inputs, dtype=torch.bfloat16, device=device, grad=("q", "k"), keep=keep)


@DTYPE
@LAYOUT
@pytest.mark.parametrize("positions", [(5,), (1, 5), (2, 5)], ids=str)
def test_position_ids_of_packed_documents(positions, layout, dtype, device):
    ids = torch.tensor([0, 1, 2, 0, 1]).expand(positions).clone()
    ids[..., -1] = 9
    inputs = inputs_of(2, 3, 2, 5, 16, 8, angles=(10,)) | {"position_ids": ids}
    assert_matches(*both(layout=layout), inputs, dtype=dtype, device=device, grad=("q", "k"))


@LAYOUT
@pytest.mark.parametrize("batch", [1, 2], ids=["shared", "per-row"])
def test_sections(batch, layout, device):
    inputs = inputs_of(2, 3, 2, 5, 24, 16, angles=(3, batch, 5))
    options = {"layout": layout, "sections": (2, 3, 3)}
    assert_matches(*both(**options), inputs, dtype=torch.bfloat16, device=device, grad=("q", "k"))


def test_sections_with_position_ids(device):
    ids = torch.randint(0, 10, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(2, 3, 2, 5, 16, 16, angles=(10,)) | {"position_ids": ids.int()}
    assert_matches(*both(sections=(2, 3, 3)), inputs, dtype=torch.float32, device=device, grad=("q", "k"))


def test_sections_choose_the_position_axis():
    cos = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 1, 8)
    q, _ = reference(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8), cos, torch.zeros_like(cos), sections=(1, 2, 1))
    assert q.flatten().tolist() == [0, 1, 1, 2, 0, 1, 1, 2]


STRIDED = {
    # [B, T, (Hq + Hk) D] as a fused projection gives it
    "packed-projection": (lambda x: [p.transpose(1, 2) for p in x.view(2, 5, 6, 16).split((4, 2), dim=2)], 2 * 5 * 96),
    "channels-apart": (lambda x: [x.view(2, 4, 5, 24)[..., ::2][..., :8], x.view(2, 4, 5, 24)[:, :2, :, :8]], 960),
    "expanded-heads": (lambda x: [x.view(2, 1, 5, 8).expand(2, 4, 5, 8), x.view(2, 1, 5, 8)], 80),
}


@LAYOUT
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_inputs(view, layout, device):
    split, size = view
    kernel, expected = (lambda x, cos, sin, op=op: op(*split(x), cos, sin) for op in both(layout=layout))
    inputs = {"x": random(size), "cos": random(5, 8), "sin": random(5, 8, seed=1)}
    assert_matches(kernel, expected, inputs, dtype=torch.bfloat16, device=device, grad=("x",))


def test_expanded_and_mismatched_angles(device):
    q, k, _, _ = (t.float().to(device) for t in inputs_of(2, 2, 1, 5, 8, 8).values())
    cos, sin = (random(8, 5, seed=s).float().to(device).t().expand(2, 5, 8) for s in (2, 3))
    sin = sin.contiguous()
    for ours, expected in zip(rotary(q, k, cos, sin, backend="triton"), reference(q, k, cos, sin)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_keeps_the_memory_layout(device):
    q = torch.zeros(2, 5, 3, 8, device=device).transpose(1, 2)
    cos = torch.ones(5, 8, device=device)
    assert rotary(q, q, cos, cos, backend="triton")[0].stride() == q.stride()


@LAYOUT
def test_backward_undoes_a_rotation(layout, device):
    angle = random(5, 4, scale=3.0).float()
    angle = (torch.cat((angle, angle), -1) if layout == "half" else angle.repeat_interleave(2, -1)).to(device)
    q = random(1, 2, 5, 8).float().to(device).requires_grad_()
    turned, _ = rotary(q, q.detach(), angle.cos(), angle.sin(), layout=layout, backend="triton")
    turned.backward(turned.detach())
    torch.testing.assert_close(q.grad, q.detach(), rtol=1e-5, atol=1e-5)


class TestInPlace:
    @pytest.mark.parametrize("backend", ["triton", "reference"])
    def test_overwrites_and_differentiates(self, backend, device):
        leaves = {name: t.float().to(device) for name, t in inputs_of(2, 3, 2, 5, 16, 8).items()}
        cos, sin = leaves.pop("cos"), leaves.pop("sin")
        gradients = []
        for inplace in (True, False):
            q, k = (t.clone().requires_grad_() for t in leaves.values())
            held = [q * 1.0, k * 1.0]
            if inplace:
                results = rotary(*held, cos, sin, inplace=True, backend=backend)
                assert [r.data_ptr() for r in results] == [h.data_ptr() for h in held]
            else:
                results = reference(*held, cos, sin)
            gradients.append([*results, *torch.autograd.grad([r.sin().sum() for r in results], (q, k))])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)

    def test_a_producer_that_kept_the_values_notices(self, device):
        leaf = torch.ones(1, 1, 2, 4, device=device, requires_grad=True)
        cos = torch.ones(2, 4, device=device)
        q = leaf.exp()
        result, _ = rotary(q, torch.zeros_like(leaf), cos, cos, inplace=True, backend="triton")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()

    def test_refuses_a_leaf_and_gaps(self, device):
        leaf = torch.ones(1, 1, 2, 4, device=device, requires_grad=True)
        cos = torch.ones(2, 4, device=device)
        with pytest.raises(UnsupportedError, match="leaf"):
            rotary(leaf, leaf, cos, cos, inplace=True)
        gaps = torch.ones(1, 1, 2, 8, device=device)[..., ::2]
        with pytest.raises(ConfigError, match="contiguous last dimension"):
            rotary(gaps, gaps, cos, cos, inplace=True)


@pytest.mark.parametrize("heads", [(1, 1), (8, 4), (24, 1), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("pairs", [1, 16, 64, 128, 512, 4096])
def test_a_program_takes_all_heads_in_few_blocks(pairs, heads):
    settings = token_settings(*heads, pairs)
    assert settings.heads * settings.q_blocks >= heads[0]
    assert settings.heads * settings.k_blocks >= heads[1]
    threads = settings.num_warps * LANES
    assert threads <= MAX_THREADS
    assert settings.q_blocks + settings.k_blocks <= MAX_BLOCKS + 1 or threads == MAX_THREADS


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8, 8), (2, 2, 1, 0, 8, 8)], ids=["no-batch", "no-tokens"])
def test_empty(shape, device):
    inputs = {name: t.float().to(device) for name, t in inputs_of(*shape).items()}
    q, k = rotary(**inputs, backend="triton")
    assert (q.shape, k.shape) == (inputs["q"].shape, inputs["k"].shape)


@LAYOUT
def test_reference_gradcheck(layout):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 6, 4).values()
    leaves = [q.requires_grad_(), k.requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k: reference(q, k, cos, sin, layout=layout), leaves)


def test_refusals(device):
    q, cos = torch.zeros(2, 3, 5, 8, device=device), torch.zeros(5, 8, device=device)
    cases = [
        ((q, q[:1], cos, cos), {}, ConfigError, "k of shape"),
        ((q[0], q[0], cos, cos), {}, ConfigError, "four dimensions"),
        ((q, q.half(), cos, cos), {}, ArgumentError, "float16"),
        ((q, q, cos, cos[:, :4]), {}, ConfigError, "sin of shape"),
        ((q, q, cos[:4], cos[:4]), {}, ConfigError, "cos of leading shape"),
        ((q, q, cos[:, :7], cos[:, :7]), {}, ConfigError, "7 channels"),
        ((q, q, cos, cos), {"layout": "neox"}, ConfigError, "layout"),
        ((q, q, cos, cos), {"head_axis": 3}, ConfigError, "axis 1 or 2"),
        ((q, q, cos, cos), {"sections": (1, 1)}, ConfigError, "three sections"),
        ((q, q, cos, cos), {"position_ids": torch.zeros(2, 4, device=device).long()}, ConfigError, "position_ids"),
        ((q, q, cos.clone().requires_grad_(), cos), {}, UnsupportedError, "no gradient for cos"),
    ]
    for args, options, error, message in cases:
        with pytest.raises(error, match=message):
            rotary(*args, **options)


@pytest.mark.gpu
@DTYPE
@LAYOUT
def test_real_sizes(layout, dtype, gpu):
    inputs = inputs_of(2, 32, 8, 1021, 128, 128)
    assert_matches(*both(layout=layout), inputs, dtype=dtype, device=gpu, grad=("q", "k"))


@pytest.mark.gpu
@HEAD_AXIS
def test_more_than_two_to_the_31_elements(head_axis, gpu):
    length = 2**31 // (31 * 128) + 3  # the last head alone lies beyond
    shape = (1, 32, length, 128) if head_axis == 1 else (1, length, 32, 128)
    q = torch.randn(shape, device=gpu, dtype=torch.bfloat16)
    angle = torch.randn(length, 128, device=gpu)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    last = q.narrow(3 - head_axis, length - 4, 4)
    expected, _ = reference(last, last.narrow(head_axis, 0, 1), cos[-4:], sin[-4:], head_axis=head_axis)
    turned, _ = rotary(q, q.narrow(head_axis, 0, 1), cos, sin, head_axis=head_axis, inplace=False, backend="triton")
    torch.testing.assert_close(turned.narrow(3 - head_axis, length - 4, 4), expected, rtol=2e-2, atol=2e-2)

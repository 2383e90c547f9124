"""Head norms and rotary in one launch against float64 truth, over the shapes of the rotary tests."""

from __future__ import annotations

import importlib

import pytest
import torch

from pantheraml.errors import ConfigError
from pantheraml.kernels import qk_norm_rotary, rms_norm, rotary
from pantheraml.kernels.reference.rotary import qk_norm_rotary as reference

from .support import DTYPES, assert_matches, random
from .test_rotary import SHAPES
from .test_rotary import inputs_of as angles_and_heads

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUT = pytest.mark.parametrize("layout", ["half", "interleaved"])
GRAD = ("q", "k", "q_weight", "k_weight")


def both(**options):
    return (
        lambda **named: qk_norm_rotary(**options, **named, backend="triton"),
        lambda **named: reference(**options, **named),
    )


def inputs_of(*shape, **options):
    width = shape[4]
    weights = {"q_weight": random(width, seed=3), "k_weight": random(width, seed=4)}
    return angles_and_heads(*shape, **options) | weights


@LAYOUT
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients(shape, layout, device):
    assert_matches(*both(layout=layout), inputs_of(*shape), dtype=torch.float32, device=device, grad=GRAD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@LAYOUT
def test_sixteen_bits(layout, dtype, device):
    assert_matches(*both(layout=layout), inputs_of(*SHAPES["partial"]), dtype=dtype, device=device, grad=GRAD)


@DTYPE
@pytest.mark.parametrize("head_axis", [1, 2], ids=["BHTD", "BTHD"])
def test_gemma_and_head_axis(head_axis, dtype, device):
    inputs = inputs_of(2, 3, 2, 5, 16, 8, head_axis=head_axis)
    options = {"offset": 1.0, "eps": 1e-5, "head_axis": head_axis}
    assert_matches(*both(**options), inputs, dtype=dtype, device=device, grad=GRAD)


@pytest.mark.parametrize("grad", [("q", "k"), ("q", "k_weight")], ids="+".join)
def test_only_what_is_trained(grad, device):
    assert_matches(*both(), inputs_of(2, 3, 2, 5, 16, 16), dtype=torch.float32, device=device, grad=grad)


def test_weights_sum_over_several_programs(monkeypatch, device):
    module = importlib.import_module("pantheraml.kernels.qk_norm_rotary")
    monkeypatch.setattr(module, "persistent_programs", lambda *_: 7)
    assert_matches(*both(), inputs_of(2, 5, 3, 7, 16, 8), dtype=torch.float32, device=device, grad=GRAD)


def test_positions_and_sections(device):
    ids = torch.tensor([0, 1, 2, 0, 1]).expand(3, 2, 5).clone()
    ids[1:, :, -1] = 7
    inputs = inputs_of(2, 3, 2, 5, 24, 16, angles=(10,)) | {"position_ids": ids}
    assert_matches(*both(sections=(2, 3, 3)), inputs, dtype=torch.bfloat16, device=device, grad=GRAD)


def test_views_of_one_projection(device):
    def split(op):
        def call(x, **named):
            q, k = (part.transpose(1, 2) for part in x.view(2, 5, 6, 16).split((4, 2), dim=2))
            return op(q=q, k=k, **named)

        return call

    inputs = inputs_of(2, 4, 2, 5, 16, 8)
    inputs = {"x": random(2 * 5 * 96)} | {name: inputs[name] for name in ("q_weight", "k_weight", "cos", "sin")}
    ours, expected = (split(op) for op in both())
    assert_matches(ours, expected, inputs, dtype=torch.bfloat16, device=device, grad=("x", "q_weight", "k_weight"))


def test_is_the_two_ops_in_turn(device):
    tensors = {name: t.float().to(device) for name, t in inputs_of(2, 3, 2, 5, 16, 8).items()}
    q, k = (rms_norm(tensors[n], tensors[f"{n}_weight"], 1e-6, backend="triton") for n in ("q", "k"))
    expected = rotary(q, k, tensors["cos"], tensors["sin"], backend="triton")
    torch.testing.assert_close(qk_norm_rotary(**tensors, backend="triton"), expected, rtol=1e-5, atol=1e-6)


def test_is_deterministic(device):
    def gradients():
        leaves = {n: t.bfloat16().to(device) for n, t in inputs_of(1, 3, 1, 5, 16, 8).items()}
        wanted = [leaves[name].requires_grad_() for name in GRAD]
        q, k = qk_norm_rotary(**leaves, backend="triton")
        return torch.autograd.grad(q.float().square().sum() + k.float().sum(), wanted)

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients()))


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8, 8), (2, 2, 1, 0, 8, 8)], ids=["no-batch", "no-tokens"])
def test_empty(shape, device):
    inputs = {name: t.float().to(device).requires_grad_(name in GRAD) for name, t in inputs_of(*shape).items()}
    q, k = qk_norm_rotary(**inputs, backend="triton")
    (q.sum() + k.sum()).backward()
    assert not inputs["q_weight"].grad.any()


def test_reference_gradcheck():
    inputs = inputs_of(1, 2, 1, 3, 6, 4)
    names = list(inputs)
    leaves = [inputs[name].requires_grad_(name in GRAD) for name in names]
    assert torch.autograd.gradcheck(lambda *values: reference(**dict(zip(names, values))), leaves)


def test_refuses_a_weight_of_another_width(device):
    tensors = {name: t.float().to(device) for name, t in inputs_of(1, 2, 1, 3, 8, 8).items()}
    with pytest.raises(ConfigError, match="k_weight of shape"):
        qk_norm_rotary(**(tensors | {"k_weight": torch.ones(4, device=device)}))


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("widths", [(128, 128), (256, 256), (80, 32)], ids=str)
def test_real_sizes(widths, dtype, gpu):
    inputs = inputs_of(2, 32, 8, 509, *widths)
    assert_matches(*both(), inputs, dtype=dtype, device=gpu, grad=GRAD)

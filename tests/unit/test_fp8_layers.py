"""The linear layer that holds its weight in fp8, and the 4-bit one that multiplies in fp8."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pantheraml.kernels.fp8_linear import Fp8Weight, Nf4Fp8Weight
from pantheraml.models.layers.fp8 import Fp8Linear
from pantheraml.models.layers.lora import base_weight

BLOCK = pytest.mark.parametrize("block", [False, True], ids=["rows", "tiles"])


def layer(*, block=False, dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    module = Fp8Linear(160, 272, bias, block=block, compute_dtype=dtype)
    dense = module.weight.detach().clone()
    for name, tensor in module.quantize(dense).items():
        setattr(module, name, tensor)
    return module, dense


@BLOCK
def test_state_dict_has_stock_names_and_the_usual_layout(block):
    module, dense = layer(block=block)
    state = module.state_dict()
    scale = "weight_scale_inv" if block else "weight_scale"
    assert list(state) == ["weight", "bias", scale]
    assert (state["weight"].dtype, state["weight"].shape) == (torch.float8_e4m3fn, (272, 160))
    assert (state[scale].dtype, state[scale].shape) == (torch.float32, (3, 2) if block else (272, 1))
    spread = state[scale].repeat_interleave(128, 0)[:272].repeat_interleave(128, 1)[:, :160] if block else state[scale]
    assert ((state["weight"].float() * spread - dense).abs() <= dense.abs() / 16 + state[scale].max() * 2**-10).all()
    other = layer(block=block)[0]
    other.load_state_dict(state)
    assert torch.equal(other.dense_weight(), module.dense_weight())


@BLOCK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient(block, dtype):
    module, _ = layer(block=block, dtype=dtype)
    x = torch.randn(2, 5, 160, dtype=dtype, requires_grad=True)
    y = module(x)
    expected = nn.functional.linear(x, module.dense_weight(), module.bias)
    assert y.dtype == dtype
    assert 0.005 * expected.norm() < (y - expected).norm() < 0.04 * expected.norm()
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (truth,) = torch.autograd.grad(expected.sum(), x)
    assert (gradient - truth).norm() < 0.04 * truth.norm()
    (bias,) = torch.autograd.grad(y.sum(), module.bias)
    torch.testing.assert_close(bias, torch.full_like(bias, 10.0))


def test_result_has_the_dtype_of_a_stock_layer():
    module, _ = layer(dtype=torch.bfloat16)
    x = torch.randn(3, 160)
    assert module(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@BLOCK
def test_casting_a_model_leaves_fp8_alone(block):
    module, _ = layer(block=block)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to(torch.float32)
    after = module.state_dict()
    assert after["bias"].dtype == torch.float32
    for name in (module.scale_name, "weight"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].float(), before[name].float())
    module.half()
    assert module._buffers[module.scale_name].dtype == torch.float32
    assert module(torch.randn(2, 160)).shape == (2, 272)


@BLOCK
def test_unpacking_and_back_is_exact(block):
    module, _ = layer(block=block)
    before = copy.deepcopy(module.state_dict())
    dense = module.dense_weight()
    module.unpack()
    module.unpack()
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.weight, dense)
    x = torch.randn(3, 160, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), nn.functional.linear(x, dense, module.bias))
    module.weight.data += 1
    module.to(torch.bfloat16)
    module.pack()
    module.pack()
    assert module.state_dict().keys() == before.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float())
    assert not module.weight.requires_grad


def test_copies_do_not_share_the_weight():
    module, _ = layer()
    module.fp8_weight()
    other = copy.deepcopy(module)
    other.weight.data.view(torch.uint8).zero_()
    x = torch.randn(2, 160, dtype=torch.bfloat16)
    torch.testing.assert_close(other(x), module.bias.expand(2, -1))
    assert not torch.equal(module(x), other(x))


def test_it_is_recognised():
    module, _ = layer()
    assert isinstance(base_weight(module), Fp8Weight)
    assert base_weight(module) is base_weight(module)
    module.requires_grad_(True)
    assert isinstance(base_weight(module), Fp8Weight)
    module.unpack()
    assert base_weight(module) is module.weight
    handle = module.register_forward_hook(lambda *_: None)
    assert base_weight(module) is None
    handle.remove()


def test_four_bit_layers_that_fit_multiply_in_fp8():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from pantheraml.models.layers.fp8_four_bit import Linear4bitFp8, multiply_in_fp8

    def four_bit(width):
        torch.manual_seed(0)
        stock = bitsandbytes.nn.Linear4bit(width, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
        stock.weight = bitsandbytes.nn.Params4bit(torch.randn(96, width), requires_grad=False, quant_type="nf4")
        return stock.to("cpu")

    model = nn.ModuleList([four_bit(192), four_bit(176), nn.Linear(64, 64)])
    x = torch.randn(4, 192, dtype=torch.bfloat16)
    expected = model[0](x)
    assert multiply_in_fp8(model) == 1
    assert type(model[0]) is Linear4bitFp8
    assert type(model[1]).__name__ == "Linear4bit"
    y = model[0](x)
    assert isinstance(base_weight(model[0]), Nf4Fp8Weight)
    assert 0.005 * expected.norm() < (y - expected).norm() < 0.06 * expected.norm()

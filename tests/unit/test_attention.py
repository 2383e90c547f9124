"""The registered attention gives stock sdpa's numbers, and skips the mask only where no real token can tell."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from torch.nn.attention import SDPBackend

from pantheraml.device import Device
from pantheraml.models import attention

IDS = torch.arange(3, 43).view(4, 10)
RIGHT = torch.tensor([[1] * 10, [1] * 7 + [0] * 3, [1] * 10, [1] + [0] * 9])
LEFT = RIGHT.flip(1)


def loss_and_gradients(model, mask):
    model.zero_grad()
    loss = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mask", [torch.ones_like(RIGHT), RIGHT, LEFT], ids=["full", "right padded", "left padded"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_loss_and_gradients_equal_stock(family, mask):
    model = make_tiny(family, **({"sliding_window": 4} if family == "mistral" else {}))
    expected_loss, expected = loss_and_gradients(model, mask)
    model.set_attn_implementation(attention.register())
    loss, got = loss_and_gradients(model, mask)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7)


def test_the_mask_is_skipped_for_right_padding_only():
    def build(mask, **kwargs):
        return attention.attention_mask(4, 10, 10, attention_mask=mask.bool(), **kwargs)

    assert build(RIGHT) is None
    assert build(LEFT) is not None
    assert build(RIGHT, local_size=4) is not None
    assert build(RIGHT, allow_is_causal_skip=False) is not None
    assert build(torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1, 1]] * 4)) is not None


def test_packed_documents_stay_apart():
    model = make_tiny("llama")
    model.set_attn_implementation(attention.register())
    a, b = IDS[:1, :6], IDS[1:2, :4]
    packed = torch.cat([a, b], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(input_ids=a).logits, model(input_ids=b).logits], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def chip(capability):
    return Device("cuda", "cuda", 0, 1, "test", capability, 1, True, True, True)


def test_the_table_prefers_cudnn_on_hopper_and_never_asks_half_precision_kernels_for_fp32():
    assert attention.backend_order(chip((9, 0)), 128, torch.bfloat16)[0] is SDPBackend.CUDNN_ATTENTION
    assert attention.backend_order(chip((9, 0)), 512, torch.bfloat16)[0] is SDPBackend.FLASH_ATTENTION
    assert attention.backend_order(chip((8, 0)), 128, torch.bfloat16)[0] is SDPBackend.FLASH_ATTENTION
    assert attention.backend_order(chip((9, 0)), 128, torch.float32) == [
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]


def test_a_cpu_model_keeps_stock_sdpa():
    model = make_tiny("llama")
    assert attention.prefer(model) is False
    assert model.config._attn_implementation == "sdpa"

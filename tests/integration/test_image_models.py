"""Models that see images train alike, stock and adapted: sections of rotary angles, features added between layers."""

from __future__ import annotations

import copy

import pytest
import torch
from test_architecture_sweep import compare, with_lora
from transformers import AutoConfig, AutoModelForImageTextToText

from pantheraml.models.adapt import adapt
from pantheraml.models.layers import decoder

IMAGE, START, END = 120, 122, 123
TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
DEEP = {
    "depth": 3, "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen2_vl": ({"depth": 2, "embed_dim": 32, "mlp_ratio": 2}, {}),
    "qwen2_5_vl": (
        {"depth": 2, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]},
        {},
    ),
    "qwen3_vl": (DEEP, {}),
    "qwen3_vl_moe": (DEEP, EXPERTS),
}


def tiny(family):
    vision, text = FAMILIES[family]
    config = AutoConfig.for_model(
        family,
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=121,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def run(model):
    """Loss, gradients and logits of a text around one image of 4 x 4 patches."""
    ids = torch.tensor([[5, 6, START, *[IMAGE] * 4, END, 7, 8, 9, 10]])
    labels = ids.masked_fill(ids >= IMAGE, -100)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    output = model(
        input_ids=ids,
        labels=labels,
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == IMAGE).int(),
        use_cache=False,
    )
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients, output.logits


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_among_the_text(family, trained, monkeypatch):
    nodes = []
    original = decoder.decoder_layer
    monkeypatch.setattr(decoder, "decoder_layer", lambda *args: nodes.append(args) or original(*args))
    model = tiny(family) if trained == "full" else with_lora(tiny(family))
    stock = run(copy.deepcopy(model))
    assert any("visual" in name for name in stock[1]) == (trained == "full")
    report = adapt(model)
    compare(family, stock, run(model))
    if family == "qwen3_vl_moe":
        assert any(entry.role == "experts" for entry in report.swapped)
    else:
        assert len(nodes) == TEXT["num_hidden_layers"]

"""Families whose layers are state spaces, linear attention or convolutions: alike with stock from loading to saving."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(3, 30)[None]
MOE = {"num_experts_per_tok": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
QWEN_MOE = {**MOE, **LINEAR, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
GRANITE = {**MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 128}
FAMILIES = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MOE, **GRANITE, "num_local_experts": 4},
    "granitemoehybrid-dense": {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "jamba": {
        **MOE, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "nemotron_h": {
        **MOE, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
        "head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
    },
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": QWEN_MOE,
    "qwen3_5_text": LINEAR,
    "qwen3_next": QWEN_MOE,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


def built(family):
    """A small model of a family, in evaluation."""
    model = make_tiny(family.partition("-")[0], **FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            # Families start many weights at zero or one, which would hide an error.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_tokenizer):
    """A folder for each family, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            built(family).save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder, **options):
    return FastLanguageModel.from_pretrained(
        folder, **{"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 64, **options}
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits + 0


@each_family
def test_loaded_as_by_transformers(folders, family):
    # Some of these have an infinity in their configuration, for which JSON has no number.
    model, _ = load(folders(family))
    due = stock(folders(family))
    assert model.config.to_dict() == due.config.to_dict()
    torch.testing.assert_close(logits(model), logits(due), rtol=1e-5, atol=1e-5)

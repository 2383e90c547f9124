"""Names that an adapter goes on: scopes, layers and signatures."""

from __future__ import annotations

import inspect

import pytest
from conftest import make_tiny

from pantheraml.models.loader import FastLanguageModel, FastModel
from pantheraml.models.targets import EVERYTHING, Scopes, choose_layers, linear_modules, resolve_targets


@pytest.mark.parametrize(
    ("name", "scopes", "allowed"),
    [
        ("model.layers.0.self_attn.q_proj", Scopes(), True),
        ("model.layers.0.self_attn.q_proj", Scopes(attention=False), False),
        ("model.layers.0.self_attn.q_proj", Scopes(language=False), False),
        ("model.layers.0.mlp.up_proj", Scopes(mlp=False), False),
        ("model.layers.0.mlp.up_proj", Scopes(attention=False), True),
        ("model.vision_tower.layers.0.self_attn.q_proj", Scopes(), False),
        ("model.vision_tower.layers.0.self_attn.q_proj", EVERYTHING, True),
        ("model.visual.blocks.0.attn.qkv", Scopes(vision=True, language=False), True),
        ("model.audio_tower.layers.0.fc1", Scopes(), False),
        ("model.audio_tower.layers.0.fc1", Scopes(audio=True), True),
        ("model.layers.0.mamba.in_proj", Scopes(mlp=False), True),
        ("model.layers.0.mamba.in_proj", Scopes(mlp=False, attention=False), False),
        ("transformer.h.0.attn.c_attn", Scopes(mlp=False), True),
    ],
)
def test_scopes(name, scopes, allowed):
    assert scopes.allow(name) is allowed


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "phi", "opt", "olmo2"])
def test_all_linear_finds_something_and_never_the_head(family):
    overrides = {"ffn_dim": 64, "word_embed_proj_dim": 64} if family == "opt" else {}
    model = make_tiny(family, **overrides)
    found = resolve_targets(model, "all-linear", scopes=Scopes())
    assert found.matched
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert head not in found.matched
    assert found.matched <= set(linear_modules(model))


def test_short_names_when_they_say_the_same():
    model = make_tiny("llama")
    assert set(resolve_targets(model, None, scopes=Scopes(mlp=False)).modules) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@pytest.mark.parametrize(
    ("layers", "last", "expected"), [(None, None, None), (1, None, [1]), ((0, 1), None, [0, 1]), (None, 1, [1])]
)
def test_choose_layers(layers, last, expected):
    assert choose_layers(make_tiny("llama"), layers, last) == expected


def test_signatures_follow_unsloths():
    language = list(inspect.signature(FastLanguageModel.get_peft_model).parameters)
    assert language[:12] == [
        "model",
        "r",
        "target_modules",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "layers_to_transform",
        "layers_pattern",
        "use_gradient_checkpointing",
        "random_state",
        "max_seq_length",
        "use_rslora",
    ]
    general = inspect.signature(FastModel.get_peft_model).parameters
    assert list(general)[6:10] == [
        "finetune_vision_layers",
        "finetune_language_layers",
        "finetune_attention_modules",
        "finetune_mlp_modules",
    ]
    assert general["target_modules"].default is None
    assert general["finetune_audio_layers"].default is False

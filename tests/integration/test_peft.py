"""get_peft_model: what is adapted, in which dtype, on which second call, and every refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tokenizer, make_tiny
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import pantheraml
from pantheraml.device import is_installed
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.models import FastLanguageModel, FastModel, add_new_tokens
from pantheraml.models.record import record_of

IDS = torch.tensor([[0, 20, 30, 40, 50, 60, 70]])
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir):
    """A loaded tiny model and its tokenizer; tests take copies."""
    return FastLanguageModel.from_pretrained(str(tiny_llama_dir), max_seq_length=128, load_in_4bit=False)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded[0])


def adapted(model):
    """Names of the adapted modules below the transformers model."""
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


def test_defaults(model):
    tuned = FastLanguageModel.get_peft_model(model)
    config = tuned.peft_config["default"]
    assert isinstance(tuned, PeftModel)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.use_rslora) == (
        16,
        16,
        0.0,
        "none",
        False,
    )
    assert set(config.target_modules) == leaves(adapted(tuned)) == SEVEN
    assert config.task_type == "CAUSAL_LM"
    assert tuned.training
    assert tuned.max_seq_length == 128
    assert all("lora_" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)
    with torch.no_grad():
        # B starts at zero, so the adapter changes nothing yet.
        torch.testing.assert_close(tuned.eval()(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_unsloth_keywords_and_methods(model):
    tuned = FastLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=["q_proj", "v_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
        max_seq_length=2048,
    )
    assert leaves(adapted(tuned)) == {"q_proj", "v_proj"}
    for name in ("for_inference", "for_training", "save_pretrained_merged", "push_to_hub_merged", "fast_generate"):
        assert callable(getattr(tuned, name))


def test_checkpointing_mode_and_padding_side(model, loaded):
    model._saved_temp_tokenizer = tokenizer = copy.deepcopy(loaded[1])
    tuned = FastLanguageModel.get_peft_model(model)
    layers = tuned.get_base_model().model.layers
    assert tokenizer.padding_side == "right"
    assert all(layer.gradient_checkpointing for layer in layers)
    assert record_of(tuned).gradient_checkpointing == "unsloth"
    assert tuned.config.use_cache is False
    tuned.for_inference()
    assert (tuned.training, tokenizer.padding_side, tuned.config.use_cache) == (False, "left", True)
    assert not any(layer.gradient_checkpointing for layer in layers)
    FastLanguageModel.for_training(tuned)
    assert (tuned.training, tokenizer.padding_side, tuned.config.use_cache) == (True, "right", False)
    assert all(layer.gradient_checkpointing for layer in layers)
    tuned.for_training(use_gradient_checkpointing=False)
    assert not any(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("mode", [True, "unsloth", "pantheraml", "auto"])
def test_checkpointing_changes_no_gradient(loaded, mode):
    gradients = []
    for use in (False, mode):
        tuned = FastLanguageModel.get_peft_model(copy.deepcopy(loaded[0]), use_gradient_checkpointing=use)
        assert any(m.gradient_checkpointing for m in tuned.get_base_model().model.layers) is bool(use)
        tuned(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in tuned.parameters() if parameter.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-7)


def test_quantised_base_is_frozen_as_it_is_and_lora_is_fp32(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), dtype="bfloat16", load_in_4bit=True)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    tuned = FastLanguageModel.get_peft_model(model, r=4)
    for name, parameter in tuned.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert parameter.requires_grad is ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else before[plain])
    assert tuned.get_base_model().model.norm.weight.dtype == torch.bfloat16
    loss = tuned(IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tuned.parameters() if p.requires_grad)


def test_a_few_steps_lower_the_loss_in_8_bit(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_8bit=True)
    tuned = FastLanguageModel.get_peft_model(model, r=8)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = tuned(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_training_after_an_evaluation_in_4_bit_has_the_same_gradients(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=True)
    tuned = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian")

    def gradients():
        tuned.zero_grad()
        tuned.train()
        tuned(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        tuned.eval()(IDS)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_random_state_decides_the_weights(loaded):
    def weights(seed):
        torch.rand(3)
        tuned = FastLanguageModel.get_peft_model(copy.deepcopy(loaded[0]), r=4, random_state=seed)
        return torch.cat([p.flatten() for name, p in tuned.named_parameters() if "lora_A" in name])

    assert torch.equal(weights(3407), weights(3407))
    assert not torch.equal(weights(3407), weights(1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, SEVEN),
        ({"target_modules": r".*\.self_attn\.[qv]_proj"}, {"q_proj", "v_proj"}),
        ({"target_modules": ("k_proj",)}, {"k_proj"}),
        ({"target_modules": ["lm_head", "q_proj"]}, {"lm_head", "q_proj"}),
        ({"target_modules": ["q_proj", "no_such"]}, {"q_proj"}),
    ],
    ids=["all-linear", "regex", "tuple", "lm_head", "one-unknown"],
)
def test_targets(model, options, expected):
    assert leaves(adapted(FastLanguageModel.get_peft_model(model, r=2, **options))) == expected


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"finetune_last_n_layers": 1}, {"1"}),
        ({"layers_to_transform": [0]}, {"0"}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {"1"}),
    ],
    ids=["last-n", "list", "pattern"],
)
def test_layers(model, options, layers):
    names = adapted(FastLanguageModel.get_peft_model(model, r=2, **options))
    assert {name.split(".")[2] for name in names} == layers
    assert len(names) == 7


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, SEVEN),
        ({"finetune_mlp_modules": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"finetune_attention_modules": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"finetune_attention_modules": False, "target_modules": ["q_proj", "up_proj"]}, {"up_proj"}),
        ({"finetune_language_layers": False, "target_modules": "all-linear"}, SEVEN),
    ],
    ids=["all", "attention", "mlp", "narrowed-list", "all-linear-wins"],
)
def test_finetune_flags(model, flags, expected):
    assert leaves(adapted(FastModel.get_peft_model(model, r=2, **flags))) == expected


def test_flags_that_leave_nothing(model):
    with pytest.raises(ConfigError, match="leave nothing"):
        FastModel.get_peft_model(model, finetune_language_layers=False)


def test_vision_language_scopes(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    )
    plain = AutoModelForImageTextToText.from_config(config)

    def parts(**flags):
        names = adapted(FastModel.get_peft_model(copy.deepcopy(plain), r=2, **flags))
        return {"vision" if "vision" in name or "multi_modal" in name else "language" for name in names}, names

    assert parts()[0] == {"vision", "language"}
    assert parts(finetune_vision_layers=False)[0] == {"language"}
    assert parts(finetune_language_layers=False)[0] == {"vision"}
    kinds, names = parts(finetune_vision_layers=False, target_modules=["q_proj"])
    assert kinds == {"language"}
    assert leaves(names) == {"q_proj"}
    kinds, names = parts(finetune_last_n_layers=1)
    assert all(".layers.1." in name for name in names)
    assert kinds == {"language"}
    text_only = adapted(FastLanguageModel.get_peft_model(copy.deepcopy(plain), r=2))
    assert text_only
    assert not any("vision" in name for name in text_only)


def test_fused_projection_names(tmp_path):
    tuned = FastLanguageModel.get_peft_model(make_tiny("phi3"), r=2)
    assert leaves(adapted(tuned)) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_mlp_names_include_experts_and_never_the_router(family):
    extra = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    }
    plain = make_tiny(family, **extra)
    tuned = FastLanguageModel.get_peft_model(copy.deepcopy(plain), r=2)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained)
    assert not any("router" in name or ".gate." in name for name in trained)
    loss = tuned(IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if "experts" in name and p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    attention = FastLanguageModel.get_peft_model(copy.deepcopy(plain), r=2, target_modules=["q_proj", "v_proj"])
    assert not any("experts" in name for name, p in attention.named_parameters() if p.requires_grad)
    with pytest.raises(UnsupportedError, match="lora_dropout"):
        FastLanguageModel.get_peft_model(copy.deepcopy(plain), r=2, lora_dropout=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, TypeError, "rank r"),
        ({"r": -4}, TypeError, "rank r"),
        ({"r": 8.0}, TypeError, "rank r"),
        ({"r": "16"}, TypeError, "rank r"),
        ({"r": True}, TypeError, "rank r"),
        ({"lora_alpha": 0}, ArgumentError, "lora_alpha"),
        ({"lora_dropout": 1.5}, ConfigError, "lora_dropout"),
        ({"bias": "some"}, ConfigError, "bias"),
        ({"target_modules": ["query_proj"]}, ConfigError, "candidates: down_proj"),
        ({"target_modules": []}, ConfigError, "candidates"),
        ({"target_modules": 7}, ArgumentError, "target_modules"),
        ({"target_modules": "q_proj"}, ConfigError, r"pass \['q_proj'\]"),
        ({"target_modules": r"(("}, ConfigError, "regular expression"),
        ({"layers_to_transform": [2]}, ConfigError, "layers 0 to 1"),
        ({"layers_to_transform": [0], "finetune_last_n_layers": 1}, ConflictError, "contradict"),
        ({"finetune_last_n_layers": 3}, ConfigError, "between 1 and 2"),
        ({"layers_pattern": "layers"}, ConfigError, "layers_to_transform"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, ConflictError, "regular expression"),
        ({"modules_to_save": ["norm"]}, TypeError, "modules_to_save"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save"),
        ({"init_lora_weights": "magic"}, ValueError, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, ConfigError, "corda_config"),
        ({"loftq_config": {"loftq_bits": 4}}, ConfigError, "loftq_config"),
        ({"qat_scheme": "cactus"}, UnsupportedError, "(?s)another engine.*'int8-int4'"),
        ({"qat_scheme": 4}, TypeError, "must be a name"),
        ({"use_gradient_checkpointing": "sometimes"}, ConfigError, "checkpointing mode"),
        ({"target_module": ["q_proj"]}, ArgumentError, "did you mean 'target_modules'"),
        ({"task_type": "DREAM"}, ConfigError, "task_type"),
        ({"random_state": "x"}, ArgumentError, "random_state"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests(model, options, error, message):
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(model, **options)
    # Nothing was put on the model.
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_not_a_model():
    with pytest.raises(TypeError, match="takes a model"):
        FastLanguageModel.get_peft_model("llama")


def test_second_call_with_equal_values_keeps_the_adapter(model):
    tuned = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "v_proj"])
    weights = [p.clone() for p in tuned.parameters() if p.requires_grad]
    again = FastLanguageModel.get_peft_model(tuned, r=8, target_modules=["v_proj", "q_proj"], random_state=1)
    assert again is tuned
    assert all(torch.equal(a, b) for a, b in zip(weights, (p for p in tuned.parameters() if p.requires_grad)))
    with pytest.raises(ConflictError, match="already has an adapter"):
        FastModel.get_peft_model(tuned, r=8)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 4},
        {"lora_alpha": 32},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_second_call_with_other_values_raises(model, change):
    values = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    tuned = FastLanguageModel.get_peft_model(model, **values)
    with pytest.raises(TypeError, match=next(iter(change)).replace("layers_to_transform", "target_modules")):
        FastLanguageModel.get_peft_model(tuned, **{**values, **change})


def test_second_call_on_a_reloaded_adapter(model, tmp_path):
    values = {"r": 4, "layers_to_transform": [1], "use_gradient_checkpointing": False}
    FastLanguageModel.get_peft_model(model, **values).save_pretrained(tmp_path)
    reloaded, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert FastLanguageModel.get_peft_model(reloaded, **values) is reloaded
    with pytest.raises(TypeError, match="differs"):
        FastLanguageModel.get_peft_model(reloaded, **{**values, "r": 5})


def test_rslora_scale(model):
    tuned = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_rslora=True)
    layer = tuned.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 32 / 16**0.5


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", False])
def test_initialisations(model, init):
    tuned = FastLanguageModel.get_peft_model(model, r=2, init_lora_weights=init)
    assert tuned.peft_config["default"].init_lora_weights == init


def test_dora_trains(model):
    tuned = FastLanguageModel.get_peft_model(model, r=2, use_dora=True)
    tuned(IDS, labels=IDS).loss.backward()
    magnitudes = [p for name, p in tuned.named_parameters() if "magnitude" in name]
    assert magnitudes
    assert all(p.grad is not None and p.dtype == torch.float32 for p in magnitudes)


def test_loftq_needs_16_bit_weights(tiny_llama_dir):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=True)
    with pytest.raises(ValueError, match="loftq"):
        FastLanguageModel.get_peft_model(model, init_lora_weights="loftq")


def test_loftq(model):
    if not is_installed("scipy"):
        with pytest.raises(ImportError, match="scipy"):
            FastLanguageModel.get_peft_model(model, init_lora_weights="loftq")
        return
    tuned = FastLanguageModel.get_peft_model(model, r=2, init_lora_weights="loftq")
    assert tuned.peft_config["default"].loftq_config["loftq_bits"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_head_are_trained_in_fp32(tiny_llama_dir, tmp_path, dtype):
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), dtype=dtype, load_in_4bit=False)
    tuned = FastLanguageModel.get_peft_model(
        model, r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    assert set(tuned.peft_config["default"].modules_to_save) == {"embed_tokens", "lm_head"}
    full = {name: p for name, p in tuned.named_parameters() if "modules_to_save" in name}
    assert len(full) == 2
    assert {(p.dtype, p.requires_grad) for p in full.values()} == {(torch.float32, True)}
    assert tuned.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    tuned(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in full.values())
    tuned.for_inference()
    assert tuned.generate(input_ids=IDS, max_new_tokens=2).shape == (1, 9)
    # A 16-bit weight would lose this update; the fp32 one keeps it and saves it.
    with torch.no_grad():
        for parameter in full.values():
            parameter += 1e-6
    expected = tuned(IDS).logits
    tuned.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), dtype=dtype, load_in_4bit=False)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
    ids=lambda options: next(iter(options)),
)
def test_tied_embedding_and_head_stay_one(tmp_path, options):
    make_tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    tuned = FastLanguageModel.get_peft_model(model, r=2, **options)
    base = tuned.get_base_model()
    trained = {id(p) for name, p in tuned.named_parameters() if "modules_to_save" in name}
    assert len(trained) == 1
    assert base.model.embed_tokens.weight is base.lm_head.weight
    # PEFT's copy of the head states the embedding's sizes: the logits have those of its weight.
    stock, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    pantheraml.restore(stock)
    for mode in ("train", "eval"):
        getattr(tuned, mode)()
        assert tuned(IDS).logits.shape == (*IDS.shape, base.config.vocab_size)
        torch.testing.assert_close(tuned(IDS).logits[:], stock(IDS).logits, rtol=0, atol=1e-5)
        ours, theirs = (m(IDS, labels=IDS).loss for m in (tuned, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    (grad,) = (p.grad for p in tuned.parameters() if id(p) in trained)
    torch.testing.assert_close(grad, stock.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_new_tokens_force_embedding_and_head(loaded, tiny_llama_dir):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=False)
    assert add_new_tokens(model, tokenizer, ["<new>", "<other>", "<pad>"]) == 2
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 386
    tuned = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    assert set(tuned.peft_config["default"].modules_to_save) == {"embed_tokens", "lm_head"}
    with pytest.raises(ConflictError, match="already has an adapter"):
        add_new_tokens(tuned, tokenizer, ["<late>"])


def test_saved_adapter_is_plain_peft(model, tiny_llama_dir, tmp_path):
    tuned = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="gaussian").eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-5)


def test_a_model_that_was_not_loaded_here():
    tuned = FastLanguageModel.get_peft_model(make_tiny("qwen2"), r=2)
    assert record_of(tuned) is None
    assert all(layer.gradient_checkpointing for layer in tuned.get_base_model().model.layers)
    tuned(IDS, labels=IDS).loss.backward()

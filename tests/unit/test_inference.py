"""Generation: batches equal single prompts, inputs are checked, and state is put back."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny

from pantheraml.errors import ArgumentError, ConfigError
from pantheraml.models.adapt import adapt
from pantheraml.models.inference import attach_generate, fast_generate, for_inference, for_training

PROMPTS = ["hello", "The quick brown fox", "Question: what is two plus three? Answer:"]
EXTRA = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
}


def checked(family, **overrides):
    model = make_tiny(family, **{**EXTRA.get(family, {}), **overrides}).eval()
    adapt(model)
    attach_generate(model)
    return model


@pytest.fixture(scope="module")
def llama():
    return checked("llama")


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "gpt2"])
@torch.no_grad()
def test_a_left_padded_batch_equals_one_by_one(family, tokenizer):
    model = checked(family)
    # Sharper weights make greedy choices that a wrong position or mask would change.
    for parameter in model.parameters():
        parameter.mul_(3)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, prompt in zip(together, PROMPTS, strict=True):
        single = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert row.tolist() == alone.tolist()
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_right_padding_raises(llama, tokenizer):
    tokenizer.padding_side = "right"
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with pytest.raises(ConfigError, match=r"2 of 3 prompts end in padding[^$]*padding_side = 'left'"):
        llama.generate(**batch, max_new_tokens=2)
    with pytest.raises(ConfigError, match="end in padding"):
        llama.generate(batch["input_ids"], max_new_tokens=2)


def test_an_encoding_given_as_the_input_is_unpacked(llama, tokenizer):
    encoding = tokenizer("hello there", return_tensors="pt")
    expected = llama.generate(**encoding, max_new_tokens=3, do_sample=False)
    for call in ({"input_ids": encoding}, {"inputs": encoding}):
        assert torch.equal(llama.generate(**call, max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(llama.generate(encoding, max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(fast_generate(llama, encoding, max_new_tokens=3, do_sample=False), expected)


def test_token_type_ids_are_dropped(llama, tokenizer):
    encoding = dict(tokenizer("hello", return_tensors="pt"))
    encoding["token_type_ids"] = torch.zeros_like(encoding["input_ids"])
    llama.generate(**encoding, max_new_tokens=2)


def test_too_long_names_max_seq_length(llama):
    ids = torch.full((1, 250), 20)
    assert llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).shape == (1, 256)
    with pytest.raises(ValueError, match="max_seq_length=257"):
        llama.generate(ids, max_new_tokens=7)


def test_text_is_refused(llama):
    with pytest.raises(TypeError, match="takes token ids"):
        llama.generate(["hello"], max_new_tokens=2)


def test_training_state_is_put_back(tokenizer):
    model = checked("llama", attention_dropout=0.5)
    for_training(model)
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    encoding = tokenizer("hello there", return_tensors="pt")
    first = model.generate(**encoding, max_new_tokens=4, do_sample=False)
    # Dropout is off while generating, so two runs agree.
    assert torch.equal(first, model.generate(**encoding, max_new_tokens=4, do_sample=False))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.model.layers[0].gradient_checkpointing


def test_state_is_put_back_after_an_error(llama):
    model = copy.deepcopy(llama)
    model.train()
    with pytest.raises(ValueError, match="max_length_of_nothing"):
        model.generate(torch.tensor([[0, 5]]), max_length_of_nothing=3)
    assert model.training


def test_default_length_is_put_back_without_a_warning(llama, caplog):
    model = copy.deepcopy(llama)
    model.generation_config.max_length = 200
    with caplog.at_level("WARNING", logger="transformers"):
        model.generate(torch.tensor([[0, 5]]), max_new_tokens=2)
    assert model.generation_config.max_length == 200
    assert "max_length" not in caplog.text


def test_pad_defaults_to_the_end_token(llama, caplog):
    model = copy.deepcopy(llama)
    model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = [1, 5]
    model.generate(torch.tensor([[0, 5]]), max_new_tokens=2)
    # A prompt may end in the end token: that is no padding.
    model.generate(torch.tensor([[0, 1]]), max_new_tokens=2)


def test_a_deep_copy_generates_with_its_own_weights(llama):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    ids = torch.tensor([[0, 20, 30]])
    assert other.generate(ids, max_new_tokens=2, do_sample=False)[0, 3:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "hello"}, "text prompts"),
        ({"prompts": ["hello", "there"]}, "text prompts"),
        ({"prompts": None, "sampling_params": object()}, "sampling_params"),
        ({"prompts": None, "lora_request": object()}, "lora_request"),
    ],
)
def test_fast_generate_without_an_engine(llama, options, message):
    with pytest.raises(ValueError, match=message):
        fast_generate(llama, **options)


@pytest.mark.parametrize("switch", [for_inference, for_training])
@pytest.mark.parametrize("value", [None, "model", 3])
def test_mode_switches_take_models_only(switch, value):
    with pytest.raises(TypeError, match="takes a model") as raised:
        switch(value)
    assert isinstance(raised.value, ArgumentError)


def test_mode_switches_return_the_model_and_are_reversible(llama):
    model = copy.deepcopy(llama)
    assert for_training(model) is model
    assert (model.training, model.config.use_cache) == (True, False)
    assert for_inference(model) is model
    assert (model.training, model.config.use_cache) == (False, True)
    model.config.use_cache = False
    for_inference(for_training(model))
    # A cache that was off before checkpointing stays off.
    assert model.config.use_cache is False

"""Padding repair, double BOS and new tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tokenizer, make_tiny

from pantheraml.data.sharegpt import remove_special_tokens
from pantheraml.errors import ArgumentError, ConfigError
from pantheraml.models.tokenizers import (
    add_new_tokens,
    has_double_bos,
    prepare_tokenizer,
    repair_padding,
    set_padding_side,
)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def model():
    return make_tiny("llama")


def follows(model, tokenizer):
    pad = tokenizer.pad_token_id
    return model.config.pad_token_id == model.generation_config.pad_token_id == pad


def without_pad(tokenizer, extra=()):
    """The tokenizer as one that has no padding token, with some special tokens besides."""
    from transformers import AddedToken

    tokenizer.pad_token = None
    tokenizer.add_tokens([AddedToken(name, special=True) for name in extra])
    return tokenizer


def test_a_good_padding_token_is_kept(model, tokenizer):
    assert repair_padding(model, tokenizer) is None
    assert tokenizer.pad_token == "<pad>"
    assert follows(model, tokenizer)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ((), "<pad>"),
        (("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"), "<|finetune_right_pad_id|>"),
    ],
)
def test_missing_padding_token_takes_a_padding_name(model, tokenizer, extra, expected):
    without_pad(tokenizer, extra)
    model.resize_token_embeddings(len(tokenizer))
    assert repair_padding(model, tokenizer) == expected
    assert follows(model, tokenizer)


def no_pad_names(extra=()):
    """A tokenizer whose vocabulary has no padding name at all."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = build_tokenizer().backend_tokenizer.to_str().replace('"<pad>"', '"<spare>"')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(json.loads(text))), bos_token="<s>", eos_token="</s>"
    )
    return without_pad(tokenizer, extra)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("<|image_pad|>", "<|reserved_special_token_3|>"), "<|reserved_special_token_3|>"),
        (("<unused7>",), "<unused7>"),
        (("<|tool|>", "<|image_pad|>"), "<|image_pad|>"),
    ],
    ids=["reserved-before-image", "unused", "image-pad-last"],
)
def test_reserved_tokens(model, extra, expected):
    tokenizer = no_pad_names(extra)
    model.resize_token_embeddings(len(tokenizer))
    assert repair_padding(model, tokenizer) == expected
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


def test_unknown_token_before_a_new_one(model):
    tokenizer = no_pad_names()
    tokenizer.unk_token = "<spare>"
    weight = model.get_input_embeddings().weight
    row = weight[tokenizer.unk_token_id].clone()
    assert repair_padding(model, tokenizer) == "<spare>"
    # The unknown token is real input: its row stays.
    assert torch.equal(weight[tokenizer.unk_token_id], row)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_token_grows_the_embeddings_and_is_zero_unless_tied(tied):
    model = make_tiny("llama", pad_token_id=None, tie_word_embeddings=tied)
    tokenizer = no_pad_names()
    chosen = repair_padding(model, tokenizer)
    weight = model.get_input_embeddings().weight
    assert tokenizer.convert_tokens_to_ids(chosen) == 384
    assert weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 385
    assert bool((weight[384] == 0).all()) is not tied
    assert follows(model, tokenizer)


def test_a_padded_embedding_is_not_resized():
    model = make_tiny("llama", vocab_size=512, pad_token_id=None)
    tokenizer = no_pad_names()
    repair_padding(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == 512


def test_padding_with_the_end_token_is_repaired(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    assert repair_padding(model, tokenizer) == "<pad>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_padding_with_an_end_token_of_the_generation_config_is_repaired(model, tokenizer):
    model.generation_config.eos_token_id = [1, tokenizer.pad_token_id]
    chosen = repair_padding(model, tokenizer)
    assert chosen not in (None, "<pad>", "</s>")
    assert tokenizer.pad_token_id not in (1, 2)


def test_padding_beyond_the_embedding_is_repaired(tokenizer):
    model = make_tiny("llama", vocab_size=384)
    tokenizer.add_special_tokens({"pad_token": "<far>"})
    assert tokenizer.pad_token_id == 384
    assert repair_padding(model, tokenizer) == "<pad>"


def test_a_token_of_the_chat_template_is_not_free(tokenizer):
    model = make_tiny("llama", pad_token_id=None)
    tokenizer.pad_token = None
    tokenizer.chat_template = "{{ messages[0]['content'] }}<pad>"
    assert repair_padding(model, tokenizer) != "<pad>"


def test_tokenizer_alone(tokenizer):
    tokenizer.pad_token = None
    assert repair_padding(None, tokenizer) == "<pad>"


def test_prepare_pads_left_and_sets_the_length(model, tokenizer):
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    prepare_tokenizer(model, tokenizer, max_seq_length=77, fix=False)
    assert (tokenizer.padding_side, tokenizer.model_max_length, tokenizer.pad_token) == ("left", 77, None)
    model._saved_temp_tokenizer = tokenizer
    set_padding_side(model, "right")
    assert tokenizer.padding_side == "right"


def test_double_bos(tokenizer):
    assert has_double_bos(tokenizer)
    assert has_double_bos(tokenizer, "<s>hello")
    assert not has_double_bos(tokenizer, "hello")
    assert remove_special_tokens(tokenizer, "<s>hello") == "hello"
    ids = tokenizer(
        remove_special_tokens(
            tokenizer, tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        )
    )
    assert ids["input_ids"].count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert not has_double_bos(tokenizer)
    tokenizer.bos_token = None
    assert not has_double_bos(tokenizer, "<s>hello")


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_at_the_mean_of_trained_rows(tokenizer, tied):
    model = make_tiny("llama", tie_word_embeddings=tied)
    rows = model.get_input_embeddings().weight.detach().clone()
    trained = rows[rows.abs().amax(dim=1) > 0]
    assert len(trained) < len(rows)
    assert add_new_tokens(model, tokenizer, ["<a>", "<b>"]) == 2
    for token in ("<a>", "<b>"):
        index = tokenizer.convert_tokens_to_ids(token)
        torch.testing.assert_close(model.get_input_embeddings().weight[index], trained.mean(dim=0))
    assert torch.equal(model.get_input_embeddings().weight[:384], rows)
    assert model.config.vocab_size == 386


def test_interpolation_mixes_the_pieces(model, tokenizer):
    pieces = tokenizer("hello there", add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().weight.detach().clone()
    mean = rows[rows.abs().amax(dim=1) > 0].mean(dim=0)
    add_new_tokens(model, tokenizer, ["hello there"], method="interpolation", interpolation=0.25)
    index = tokenizer.convert_tokens_to_ids("hello there")
    torch.testing.assert_close(
        model.get_input_embeddings().weight[index], 0.75 * mean + 0.25 * rows[pieces].mean(dim=0)
    )


def test_new_tokens_never_shrink_a_padded_embedding(tokenizer):
    model = make_tiny("llama", vocab_size=512)
    add_new_tokens(model, tokenizer, ["<a>"])
    assert model.get_input_embeddings().weight.shape[0] == 512


def test_known_tokens_are_skipped(model, tokenizer):
    assert add_new_tokens(model, tokenizer, ["<pad>"]) == 0
    assert add_new_tokens(model, tokenizer, ["<a>", "<a>"]) == 1
    assert add_new_tokens(model, tokenizer) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"new_tokens": "<a>"}, ArgumentError),
        ({"new_tokens": [1]}, ArgumentError),
        ({"new_tokens": ["<a>"], "method": "median"}, ConfigError),
        ({"new_tokens": ["<a>"], "interpolation": 2.0}, ConfigError),
    ],
)
def test_bad_new_tokens(model, tokenizer, options, error):
    with pytest.raises(error):
        add_new_tokens(model, tokenizer, **options)
    assert len(tokenizer) == 384

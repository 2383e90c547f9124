"""Generation stops where the end of a turn, or a text, has been written."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tokenizer, make_tiny

from pantheraml.chat_templates import create_stopping_criteria, get_chat_template, get_ollama_eos_tokens
from pantheraml.data.templates.registry import templates
from pantheraml.errors import ArgumentError, ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def stops(tokenizer, texts, *stop_word):
    """After which of the texts, one row each, generation would stop."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    return create_stopping_criteria(tokenizer, *stop_word)(ids, None).tolist()


def test_the_end_token_and_texts_stop_rows_by_themselves(tokenizer):
    assert stops(tokenizer, ["hello</s>", "hello", "</s>hello"]) == [True, False, False]
    assert stops(tokenizer, ["hello<|user|>", "hello</s>"], "<|user|>") == [True, False]
    assert stops(tokenizer, ["the lazy dog", "the lazy", "dog eat"], "lazy dog") == [True, False, False]


def test_a_template_whose_turns_end_otherwise():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    tokenizer = get_chat_template(tokenizer, "llama-3")
    assert stops(tokenizer, ["a<|eot_id|>", "a</s>", "a"]) == [True, True, False]


def test_generation_ends_behind_the_text(tokenizer):
    model = make_tiny()
    prompt = tokenizer("The quick", return_tensors="pt")["input_ids"]
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
    word = tokenizer.decode(whole[3])
    first = next(n for n in range(12) if word in tokenizer.decode(whole[: n + 1]))
    criteria = create_stopping_criteria(tokenizer, word)
    found = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, stopping_criteria=criteria)
    assert found[0, prompt.shape[1] :].tolist() == whole[: first + 1].tolist()


@pytest.mark.parametrize("name", sorted({template.name for template in templates().values()}))
def test_stop_texts_of_every_template(name):
    tokenizer = build_tokenizer()
    template = templates()[name]
    own = [token for token in (template.turn_end, *template.stops) if token]
    tokenizer.add_tokens(own, special_tokens=True)
    tokenizer = get_chat_template(tokenizer, name)
    texts = get_ollama_eos_tokens(tokenizer, ["### End"])
    assert texts[0] == tokenizer.eos_token
    assert set(own) <= set(texts)
    assert texts[-1] == "### End"
    assert len(set(texts)) == len(texts)


def test_without_a_template_the_end_token_is_all(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert get_ollama_eos_tokens(bare) == ["</s>"]


def test_what_cannot_be_honoured(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        create_stopping_criteria(bare)
    with pytest.raises(ConfigError, match="empty"):
        create_stopping_criteria(tokenizer, "")
    with pytest.raises(ArgumentError):
        create_stopping_criteria(tokenizer, 5)
    with pytest.raises(ArgumentError):
        get_ollama_eos_tokens(tokenizer, "</s>")
    with pytest.raises(ConfigError, match="Modelfile"):
        get_ollama_eos_tokens(tokenizer, ["a\nb"])

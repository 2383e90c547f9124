"""Columns become conversations: placeholders, optional parts, joined rows."""

from __future__ import annotations

import itertools

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.chat_templates import standardize_sharegpt, to_sharegpt
from pantheraml.errors import ArgumentError, ConfigError, DataError, UnsupportedError

ALPACA = "{instruction}[[\nYour input is:\n{input}]]"


def data(*rows):
    return Dataset.from_list(list(rows))


def human(row):
    return row["conversations"][0]["value"]


def test_alpaca_columns():
    dataset = data(
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "id": 7},
        {"instruction": "Greet.", "input": "", "output": "Hello", "id": 8},
        {"instruction": "Nüll 🦊", "input": None, "output": "", "id": 9},
    )
    found = to_sharegpt(dataset, ALPACA)
    assert found.to_list() == [
        {
            "conversations": [
                {"from": "human", "value": "Add.\nYour input is:\n1 and 2"},
                {"from": "gpt", "value": "3"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Greet."}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Nüll 🦊"}, {"from": "gpt", "value": ""}]},
    ]
    roles = [message["role"] for message in standardize_sharegpt(found)[0]["conversations"]]
    assert roles == ["user", "assistant"]
    assert list(to_sharegpt(dataset.to_iterable_dataset(), ALPACA)) == found.to_list()


def test_without_a_prompt_the_column_is_taken_as_it_is():
    dataset = data({"instruction": "{braces} and [[brackets]]", "question": "q", "output": "a", "answer": "b"})
    assert human(to_sharegpt(dataset)[0]) == "{braces} and [[brackets]]"
    [row] = to_sharegpt(dataset, merged_column_name="question", output_column_name="answer").to_list()
    assert row == {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("[[A {a}. ]][[B {b}. ]]end", "A 1. end"),
        ("[[{a}{b}]]end", "end"),
        ("[[{a}{n}]]!", "10.5!"),
        ("{a}", "1"),
        ('{{"key": {a}}}', '{"key": 1}'),
        ("{two words}", "w"),
        ("no column at all", "no column at all"),
        ("[one] {a} ]", "[one] 1 ]"),
        ("{{a}} {flag}", "{a} True"),
    ],
)
def test_prompts(prompt, text):
    dataset = data({"a": 1, "b": float("nan"), "n": 0.5, "two words": "w", "flag": True, "output": 5})
    [row] = to_sharegpt(dataset, prompt).to_list()
    assert row["conversations"] == [{"from": "human", "value": text}, {"from": "gpt", "value": "5"}]


def test_values_are_never_read_as_prompts():
    dataset = data({"instruction": "{input} [[x]] {{", "input": "]] {instruction}", "output": "{output}"})
    [row] = to_sharegpt(dataset, ALPACA).to_list()
    assert human(row) == "{input} [[x]] {{\nYour input is:\n]] {instruction}"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{instructon}", "no column 'instructon' \\(did you mean 'instruction'\\?\\)(.|\n)*instruction, output"),
        ("[[ {nowhere} ]]", "no column 'nowhere'"),
        ("[[ nothing ]]", "names no column"),
        ("[[]]", "names no column"),
        ("{}", "a lone '{'"),
        ("{instruction", "a lone '{'"),
        ("instruction}", "a lone '}'"),
        ("[[{instruction}", "without its"),
        ("{instruction}]]", "too many"),
        ("[[{instruction}[[{output}]]]]", "too many"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, words):
    with pytest.raises(ConfigError, match=words):
        to_sharegpt(data({"instruction": "a", "output": "b"}), prompt)


def test_data_that_cannot_be_used():
    good = {"instruction": "a", "output": "b"}
    with pytest.raises(DataError, match=r"'output' is null(.|\n)*row 2"):
        to_sharegpt(data(good, {"instruction": "a", "output": None}))
    with pytest.raises(DataError, match=r"'instruction' is null(.|\n)*row 2(.|\n)*\[\["):
        to_sharegpt(data(good, {"instruction": None, "output": "b"}), "x {instruction}")
    with pytest.raises(DataError, match="'instruction' is a list"):
        to_sharegpt(data({"instruction": ["a"], "output": "b"}))
    with pytest.raises(ConfigError, match=r"no column 'response'(.|\n)*output_column_name(.|\n)*instruction, output"):
        to_sharegpt(data(good), output_column_name="response")
    with pytest.raises(ArgumentError):
        to_sharegpt([good])


def test_other_columns_can_stay():
    dataset = data({"q": "a", "instruction": "old", "output": "b", "id": 3})
    [row] = to_sharegpt(dataset, "<{q}>", remove_unused_columns=False).to_list()
    chat = [{"from": "human", "value": "<a>"}, {"from": "gpt", "value": "b"}]
    assert row == {"q": "a", "instruction": "<a>", "output": "b", "id": 3, "conversations": chat}
    [row] = to_sharegpt(dataset, remove_unused_columns=False).to_list()
    assert (row["instruction"], human(row)) == ("old", "old")


def numbered(rows):
    return Dataset.from_dict({"instruction": [f"q{i}" for i in range(rows)], "output": [f"a{i}" for i in range(rows)]})


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 12), turns=st.integers(1, 12), seed=st.integers(0, 9))
def test_extension(rows, turns, seed):
    if turns > rows:
        with pytest.raises(ConfigError, match=r"with .* rows"):
            to_sharegpt(numbered(rows), conversation_extension=turns, random_state=seed)
        return
    chats = to_sharegpt(numbered(rows), conversation_extension=turns, random_state=seed)["conversations"][:]
    assert len(chats) == rows
    used = []
    for index, chat in enumerate(chats):
        assert [message["from"] for message in chat] == ["human", "gpt"] * turns
        numbers = [int(message["value"][1:]) for message in chat]
        assert numbers[::2] == numbers[1::2]
        assert numbers[0] == index
        assert len(set(numbers)) == turns
        used += numbers[::2]
    assert sorted(used) == sorted(list(range(rows)) * turns)


def test_extension_follows_its_seed():
    def order(seed):
        chats = to_sharegpt(numbered(40), conversation_extension=3, random_state=seed)["conversations"][:]
        return [message["value"] for message in itertools.chain(*chats)][::2]

    assert order(3407) == order(3407) != order(1)
    assert order(3407)[:6] == ["q0", "q11", "q9", "q1", "q14", "q6"]


def test_extension_keeps_other_columns_and_refuses_streams():
    [first, _] = to_sharegpt(numbered(2), remove_unused_columns=False, conversation_extension=2).to_list()
    assert (first["instruction"], first["output"]) == ("q0", "a0")
    assert [message["value"] for message in first["conversations"]] == ["q0", "a0", "q1", "a1"]
    with pytest.raises(UnsupportedError, match="stream"):
        to_sharegpt(numbered(4).to_iterable_dataset(), conversation_extension=2)
    with pytest.raises(ConfigError):
        to_sharegpt(numbered(4), conversation_extension=0)

"""Columns are recognised, overridden, checked and turned into training rows."""

from __future__ import annotations

import itertools

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.chat_templates import remove_special_tokens, standardize_data_formats, standardize_sharegpt
from pantheraml.data import formats
from pantheraml.data.formats import alpaca_prompt, check, detect, render, to_training_rows
from pantheraml.data.raw_text import chunk_documents, windows
from pantheraml.data.rows import Rejections
from pantheraml.errors import ConfigError, DataError, PantheraMLError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CHAT = [USER, BOT]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def data(*rows):
    return Dataset.from_list(list(rows))


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca", {"instruction", "input", "output"}),
        ({"instruction": "a", "output": "c", "text": "d"}, "alpaca", {"instruction", "output"}),
        ({"instruction": "a", "context": "b", "response": "c"}, "alpaca", {"instruction", "context", "response"}),
        ({"messages": CHAT, "prompt": "x"}, "messages", {"messages", "role", "content"}),
        ({"conversations": SHAREGPT}, "messages", {"conversations", "from", "value"}),
        ({"conversations": CHAT}, "messages", {"conversations", "role", "content"}),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", {"prompt", "completion"}),
        ({"question": "a", "answer": "b"}, "prompt_completion", {"question", "answer"}),
        ({"text": "a", "label": 1}, "text", {"text"}),
        ({"story": "a"}, "text", {"story"}),
    ],
)
def test_detection(row, kind, columns):
    format = detect(data(row))
    assert format.kind == kind
    assert set(format.columns.values()) == columns
    assert kind in str(format)


def test_messages_column_must_hold_messages():
    assert detect(data({"messages": "some text", "text": "a"})).kind == "text"


@pytest.mark.parametrize(
    ("overrides", "kind", "columns"),
    [
        ({"format": "text"}, "text", {"text": "text"}),
        ({"text": "body"}, "text", {"text": "body"}),
        ({"prompt": "text", "completion": "body"}, "prompt_completion", {"prompt": "text", "completion": "body"}),
        ({"format": None, "text": None}, "prompt_completion", {"prompt": "prompt", "completion": "completion"}),
        ({"completion": "body"}, "prompt_completion", {"prompt": "prompt", "completion": "body"}),
    ],
)
def test_overrides(overrides, kind, columns):
    format = detect(data({"prompt": "p", "completion": "c", "text": "t", "body": "b"}), overrides=overrides)
    assert (format.kind, format.columns) == (kind, columns)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"format": "alpacca"}, ConfigError, "alpaca"),
        ({"format": "text", "prompt": "a"}, ConfigError, "belongs to the format 'prompt_completion'"),
        ({"text": "a", "prompt": "b"}, ConfigError, "prompt"),
        ({"text": "body"}, DataError, "the columns are: a, b"),
        ({"format": "alpaca"}, DataError, "found: a, b"),
        ({}, DataError, "accepted: messages"),
    ],
)
def test_what_cannot_be_used_says_why(overrides, error, words):
    with pytest.raises(error) as caught:
        detect(data({"a": "x", "b": "y"}), overrides=overrides, where="file.jsonl")
    assert words in str(caught.value)


def test_preference_data_is_called_so():
    with pytest.raises(DataError, match="preference data"):
        detect(data({"chosen": "x", "rejected": "y"}))


def rows_of(dataset, tokenizer, **overrides):
    return to_training_rows(dataset, detect(dataset, overrides=overrides), tokenizer)


def test_alpaca_rows_have_the_published_prompt_and_end(tiny_tokenizer):
    rows = rows_of(
        data(
            {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hello {input}"},
            {"instruction": "Greet.", "input": None, "output": "Hi</s>"},
        ),
        tiny_tokenizer,
    )
    assert rows.column_names == ["text"]
    assert rows["text"][:] == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n"
        "### Response:\n3</s>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHello {input}</s>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHi</s>",
    ]
    assert alpaca_prompt("Greet.").endswith("### Response:\n")


def test_the_same_chat_from_either_spelling(tiny_tokenizer):
    for row in ({"messages": CHAT}, {"conversations": SHAREGPT}):
        assert rows_of(data(row), tiny_tokenizer).to_list() == [{"messages": CHAT}]


def test_keys_and_tools_of_messages_survive(tiny_tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    answer = {"role": "tool", "content": "4", "name": "f"}
    row = {"messages": [USER, call, answer, BOT], "tools": "[]"}
    [out] = rows_of(data(row), tiny_tokenizer).to_list()
    assert out["messages"][1]["tool_calls"] == call["tool_calls"]
    assert out["messages"][1]["content"] == ""
    assert out["messages"][2]["name"] == "f"
    assert out["tools"] == "[]"


def test_chats_need_a_template(tiny_tokenizer):
    bare = type("Bare", (), {"chat_template": None, "eos_token": "</s>"})()
    for row in ({"messages": CHAT}, {"prompt": [USER], "completion": [BOT]}):
        with pytest.raises(DataError, match="no chat template") as caught:
            rows_of(data(row), bare)
        assert "instruct" in caught.value.hint
        rows_of(data(row), tiny_tokenizer)
    assert rows_of(data({"text": "a"}), bare)["text"][:] == ["a</s>"]


def test_prompts_are_left_alone_and_questions_get_a_line(tiny_tokenizer):
    assert rows_of(data({"prompt": "2+3=", "completion": "5"}), tiny_tokenizer)[0] == {
        "prompt": "2+3=",
        "completion": "5",
    }
    row = rows_of(data({"question": "2+3?", "answer": "5"}), tiny_tokenizer)[0]
    assert row == {"prompt": "2+3?\n", "completion": "5"}
    row = rows_of(data({"question": "2+3?", "answer": " 5"}), tiny_tokenizer)[0]
    assert row == {"prompt": "2+3?", "completion": " 5"}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        pytest.param(None, "null", id="null"),
        pytest.param([], "empty conversation", id="empty"),
        pytest.param([USER, {"role": "alien", "content": "x"}], "unknown role: 'alien' in message 2", id="role"),
        pytest.param([USER, {"role": None, "content": "x"}], "unknown role: None", id="no-role"),
        pytest.param([USER, USER, BOT], "two user messages in a row: messages 1 and 2", id="two-users"),
        pytest.param([USER, BOT, BOT], "two assistant messages in a row", id="two-answers"),
        pytest.param(
            [*CHAT, {"role": "system", "content": "x"}], "system message in the middle: message 3", id="system"
        ),
        pytest.param([{"role": "user", "content": " "}, BOT], "empty string", id="blank"),
        pytest.param([USER, {"role": "assistant", "content": None}], "null", id="no-content"),
        pytest.param([USER, {"role": "assistant", "content": "a\x00"}], "NUL", id="nul"),
        pytest.param([USER], "no assistant message", id="no-answer"),
    ],
)
def test_bad_conversations(chat, reason):
    dataset = data({"messages": CHAT}, {"messages": chat}, {"messages": CHAT})
    with pytest.raises(DataError) as caught:
        check(dataset, detect(dataset), origin=lambda index: f"chats.jsonl:{index + 1}")
    assert f"chats.jsonl:2: {reason}" in str(caught.value)
    tolerant = Rejections(0.5)
    tolerant.total = 3
    assert len(check(dataset, detect(dataset), rejections=tolerant)) == 2
    assert len(tolerant) == 1


def checked(dataset):
    """The rows that pass and why the others do not."""
    rejections = Rejections(0.99)
    rejections.total = len(dataset)
    try:
        good = check(dataset, detect(dataset), rejections=rejections)
    except DataError as error:
        return str(error)
    # The order of a message's keys counts too: templates see it.
    return [[(name, repr(value)) for name, value in row.items()] for row in good], list(rejections)


CONTENTS = st.sampled_from(
    ["hi", "", " ", "\u2003\n", "\x1f", "\x85", "\u200b", "\ufeff", "\U000f0000", "a\x00", "é", None]
) | st.text(max_size=3)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "User", "x", None])
GOOD = st.just(CHAT) | st.just([{"role": "system", "content": "s"}, *CHAT, USER, {"role": "tool", "content": "1"}, BOT])
ANY_CHAT = st.none() | st.lists(st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}), max_size=4)


TOOLS = st.sampled_from([None, "", "[]", "[1]"])


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_columns_are_checked_as_rows_are(data):
    bad = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, 4))
    if data.draw(st.booleans()):
        good, other = data.draw(st.lists(GOOD, min_size=1, max_size=5)), data.draw(st.lists(ANY_CHAT, max_size=bad))
        chats = [*good[:at], *other, *good[at:]]
        if data.draw(st.booleans()):
            names = {"user": "human", "assistant": "gpt"}
            keys = data.draw(st.permutations(["from", "value"]))

            def turn(message):
                values = {"from": names.get(message["role"], message["role"]), "value": message["content"]}
                return {key: values[key] for key in keys}

            chats = [chat and [turn(message) for message in chat] for chat in chats]
        column = {data.draw(st.sampled_from(["messages", "conversations"])): chats}
        if data.draw(st.booleans()):
            tools = data.draw(st.lists(TOOLS, min_size=len(chats), max_size=len(chats)))
            lists = {None: None, "": [], "[]": [{"name": "a"}], "[1]": [{"name": "b"}] * 2}
            column["tools"] = [lists[tool] for tool in tools] if data.draw(st.booleans()) else tools
    else:
        texts = ["a", *data.draw(st.lists(CONTENTS, max_size=3))]
        column = {"text": texts} if bad else {"prompt": texts, "completion": texts[::-1]}
    dataset = Dataset.from_dict(column)
    if data.draw(st.booleans()):
        dataset = dataset.select(data.draw(st.permutations(range(len(dataset)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "checked_by_column", lambda *args: None)
        expected = checked(dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BATCH", data.draw(st.integers(1, 3)))
        assert checked(dataset) == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ({"messages": [CHAT] * 3}, None),
        ({"text": ["a"] * 3}, None),
        ({"prompt": ["a"] * 3, "completion": ["b"] * 3}, None),
        ({"messages": [CHAT] * 3, "tools": ["[1]"] * 3}, None),
        ({"messages": [CHAT] * 3, "tools": [None, "", ""]}, {"messages": [CHAT] * 3}),
        ({"conversations": [SHAREGPT] * 3}, {"messages": [CHAT] * 3}),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_that_pass_are_not_looked_at_one_by_one(column, expected, shuffled, monkeypatch):
    monkeypatch.setattr(formats, "from_rows", None)
    dataset = Dataset.from_dict(column | {"more": [1] * 3})
    dataset = dataset.select([2, 0, 1]) if shuffled else dataset
    assert check(dataset, detect(dataset)).to_dict() == (expected or column)


def test_what_a_data_set_shows_is_checked_not_what_it_stores():
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    shown = dataset.with_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    assert check(shown, detect(dataset))["text"][:] == ["A", "B", "C"]
    assert check(dataset.select([2, 0]), detect(dataset))["text"][:] == ["c", "a"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "output": "b"}, "null: 'instruction'"),
        ({"instruction": "a", "output": "  "}, "empty string: 'output'"),
        ({"instruction": "a", "output": "b\x00"}, "NUL character in 'output'"),
    ],
)
def test_bad_alpaca_rows(row, reason):
    dataset = data({"instruction": "a", "output": "b"}, row)
    with pytest.raises(DataError, match=f"row 2: {reason}"):
        check(dataset, detect(dataset))


def test_wrong_type_in_a_whole_column():
    dataset = data({"prompt": "a", "completion": 5})
    with pytest.raises(DataError, match="wrong type: 'completion' is number, not text"):
        check(dataset, detect(dataset))


def test_many_rows_keep_their_order(tiny_tokenizer):
    dataset = Dataset.from_dict({"text": [str(index) for index in range(2500)]})
    assert render(check(dataset, detect(dataset)), "text", tiny_tokenizer)["text"][:] == [
        f"{i}</s>" for i in range(2500)
    ]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 400), size=st.integers(1, 60), data=st.data())
def test_windows_cover_everything_once_but_the_overlap(length, size, data):
    stride = data.draw(st.integers(0, size - 1))
    found = windows(length, size, stride)
    assert [index for start, stop in found for index in range(start, stop)][:1] == ([0] if length else [])
    for (start, stop), (following, end) in itertools.pairwise(found):
        assert stop - following == stride
        assert stop - start == size
        assert end > stop
    assert (found[-1][1] if found else 0) == length


def test_chunks_of_documents(tiny_tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 8
    ids = tiny_tokenizer(text)["input_ids"] + [tiny_tokenizer.eos_token_id]
    chunks = chunk_documents([text, " ", "hello"], tiny_tokenizer, chunk_size=32, stride=8)["input_ids"][:]
    assert chunks[0] == ids[:32]
    assert chunks[1] == ids[24:56]
    assert chunks[0][0] == tiny_tokenizer.bos_token_id
    ends = [chunk[-1] == tiny_tokenizer.eos_token_id for chunk in chunks]
    assert ends == [False] * (len(chunks) - 2) + [True, True]
    for size, stride in ((0, 0), (8, 8), (8, -1)):
        with pytest.raises(ConfigError):
            chunk_documents([text], tiny_tokenizer, chunk_size=size, stride=stride)
    with pytest.raises(DataError, match="empty"):
        chunk_documents([" "], tiny_tokenizer)


def test_standardize_sharegpt():
    dataset = data({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT], "id": 1})
    assert standardize_data_formats is standardize_sharegpt
    [row] = standardize_sharegpt(dataset).to_list()
    assert row == {"conversations": [{"role": "system", "content": "s"}, *CHAT], "id": 1}
    assert standardize_sharegpt(standardize_sharegpt(dataset)).to_list() == [row]
    assert list(standardize_sharegpt(dataset.to_iterable_dataset())) == [row]
    other = data({"text": "a"})
    assert standardize_sharegpt(other) is other

    odd = data({"conversations": [{"who": "Q", "says": "one"}, {"who": "A", "says": "two"}, {"who": "Q", "says": "x"}]})
    [row] = standardize_sharegpt(odd, aliases_for_user=["Q"], aliases_for_assistant=["A"]).to_list()
    assert [message["role"] for message in row["conversations"]] == ["user", "assistant", "user"]
    for error in (TypeError, PantheraMLError):
        with pytest.raises(error, match="unknown role 'Q'"):
            standardize_sharegpt(odd)
    processor = type("Processor", (), {"image_processor": None})()
    [row] = standardize_sharegpt(dataset, processor).to_list()
    assert row["conversations"][1]["content"] == [{"type": "text", "text": "hi"}]


def test_remove_special_tokens(tiny_tokenizer):
    assert remove_special_tokens(tiny_tokenizer, "<s>hi<s>") == "hi<s>"
    assert remove_special_tokens(tiny_tokenizer, "hi") == "hi"

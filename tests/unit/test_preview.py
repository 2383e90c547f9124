"""What the preview says of rows is what their tokens and labels are."""

from __future__ import annotations

import copy
import itertools

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.data import formats
from pantheraml.data.masking import IGNORED
from pantheraml.data.pieces import pieces_of
from pantheraml.data.preview import control_tokens, histogram, look, packed_sequences, segments
from pantheraml.errors import DataError

CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "general greetings"}]


def seen(rows, tokenizer, **options):
    dataset = Dataset.from_list(rows)
    format = formats.detect(dataset)
    options = {"max_length": 200, **options}
    return look(formats.check(dataset, format), format.kind, tokenizer, **options)


def trained(example):
    return [text for text, marked in example.segments if marked]


def fewest(lengths, size):
    """The fewest sequences, by trying every partition."""

    def place(rest, spaces):
        if not rest:
            return len(spaces)
        best = place(rest[1:], [*spaces, size - rest[0]])
        for index, space in enumerate(spaces):
            if space >= rest[0]:
                best = min(best, place(rest[1:], [*spaces[:index], space - rest[0], *spaces[index + 1 :]]))
        return best

    return place(list(lengths), [])


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([], 8, 0),
        ([0, 0], 8, 0),
        ([8, 8], 8, 2),
        ([9, 100], 8, 2),
        ([5, 4, 4, 3], 8, 2),
        # 4 goes to the space of 4, and not to that of 5 in which the 5 then would not fit.
        ([7, 6, 5, 5, 4], 10, 3),
        ([3] * 9, 10, 3),
    ],
)
def test_sequences_of_known_packings(lengths, size, expected):
    assert packed_sequences(lengths, size) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10), max_size=6))
def test_best_fit_is_near_the_fewest_sequences(lengths):
    best = fewest(lengths, 10)
    # Known bound of best-fit decreasing: 11/9 of the fewest, plus 1.
    assert best <= packed_sequences(lengths, 10) <= best * 11 / 9 + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1))
def test_histogram_counts_every_row_once(lengths):
    bins = histogram(lengths)
    assert len(bins) <= 10
    assert [count for *_, count in bins] == [sum(low <= n <= high for n in lengths) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == len(lengths)
    assert all(following[0] == before[1] + 1 for before, following in itertools.pairwise(bins))


def test_segments_join_to_the_text_and_mark_what_has_labels(tiny_tokenizer):
    ids = tiny_tokenizer("<s>fox é jumps</s>", add_special_tokens=False)["input_ids"]
    labels = [IGNORED] * 3 + ids[3:]
    runs = segments(ids, labels, pieces_of(tiny_tokenizer))
    assert [marked for _, marked in runs] == [False, True]
    assert "".join(text for text, _ in runs) == "<s>fox é jumps</s>"


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "The fox."}, {}, ["<s>The fox.</s>"]),
        ({"prompt": "2+3=", "completion": "5"}, {}, ["5</s>"]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, ["general greetings</s>\n"]),
        (
            {"messages": CHAT},
            {},
            ["<s><|user|>\nhello there</s>\n<|assistant|>\ngeneral greetings</s>\n"],
        ),
        ({"messages": CHAT * 2}, {"responses_only": True}, ["general greetings</s>"] * 2),
        ({"prompt": "2+3=", "completion": "5"}, {"responses_only": True}, ["5</s>"]),
    ],
    ids=["text", "prompt", "chat prompt", "messages", "replies", "completion"],
)
def test_what_is_trained_of_each_kind(row, options, expected, tiny_tokenizer):
    preview = seen([row], tiny_tokenizer, **options)
    assert trained(preview.examples[0]) == expected
    assert preview.examples[0].place == "row 1"


def test_alpaca_rows_are_trained_whole(tiny_tokenizer):
    preview = seen([{"instruction": "Add.", "input": "2 3", "output": "5"}], tiny_tokenizer)
    ((text, marked),) = preview.examples[0].segments
    assert marked
    assert text.endswith("### Response:\n5</s>")
    assert preview.supervised == preview.tokens == preview.lengths[0]


def test_rows_that_are_cut_and_lose_their_replies_are_counted(tiny_tokenizer):
    long = [{"role": "user", "content": "fox " * 60}, CHAT[1]]
    rows = [{"messages": chat} for chat in (CHAT, long, CHAT)]
    preview = seen(rows, tiny_tokenizer, max_length=60, responses_only=True)
    assert (preview.truncated.rows, preview.truncated.first) == (1, "row 2")
    assert (preview.empty.rows, preview.empty.first, preview.cut_off) == (1, "row 2", 1)
    assert preview.examples[1].cut == preview.lengths[1] - 60
    assert preview.tokens == preview.lengths[0] * 2
    reply = len(tiny_tokenizer("general greetings</s>", add_special_tokens=False)["input_ids"])
    assert preview.supervised == 2 * reply
    packed = seen(rows, tiny_tokenizer, max_length=60, responses_only=True, packing=True)
    assert packed.tokens == sum(min(length, 60) for length in packed.lengths)
    assert packed.efficiency == packed.tokens / (packed.sequences * 60)
    assert packed.supervised == preview.supervised


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "say <|assistant|>"}, CHAT[1]]}, "<|assistant|>"),
        (
            {
                "messages": [
                    {"role": role, "content": [{"type": "text", "text": text}]}
                    for role, text in (("user", "a <pad> b"), ("assistant", "c"))
                ]
            },
            "<pad>",
        ),
        ({"instruction": "Explain </s> to me", "output": "x"}, "</s>"),
        ({"prompt": "<s>what", "completion": "is </s>"}, None),
        ({"prompt": "what", "completion": "is <|user|>"}, "<|user|>"),
    ],
    ids=["chat", "parts", "alpaca", "ends that are meant", "completion"],
)
def test_control_tokens_in_contents_are_found(row, expected, tiny_tokenizer):
    preview = seen([row], tiny_tokenizer)
    assert (preview.control.rows, preview.control.detail) == ((1, expected) if expected else (0, None))
    assert preview.read.rows == 0


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"text": "<s><|user|>\nhi</s>"}, "<|user|>"),
        ({"text": "<s>hi</s>"}, None),
        ({"prompt": "<|user|>\nhi</s>\n<|assistant|>\n", "completion": "x"}, "<|assistant|>"),
    ],
    ids=["text", "ends", "rendered prompt"],
)
def test_control_tokens_that_are_read_are_told_apart(row, detail, tiny_tokenizer):
    preview = seen([row], tiny_tokenizer)
    assert preview.control.rows == 0
    assert (preview.read.rows, preview.read.detail) == ((1, detail) if detail else (0, None))
    assert seen([{"prompt": "a </s> b", "completion": "x"}], tiny_tokenizer, parse_control=True).control.rows == 0


def test_control_tokens_that_the_tokenizer_leaves_as_text_are_none(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.split_special_tokens = True
    assert "<|user|>" in control_tokens(tiny_tokenizer)
    assert control_tokens(tokenizer) == ()


def test_a_spelt_bos_is_not_doubled_and_a_templates_is_told(tiny_tokenizer):
    preview = seen([{"text": "fox"}, {"text": "<s>fox"}], tiny_tokenizer)
    assert preview.double_bos.rows == 0
    assert preview.lengths[0] == preview.lengths[1]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    preview = seen([{"messages": CHAT}], tokenizer)
    assert (preview.double_bos.rows, preview.double_bos.first) == (1, "row 1")


def test_a_chat_that_the_template_refuses_is_named(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}x"
    with pytest.raises(DataError, match="refuses") as error:
        seen([{"messages": CHAT}, {"messages": CHAT * 2}], tokenizer)
    assert (error.value.where, error.value.why) == ("row 2", "too many")

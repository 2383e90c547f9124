"""Raw text is cleaned, taken apart, marked and looked over."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.data.text_preprocessing import STRUCTURE_TOKENS
from pantheraml.dataprep import TextPreprocessor
from pantheraml.errors import ArgumentError, ConfigError, DataError

steps = TextPreprocessor()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("", ""),
        (" \n\t\n", ""),
        ("\ufeffone\r\ntwo\rthree\u2028four\ffive", "one\ntwo\nthree\nfour\nfive"),
        ("a  b\t\tc \n", "a b c"),
        ("a\xa0b\u3000c\u2009d", "a b c d"),
        ("one\n\n\n\n two\n   \n\nthree", "one\n\n two\n\nthree"),
        ("def f():\n    return  1\n", "def f():\n    return 1"),
        ("zero\u200bwidth so\xadft nul\x00 bell\x07", "zerowidth soft nul bell"),
        ("e\u0301", "\xe9"),
        ("\u1f468\u200d\u1f469 \U0001f468\u200d\U0001f469", "\u1f468\u200d\u1f469 \U0001f468\u200d\U0001f469"),
        ("half \ud83d pair", "half pair"),
    ],
)
def test_clean_text(text, clean):
    assert steps.clean_text(text) == clean


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(" \t\n\r\u2028\xa0\u200be\u0301a", max_size=12))
def test_cleaning_twice_changes_nothing_and_loses_no_word(text):
    clean = steps.clean_text(text)
    assert steps.clean_text(clean) == clean
    assert "\r" not in clean
    assert "\n\n\n" not in clean
    if text.isascii():
        assert re.findall(r"\w", clean) == re.findall(r"\w", text)


def test_extract_sections_in_the_order_of_the_text():
    text = "# One\nfirst\n# Two\nsecond\n\nNote: careful\n"
    assert steps.extract_sections(text, [r"^Note: (.+?)$", r"^# (.+?)$"]) == ["One", "Two", "careful"]
    assert steps.extract_sections(text, [r"^# Two.*?(?=\n\n)"]) == ["# Two\nsecond"]
    assert steps.extract_sections(text, [r"^# (\w+)|^Note"]) == ["One", "Two"]
    assert steps.extract_sections(text, ["nowhere"]) == steps.extract_sections("", ["a*"]) == []
    with pytest.raises(ConfigError, match="no regular expression"):
        steps.extract_sections(text, ["("])
    with pytest.raises(ArgumentError, match="list"):
        steps.extract_sections(text, "a")


def test_structure_tokens():
    text = (
        "# Title #\nText with # inside\n## Part\n### Piece\n#### too deep\n#no heading\n"
        "```python\n# a comment\n```\n~~~~\n```\n~~~~\nend"
    )
    assert steps.add_structure_tokens(text) == (
        "<|chapter|>Title<|/chapter|>\nText with # inside\n<|section|>Part<|/section|>\n"
        "<|subsection|>Piece<|/subsection|>\n#### too deep\n#no heading\n"
        "<|code|>python\n# a comment\n<|/code|>\n<|code|>\n```\n<|/code|>\nend"
    )
    assert STRUCTURE_TOKENS == (
        "<|chapter|>",
        "<|/chapter|>",
        "<|section|>",
        "<|/section|>",
        "<|subsection|>",
        "<|/subsection|>",
        "<|code|>",
        "<|/code|>",
    )
    assert steps.add_structure_tokens("") == ""
    with pytest.raises(DataError, match=r"does not end(.|\n)*line 2"):
        steps.add_structure_tokens("a\n```\nb")


def test_validate_dataset_counts():
    texts = ["A long enough text.", " ", "A long enough text.", "damaged \ufffd text", "short", "bell \x07 rings on"]
    found = steps.validate_dataset(Dataset.from_dict({"text": texts}))
    assert found == {
        "total_samples": 6,
        "min_length": 1,
        "max_length": 19,
        "avg_length": pytest.approx(sum(map(len, texts)) / 6),
        "empty_samples": 1,
        "repeated_content": 1,
        "encoding_issues": 2,
        "warnings": [
            "1 of 6 rows are empty",
            "1 of 6 rows are repeated",
            "2 of 6 rows are damaged by a wrong encoding or control characters",
            "2 of 6 rows are shorter than 10",
        ],
    }
    assert steps.validate_dataset([{"text": "nothing wrong here"}])["warnings"] == []


def test_validate_dataset_of_tokens_and_of_nothing():
    found = steps.validate_dataset(Dataset.from_dict({"input_ids": [[1] * 12, [1] * 12, [2] * 14]}))
    assert (found["min_length"], found["max_length"], found["repeated_content"]) == (12, 14, 1)
    assert steps.validate_dataset([{"text": None}])["empty_samples"] == 1
    with pytest.raises(DataError, match="no rows"):
        steps.validate_dataset([])
    with pytest.raises(DataError, match="found: a"):
        steps.validate_dataset([{"a": 1}])
    with pytest.raises(DataError, match="found: str"):
        steps.validate_dataset(["a"])


def test_clean_text_takes_text_only():
    with pytest.raises(ArgumentError, match="bytes"):
        steps.clean_text(b"a")

"""Running text becomes chunks: every token once but the overlap, and files of every format."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pantheraml.data import stored
from pantheraml.data.raw_text import chunk_documents, text_chunks, token_chunks
from pantheraml.dataprep import RawTextDataLoader
from pantheraml.errors import ArgumentError, ConfigError, DataError, UnsupportedError

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
documents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80).filter(str.strip)


@st.composite
def cuts(draw):
    size = draw(st.integers(2, 40))
    return size, draw(st.integers(0, size - 1))


@settings(max_examples=100, deadline=None)
@given(text=documents, cut=cuts())
def test_token_chunks_cover_every_token_and_overlap_exactly(tiny_tokenizer, text, cut):
    size, stride = cut
    ids = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    chunks = token_chunks(text, tiny_tokenizer, chunk_size=size, stride=stride)
    joined = chunks[0] + [token for chunk in chunks[1:] for token in chunk[stride:]]
    assert joined in (ids, ids[:-1])
    assert joined == ids or (stride == 0 and len(ids) % size == 1)
    for left, right in itertools.pairwise(chunks):
        assert len(left) == size
        assert left[size - stride :] == right[:stride]
    assert all(1 < len(chunk) <= size for chunk in chunks)


@settings(max_examples=100, deadline=None)
@given(text=documents, cut=cuts())
def test_text_chunks_are_stretches_of_the_text(tiny_tokenizer, text, cut):
    size, stride = cut
    chunks = text_chunks(text, tiny_tokenizer, chunk_size=size, stride=stride)
    assert chunks[-1].endswith("</s>")
    stretches = [*chunks[:-1], chunks[-1].removesuffix("</s>")]
    covered = 0
    for stretch in stretches:
        # Found no later than where the one before ended: nothing between is lost.
        places = [at for at in range(covered + 1) if text.startswith(stretch, at)]
        assert places
        covered = max(covered, places[-1] + len(stretch))
    assert covered == len(text)
    if stride == 0 and text.isascii():
        assert "".join(stretches) == text


def test_text_chunks_have_the_cuts_of_token_chunks(tiny_tokenizer):
    for text in (TEXT, "a" * 50, "fox, fox"):
        chunks = text_chunks(text, tiny_tokenizer, chunk_size=16, stride=4)
        # The plain tokens, without what begins the document.
        plain = tiny_tokenizer(text, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
        again = [tiny_tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in chunks]
        assert again == [plain[start : start + 16] for start in range(0, max(len(plain) - 4, 1), 12)]


def test_white_space_that_a_tokenizer_leaves_out_stays_in_the_text():
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert text_chunks("\n one  two\tthree \n", tokenizer, chunk_size=1, stride=0) == ["\n one  ", "two\t", "three \n"]
    assert text_chunks(" one  two three ", tokenizer, chunk_size=2, stride=1) == [" one  two ", "two three "]


def test_loader_gives_tokens_or_texts(tiny_tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    loader = RawTextDataLoader(tiny_tokenizer, chunk_size=32, stride=8)
    dataset = loader.load_from_file(path)
    assert dataset["input_ids"][:] == chunk_documents([TEXT], tiny_tokenizer, chunk_size=32, stride=8)["input_ids"][:]
    assert dataset.column_names == ["input_ids", "attention_mask", "labels"]
    for row in dataset:
        assert row["labels"] == row["input_ids"]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    texts = loader.load_from_file(str(path), return_tokenized=False)
    assert texts.column_names == ["text"]
    assert texts[0]["text"] == TEXT[: len(texts[0]["text"])]
    assert texts[-1]["text"].endswith("dog. </s>")
    as_text = RawTextDataLoader(tiny_tokenizer, 32, 8, return_tokenized=False)
    assert as_text.load_from_file(path)["text"][:] == texts["text"][:]
    assert as_text.chunk_text(TEXT, return_tokenized=True) == loader.chunk_text(TEXT)
    assert loader.chunk_text("fox") == loader.smart_chunk_text("fox", 32, 8)
    assert [len(chunk["input_ids"]) for chunk in loader.smart_chunk_text(TEXT, 4, 0)][:2] == [4, 4]


def test_processors_lend_their_tokenizer(tiny_tokenizer):
    class Processor:
        tokenizer = tiny_tokenizer

        def __call__(self, images):
            raise AssertionError("the processor itself is for images")

    assert RawTextDataLoader(Processor()).chunk_text("fox") == RawTextDataLoader(tiny_tokenizer).chunk_text("fox")


def test_an_end_that_is_there_is_not_repeated(tiny_tokenizer):
    loader = RawTextDataLoader(tiny_tokenizer, 32, 8)
    assert loader.chunk_text("fox</s>") == loader.chunk_text("fox")
    assert loader.chunk_text("fox</s>", return_tokenized=False) == ["fox</s>"]


FILES = {
    "a.txt": "one\ntwo",
    "b.md": "one\ntwo",
    "c.json": json.dumps([{"text": "one\ntwo", "id": 1}, {"text": "thrée"}]),
    "d.jsonl": json.dumps({"text": "one\ntwo"}) + "\n\n" + json.dumps({"text": "thrée"}) + "\n",
    "e.csv": 'text,id\n"one\ntwo",1\nthrée,2\n',
    "f.log": "one\ntwo",
}


@pytest.mark.parametrize(("name", "format"), [*zip(FILES, ["txt", "md", "json", "jsonl", "csv", "txt"])])
def test_formats(tiny_tokenizer, tmp_path, name, format):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    loader = RawTextDataLoader(tiny_tokenizer, return_tokenized=False)
    assert loader.detect_format(path) == loader.detect_format(name.upper()) == format
    expected = ["one\ntwo</s>"] + (["thrée</s>"] if format in ("json", "jsonl", "csv") else [])
    assert loader.load_from_file(path)["text"][:] == expected


def test_several_files_keep_their_order_and_do_not_mix(tiny_tokenizer, tmp_path):
    paths = []
    for name in ("b.txt", "a.md", "c.jsonl"):
        paths.append(tmp_path / name)
        paths[-1].write_text(FILES["d.jsonl"] if name == "c.jsonl" else f"text of {name}", encoding="utf-8")
    loader = RawTextDataLoader(tiny_tokenizer, return_tokenized=False)
    expected = ["text of b.txt</s>", "text of a.md</s>", "one\ntwo</s>", "thrée</s>"]
    assert loader.load_from_files(paths)["text"][:] == expected
    ids = loader.load_from_files(paths, return_tokenized=True)["input_ids"][:]
    assert [tiny_tokenizer.decode(row) for row in ids] == ["<s>" + text for text in expected]


def test_chunks_of_many_documents_lie_in_a_file(tiny_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"fox {number} " * 9}) + "\n" for number in range(2500)))
    loader = RawTextDataLoader(tiny_tokenizer, 16, 4)
    in_memory = loader.load_from_file(path)
    monkeypatch.setattr(stored, "MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    in_file = loader.load_from_file(path)
    assert in_file.cache_files
    assert not in_memory.cache_files
    assert in_file[:] == in_memory[:]
    assert in_file.features == in_memory.features


def test_a_huge_line(tiny_tokenizer, tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("fox " * 100_000)
    ids = RawTextDataLoader(tiny_tokenizer, 2048, 512).load_from_file(path)["input_ids"][:]
    total = len(tiny_tokenizer("fox " * 100_000, verbose=False)["input_ids"]) + 1
    assert sum(map(len, ids)) - 512 * (len(ids) - 1) == total


@pytest.mark.parametrize("content", ["", " \n\t\n ", '[{"text": ""}]', '{"text": null}\n'])
@pytest.mark.parametrize("suffix", ["txt", "md", "json", "jsonl", "csv"])
def test_files_without_text(tiny_tokenizer, tmp_path, content, suffix):
    if content.startswith(("[", "{")) != (suffix in ("json", "jsonl")):
        content = "text\n" if suffix == "csv" else ""
    path = tmp_path / f"empty.{suffix}"
    path.write_text(content)
    for error in (ValueError, DataError):
        with pytest.raises(error, match="empty"):
            RawTextDataLoader(tiny_tokenizer).load_from_file(path)


def test_files_that_cannot_be_used(tiny_tokenizer, tmp_path):
    loader = RawTextDataLoader(tiny_tokenizer)
    with pytest.raises(DataError, match=r"no text file(.|\n)*nowhere\.txt"):
        loader.load_from_file(tmp_path / "nowhere.txt")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no column 'text'(.|\n)*a, b"):
        loader.load_from_file(tmp_path / "rows.csv")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="holds int"):
        loader.load_from_file(tmp_path / "numbers.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        loader.load_from_file(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text("  ")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match=r"blank\.txt"):
        loader.load_from_files([tmp_path / "good.txt", tmp_path / "blank.txt"])
    with pytest.raises(ConfigError, match="no file"):
        loader.load_from_files([])
    with pytest.raises(ArgumentError, match="list of paths"):
        loader.load_from_files(tmp_path / "good.txt")


@pytest.mark.parametrize(("size", "stride"), [(0, 0), (-1, 0), (8, 8), (8, 9), (8, -1)])
def test_sizes_out_of_range(tiny_tokenizer, size, stride):
    for error in (ValueError, ConfigError):
        with pytest.raises(error, match=r"chunk_size|stride"):
            RawTextDataLoader(tiny_tokenizer, size, stride)
        with pytest.raises(error, match=r"chunk_size|stride"):
            RawTextDataLoader(tiny_tokenizer).smart_chunk_text("", size, stride)
        with pytest.raises(error, match=r"chunk_size|stride"):
            RawTextDataLoader(tiny_tokenizer).smart_chunk_text("", size, stride, return_tokenized=False)


def test_what_is_no_text_or_no_tokenizer(tiny_tokenizer):
    loader = RawTextDataLoader(tiny_tokenizer)
    assert loader.chunk_text(" ") == loader.chunk_text("", return_tokenized=False) == []
    with pytest.raises(ArgumentError, match="no tokenizer"):
        RawTextDataLoader(None)
    with pytest.raises(ArgumentError, match="not str"):
        loader.chunk_text(b"bytes")
    with pytest.raises(DataError, match="empty"):
        loader.create_causal_dataset([])
    with pytest.raises(ArgumentError, match="mix"):
        loader.create_causal_dataset(["a", *loader.chunk_text("a")])
    with pytest.raises(UnsupportedError, match="slow"):
        text_chunks("a", SimpleNamespace(is_fast=False), chunk_size=8, stride=0)
    assert isinstance(loader.create_causal_dataset(["a", "b"]), Dataset)

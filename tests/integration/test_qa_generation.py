"""Questions about a text from a local model: replies are checked, requests fit, nothing a model says can crash it."""

from __future__ import annotations

import json
import socket
from collections import Counter

import pytest
import torch
from conftest import build_tokenizer, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.data.qa_replies import parse_pairs, parse_ratings
from pantheraml.dataprep import SyntheticDataKit
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, DataError, UnsupportedError

GOOD = {"question": "What is it?", "answer": "A fox."}


@pytest.mark.parametrize(
    ("reply", "pairs", "dropped"),
    [
        (json.dumps([GOOD]), [GOOD], {}),
        (f"Sure!\n```json\n{json.dumps([GOOD], indent=2)}\n```\nMore?", [GOOD], {}),
        (json.dumps({"pairs": [GOOD]}), [GOOD], {}),
        (json.dumps(GOOD), [GOOD], {}),
        ('[{"question": " Ü? ", "answer": "🦊\\n"}]', [{"question": "Ü?", "answer": "🦊"}], {}),
        (json.dumps([GOOD, {**GOOD, "question": "WHAT is it?"}]), [GOOD], {"repeated": 1}),
        (json.dumps([GOOD]) + '[{"question": "Cut', [GOOD], {"broken json": 1}),
        ('[{"question": "a" "answer": "b"}, ' + json.dumps(GOOD), [GOOD], {"broken json": 1}),
        ('{"pairs": [' + json.dumps(GOOD) + ', {"question', [GOOD], {"broken json": 2}),
        (json.dumps([{**GOOD, "extra": 1}, {"question": "q"}, {"question": 1, "answer": "a"}]), [], {"wrong form": 3}),
        (json.dumps([{"question": " ", "answer": "a"}, {"question": "q", "answer": ""}]), [], {"empty": 2}),
        ('{"question": "q\\ud83d", "answer": "a"}{"question": "q", "answer": "\\u0000"}', [], {"damaged text": 2}),
        ("", [], {"no json": 1}),
        ("I cannot do that.", [], {"no json": 1}),
        ("{" * 5, [], {"broken json": 5}),
    ],
)
def test_replies(reply, pairs, dropped):
    counts = Counter()
    assert parse_pairs(reply, counts) == pairs
    assert counts == dropped


def test_replies_do_not_repeat_what_is_known():
    counts = Counter()
    assert parse_pairs(json.dumps([GOOD]), counts, [{"question": "what IS it?", "answer": ""}]) == []
    assert counts == {"repeated": 1}


@settings(max_examples=200, deadline=None)
@given(st.text('{}[]":,question answer\\0', max_size=60) | st.text(max_size=40))
def test_no_reply_crashes(reply):
    for pair in parse_pairs(reply, Counter()):
        assert set(pair) == {"question", "answer"}
    parse_ratings(reply, 4)


def test_deeply_nested_reply():
    assert parse_pairs('{"a":' * 3000, Counter()) == []


def test_ratings():
    rows = [{"id": 0, "rating": 7}, {"id": 0, "rating": 1}, {"id": 1, "rating": 10.5}, {"id": True, "rating": 2}]
    rows += [{"id": 2, "rating": "9"}, {"id": 3, "rating": True}, {"id": 9, "rating": 5}, {"rating": 5}]
    assert parse_ratings(json.dumps(rows), 4) == {0: 7.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "model"
    make_tiny("llama", max_position_embeddings=2048).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def kit(model_dir, tmp_path):
    kit = SyntheticDataKit.from_pretrained(model_name=str(model_dir), max_seq_length=900, load_in_4bit=False)
    kit.prepare_qa_generation(output_folder=tmp_path / "data", max_generation_tokens=40, overlap=8, default_num_pairs=1)
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    return kit


def scripted(monkeypatch, kit, *replies):
    asked = []

    def reply(request, **options):
        asked.append((request, options))
        return replies[min(len(asked), len(replies)) - 1]

    monkeypatch.setattr(kit, "_reply", reply)
    return asked


def test_chunks_cover_the_document_and_fit(kit, tmp_path):
    names = kit.chunk_data(tmp_path / "fox.txt")
    assert len(names) > 2
    assert names[1] == str(tmp_path / "data" / "chunks" / "fox_1.txt")
    text, covered = (tmp_path / "fox.txt").read_text(), 0
    for name in names:
        with open(name, newline="") as file:
            chunk = file.read()
        start = text.rindex(chunk, 0, covered + len(chunk))
        assert start <= covered
        assert start == 0 or start < covered
        covered = start + len(chunk)
        assert kit._room(chunk) > 0
    assert covered == len(text)


def test_a_real_model_writes_nothing_useful_and_nothing_breaks(kit, tmp_path):
    names = kit.chunk_data(tmp_path / "fox.txt")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with kit:
        first = kit._reply("hello", temperature=0.7, top_p=0.95)
        kit._requests = 0
        assert kit._reply("hello", temperature=0.7, top_p=0.95) == first
        assert kit._reply("hello", temperature=0.7, top_p=0.95) != first
        greedy = kit._reply("hello", temperature=0, top_p=0.95)
        assert kit._reply("hello", temperature=0, top_p=0.95) == greedy
        dataset = kit.generate_qa(names[:2])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert kit._loaded is None
    assert dataset.column_names == ["question", "answer", "source"]
    assert len(dataset) == 0
    assert sum(kit.dropped.values()) >= 4
    assert (tmp_path / "data" / "qa_pairs.jsonl").read_text() == ""


def test_pairs_are_collected_over_chunks_and_requests(kit, tmp_path, monkeypatch):
    names = kit.chunk_data(tmp_path / "fox.txt")[:2]
    others = [{"question": f"Q{i}?", "answer": "ü"} for i in range(3)]
    replies = [[GOOD], "nonsense", [others[0]], [GOOD], [others[1]], [others[2]]]
    asked = scripted(monkeypatch, kit, *(json.dumps(reply) for reply in replies))
    dataset = kit.generate_qa(names, num_pairs=2)
    expected = [
        {**GOOD, "source": names[0]},
        {**others[0], "source": names[0]},
        {**others[1], "source": names[1]},
        {**others[2], "source": names[1]},
    ]
    assert dataset.to_list() == expected
    lines = (tmp_path / "data" / "qa_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert kit.dropped == {"no json": 1, "repeated": 1}
    assert len(asked) == 6
    with open(names[0], newline="") as file:
        assert file.read() in asked[0][0]
    assert asked[0][1] == {"temperature": 0.7, "top_p": 0.95}
    assert not list((tmp_path / "data").glob("*.part"))


def test_asking_ends(kit, tmp_path, monkeypatch):
    names = kit.chunk_data(tmp_path / "fox.txt")
    asked = scripted(monkeypatch, kit, json.dumps([GOOD]))
    assert len(kit.generate_qa(names[0], num_pairs=3)) == 1
    assert len(asked) == 6


def test_pairs_below_the_rating_are_dropped(kit, tmp_path, monkeypatch):
    kit.prepare_qa_generation(tmp_path / "data", 500, overlap=8, cleanup_threshold=6, cleanup_batch_size=2)
    (tmp_path / "short.txt").write_text("fox")
    monkeypatch.setattr(kit, "max_seq_length", 2000)
    pairs = [{"question": f"Q{i}?", "answer": "a"} for i in range(3)]
    ratings = json.dumps([{"id": 0, "rating": 6}, {"id": 1, "rating": 5.5}]), "no idea"
    asked = scripted(monkeypatch, kit, json.dumps(pairs), *ratings)
    dataset = kit.generate_qa(tmp_path / "short.txt", num_pairs=3)
    assert dataset["question"][:] == ["Q0?"]
    assert kit.dropped == {"rated low": 1, "not rated": 1}
    assert [options["temperature"] for _, options in asked] == [0.7, 0.3, 0.3]


def test_ratings_that_do_not_fit_are_asked_for_in_smaller_requests(kit, tmp_path, monkeypatch):
    pairs = [{"question": f"Q{i}?", "answer": "a" * 30} for i in range(3)]
    kit.prepare_qa_generation(tmp_path, 500)
    asked = scripted(monkeypatch, kit, '[{"id": 0, "rating": 9}, {"id": 1, "rating": 8}]')
    monkeypatch.setattr(kit, "max_seq_length", 2000)
    assert kit._rate(pairs) == [9, 8, None]
    monkeypatch.setattr(kit, "max_seq_length", 2000 - kit._room(asked[0][0]) - 1)
    assert kit._rate(pairs) == [9, 9, 8]
    assert len(asked) == 3
    monkeypatch.setattr(kit, "max_seq_length", 600)
    assert kit._rate(pairs) == [None] * 3
    assert len(asked) == 3


def test_no_network_is_touched(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    assert kit.chunk_data(tmp_path / "fox.txt")


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "float8_kv_cache", "conservativeness", "timeout"])
def test_arguments_of_a_server_are_refused(name):
    with pytest.raises(UnsupportedError, match=name):
        SyntheticDataKit("model", **{name: 1})
    with pytest.raises(UnsupportedError, match=name):
        SyntheticDataKit.from_pretrained("model", **{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"max_generation_tokens": 0},
        {"max_generation_tokens": 901},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"overlap": -1},
        {"default_num_pairs": 0},
        {"cleanup_threshold": 0.5},
        {"cleanup_threshold": 11},
        {"cleanup_batch_size": 0},
        {"cleanup_temperature": -1},
    ],
    ids=str,
)
def test_values_out_of_range(kit, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        kit.prepare_qa_generation(**options)


def test_what_cannot_be_done_says_why(kit, model_dir, tmp_path):
    fox = tmp_path / "fox.txt"
    fresh = SyntheticDataKit(str(model_dir))
    for call in (fresh.chunk_data, fresh.generate_qa):
        with pytest.raises(ConflictError, match="prepare_qa_generation"):
            call(fox)
    with pytest.raises(ConfigError, match="num_pairs"):
        kit.generate_qa(fox, num_pairs=0)
    with pytest.raises(DataError, match=r"too long(.|\n)*chunk_data"):
        kit.generate_qa(fox)
    with pytest.raises(DataError, match="no text file"):
        kit.chunk_data(tmp_path / "nowhere.txt")
    kit.prepare_qa_generation(tmp_path, max_generation_tokens=600)
    with pytest.raises(ConfigError, match="leaves"):
        kit.chunk_data(fox)
    unknown = SyntheticDataKit(str(model_dir), load_in_5bit=True)
    unknown.prepare_qa_generation(tmp_path)
    with pytest.raises(ArgumentError, match="load_in_5bit"):
        unknown.chunk_data(fox)

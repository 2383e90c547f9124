"""Data files are read row by row; every bad row is named with its file, line and reason."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pantheraml.data import json_rows, stored
from pantheraml.data.json_rows import read_json
from pantheraml.data.rows import Rejections
from pantheraml.data.sources import load, load_text
from pantheraml.data.streams import open_stream
from pantheraml.errors import ConfigError, DataError

GOOD = b'{"text": "ok"}'


@pytest.fixture(autouse=True, params=["memory", "file"])
def _kept(request, tmp_path, monkeypatch):
    """All of it with rows in memory, and with rows in a mapped file."""
    datasets.disable_progress_bars()
    if request.param == "file":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
        monkeypatch.setattr(stored, "MEMORY_BYTES", 0)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"text": ', "broken json: Expecting value at column 10", id="broken"),
        pytest.param(b'{"text": "a"} {', "broken json: Extra data at column 15", id="two-values"),
        pytest.param(b'{"text": "a', "broken json: Unterminated string", id="cut-off"),
        pytest.param(b'["a"]', "not an object: list", id="list"),
        pytest.param(b'"a"', "not an object: text", id="string"),
        pytest.param(b"null", "null where an object is expected", id="null"),
        pytest.param(b"{}", "empty object", id="empty"),
        pytest.param(b'{"text": 5}', "wrong type: 'text' is number where other rows have text", id="number"),
        pytest.param(b'{"text": ["a"]}', "wrong type: 'text' is list where other rows have text", id="list-value"),
        pytest.param(b'{"text": true}', "wrong type: 'text' is true or false", id="bool"),
        pytest.param(b'{"text": "a\x00b"}', "NUL character", id="nul-byte"),
        pytest.param(rb'{"text": "a\u0000b"}', "NUL character", id="nul-escaped"),
        pytest.param(rb'{"text": "a\ud83d"}', r"lone surrogate: \ud83d", id="surrogate"),
        pytest.param(rb'{"text": {"a": ["\uDC00"]}}', r"lone surrogate: \udc00", id="surrogate-inside"),
        pytest.param(b'{"text": "\xe9t\xe9"}', "not UTF-8: byte 0xe9 at column 11", id="latin-1"),
        pytest.param(b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed", id="encoded-surrogate"),
        pytest.param(b'{"text": "a", "text": "b"}', "duplicate key: 'text'", id="key-twice"),
        pytest.param(b'{"text": NaN}', "not json: the number NaN", id="nan"),
        pytest.param(b'{"text": "a", "n": 1' + b"0" * 30 + b"}", "beyond 64 bits", id="huge-number"),
        pytest.param(b'{"a":' * 200_000, "nested too deeply", id="deep"),
    ],
)
def test_bad_line_is_named_and_can_be_dropped(tmp_path, line, reason):
    path = write(tmp_path / "rows.jsonl", b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "1 of 4 rows" in str(caught.value)
    assert caught.value.exit_code == 3

    loaded = load(path, max_bad_fraction=0.25)
    assert loaded.dataset["text"][:] == ["ok"] * 3
    assert [item.where for item in loaded.rejections] == [f"{path}:3"]
    assert [loaded.origin(index) for index in range(3)] == [f"{path}:{line}" for line in (1, 2, 4)]
    with pytest.raises(DataError):
        load(path, max_bad_fraction=0.24)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, id="bom"),
        pytest.param(GOOD + b"\r\n" + GOOD + b"\r\n", id="crlf"),
        pytest.param(b"\n\n" + GOOD + b"\n  \n" + GOOD, id="empty-lines"),
    ],
)
def test_harmless_oddities_are_accepted(tmp_path, content):
    loaded = load(write(tmp_path / "rows.jsonl", content))
    assert loaded.dataset["text"][:] == ["ok", "ok"]
    assert len(loaded.rejections) == 0


def test_escaped_characters_outside_the_plane_survive(tmp_path):
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": "\U0001f600 é"}))
    assert load(path).dataset["text"][:] == ["\U0001f600 é"]


def test_long_row_is_kept_whole(tmp_path):
    text = "x" * 10_000_000
    assert load(write(tmp_path / "rows.jsonl", json.dumps({"text": text}))).dataset[0]["text"] == text
    assert load(write(tmp_path / "rows.csv", f"text\n{text}\n")).dataset[0]["text"] == text


def test_first_ten_and_totals_are_listed(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"\n".join([b"[1]"] * 12 + [b"{"] * 3 + [GOOD]))
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert message.count(f"{path}:") == 10
    assert "and 5 more" in message
    assert "12 x not an object, 3 x broken json" in message


def test_rejected_rows_are_written_as_json(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD + b'\n{"text": "\xff"}\n')
    loaded = load(path, max_bad_fraction=0.5)
    loaded.rejections.write(tmp_path / "out" / "rejected.jsonl")
    [record] = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert record["where"] == f"{path}:2"
    assert record["reason"].startswith("not UTF-8")
    assert record["row"] == '{"text": "\\xff"}'


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        pytest.param('[{"text": "a"},\n {"text": "b"}]', ["a", "b"], id="array"),
        pytest.param('{"data": [{"text": "a"}], "version": 1}', ["a"], id="wrapped"),
        pytest.param('{"text": "a"}\n{"text": "b"}\n', ["a", "b"], id="lines-named-json"),
        pytest.param('{"text": "a"}', ["a"], id="one-object"),
        pytest.param("\ufeff[]", None, id="empty-array"),
        pytest.param(" \n", None, id="blank"),
    ],
)
def test_json_layouts(tmp_path, content, texts):
    path = write(tmp_path / "rows.json", content)
    if texts is None:
        with pytest.raises(DataError, match="empty"):
            load(path)
    else:
        assert load(path).dataset["text"][:] == texts


def test_array_rows_have_lines_and_a_broken_one_stops(tmp_path):
    path = write(tmp_path / "rows.json", '[{"text": "a"},\n7,\n{"text": "b"},\n{"text": "b", "text": "c"}]')
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"{path}:2: not an object: number" in str(caught.value)
    assert f"{path}:4: duplicate key" in str(caught.value)
    assert load(path, max_bad_fraction=0.5).origin(1) == f"{path}:3"
    for content in (
        '[{"text": "a"},\n{"text": ',
        '[{"text": "a"}\n',
        '[{"text": "a"}\n{"text": "a"}]',
        "[1,]",
        "[1] x",
    ):
        broken = write(tmp_path / "broken.json", content)
        with pytest.raises(DataError, match="broken json") as caught:
            load(broken, max_bad_fraction=0.9)
        assert caught.value.where.startswith(f"{broken}:")


@pytest.mark.parametrize(
    ("content", "reason", "line"),
    [
        pytest.param(b'a,b\n"x\ny",1\nz\n', "wrong number of fields: 1", 4, id="short"),
        pytest.param(b"a,b\n1,2\n1,2,3\n", "wrong number of fields: 3", 3, id="long"),
        pytest.param(b"a,b\n1,2\n1,\xff\n", "not UTF-8: byte 0xff", 3, id="latin-1"),
        pytest.param(b"a,b\n1,2\n1,\x00\n", "NUL character", 3, id="nul"),
        pytest.param(b'a,b\n1,2\n1,"x', "broken csv", 3, id="open-quote"),
    ],
)
def test_bad_csv_rows(tmp_path, content, reason, line):
    path = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"{path}:{line}: {reason}" in str(caught.value)
    assert len(load(path, max_bad_fraction=0.5).dataset) == 1


def test_csv_dialects_and_header(tmp_path):
    for name, content in (("a.csv", "\ufeffa,b\r\n1,2\r\n"), ("b.csv", "a;b\n1;2\n"), ("c.tsv", "a\tb\n1\t2\n")):
        assert load(write(tmp_path / name, content)).dataset[0] == {"a": "1", "b": "2"}
    with pytest.raises(DataError, match="'a' stands twice"):
        load(write(tmp_path / "d.csv", "a,a\n1,2\n"))


def test_parquet_and_saved_folder(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for source in ("rows.parquet", "saved"):
        assert load(tmp_path / source).dataset["text"][:] == ["a", "b", "c"]
    with pytest.raises(DataError, match="cannot be read"):
        load(write(tmp_path / "junk.parquet", "junk"))


@pytest.mark.parametrize("read", [lambda path: load(path), lambda path: open_stream(path).head()])
def test_a_column_that_stands_twice_in_a_parquet_file(tmp_path, read):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="the column 'text' stands twice"):
        read(tmp_path / "rows.parquet")


def test_folder_splits_and_slices(tmp_path):
    folder = tmp_path / "data"
    write(folder / "train-0.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    write(folder / "train-1.jsonl", '{"text": "c", "extra": 1}\n')
    write(folder / "test.jsonl", '{"text": "t"}\n')
    write(folder / "LICENSE.txt", "do what you like")
    write(folder / ".hidden.jsonl", "{")
    assert load(folder).dataset["text"][:] == ["a", "b", "c"]
    assert load(folder, split="test").dataset["text"][:] == ["t"]
    assert load(folder, split="train[1:]").dataset["text"][:] == ["b", "c"]
    assert load(folder, split="train[:67%]").dataset["text"][:] == ["a", "b"]
    assert load(folder, split="train[1:]").origin(1) == f"{folder / 'train-1.jsonl'}:1"
    with pytest.raises(DataError, match="no split 'validation'") as caught:
        load(folder, split="validation")
    assert "test, train" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be understood"):
        load(folder, split="train[")
    write(folder / "more.csv", "text\nx\n")
    with pytest.raises(DataError, match="mixes"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", ""),
        ("rows.json", "[]"),
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.csv", "a,b\n"),
        ("r.txt", ""),
    ],
)
def test_no_rows(tmp_path, name, content):
    with pytest.raises(DataError, match="the data set is empty") as caught:
        load(write(tmp_path / name, content))
    assert caught.value.hint


def test_nothing_there(tmp_path):
    (tmp_path / "none").mkdir()
    for spec in (tmp_path / "rows.jsonl", "./rows.jsonl", "rows.csv", "/a/b/c"):
        with pytest.raises(DataError, match="there is no data file"):
            load(spec)
    with pytest.raises(DataError, match="holds no data file"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match="are not read"):
        load(write(tmp_path / "rows.docx", "x"))
    with pytest.raises(DataError, match="could not be loaded") as caught:
        load("nobody/nothing")
    assert caught.value.hint
    with pytest.raises(DataError, match="UTF-16"):
        load(write(tmp_path / "rows.jsonl", '{"text": "a"}'.encode("utf-16")))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_tolerance_out_of_range(tmp_path, fraction):
    with pytest.raises(ConfigError):
        load(write(tmp_path / "rows.jsonl", GOOD), max_bad_fraction=fraction)


def test_text_files_are_documents(tmp_path):
    loaded = load(write(tmp_path / "a.txt", "one\r\ntwo"))
    assert loaded.documents
    assert loaded.dataset[0] == {"text": "one\ntwo"}
    assert load_text(write(tmp_path / "notes.md", "# x")).dataset[0] == {"text": "# x"}
    assert load_text(write(tmp_path / "rows.jsonl", '{"text": "a", "n": 1}')).dataset[0] == {"text": "a"}
    with pytest.raises(DataError, match="no column 'text'"):
        load_text(write(tmp_path / "rows.csv", "a,b\n1,2\n"))
    with pytest.raises(DataError, match="empty"):
        load_text(write(tmp_path / "empty.txt", " \n"))
    with pytest.raises(DataError, match="NUL"):
        load_text(write(tmp_path / "nul.txt", "a\n\x00"))


def test_types_are_learnt_over_batches(tmp_path):
    """A column that is null at first and a nested type that turns up late fit in, a contradiction does not."""
    lines = ['{"text": "a", "meta": null}'] * 1000 + ['{"text": "b", "meta": {"k": [1]}}'] * 2
    loaded = load(write(tmp_path / "rows.jsonl", "\n".join(lines)))
    assert loaded.dataset[1001]["meta"] == {"k": [1]}
    with pytest.raises(DataError, match=r"1003: wrong type: 'meta.k\[\]' is text where other rows have number"):
        load(write(tmp_path / "rows.jsonl", "\n".join([*lines, '{"text": "b", "meta": {"k": ["x"]}}'])))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, min_size=1, max_size=5), indent=st.none() | st.just(2), ascii=st.booleans(), data=st.data()
)
def test_arrays_are_read_in_blocks_as_they_are_at_once(tmp_path, values, indent, ascii, data):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    raw = data.draw(st.sampled_from(["", " \n", "\ufeff"])).encode() + text.encode()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + data.draw(st.sampled_from([b"", b"\xff", b"]", b"1.5", b'"'])) + raw[at:]
    path = write(tmp_path / "rows.json", raw)

    def read():
        rejections = Rejections()
        try:
            return list(read_json(path, rejections)), list(rejections)
        except DataError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BLOCK", data.draw(st.integers(1, 30)))
        found = read()
    assert found == read()


def test_little_of_a_large_array_is_held(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.json", json.dumps([{"text": f"{n} " + "x" * 1000} for n in range(2000)]))
    monkeypatch.setattr(json_rows, "_BLOCK", 4096)
    held = []
    grow = json_rows._Window.grow
    monkeypatch.setattr(json_rows._Window, "grow", lambda self, start: (grow(self, start), held.append(len(self.text))))
    assert len(load(path).dataset) == 2000
    assert max(held) < 10 * 4096

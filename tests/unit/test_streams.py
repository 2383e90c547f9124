"""A stream gives the rows of the data set that is read beforehand, and the same bad rows, when they are reached."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import Dataset

from pantheraml.data import formats, readers, sources, streams
from pantheraml.data.streams import open_stream
from pantheraml.errors import ConfigError, DataError, UnsupportedError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def row(number, kind):
    if kind == "messages":
        chat = [{"from": "human", "value": f"hi {number}"}, {"from": "gpt", "value": "hello"}]
        return {"conversations": chat[:1] if number == 7 else chat}
    return {"instruction": f"a {number}", "input": None if number % 2 else "x", "output": " " if number == 7 else "b"}


def written(folder, name, kind, count=2500):
    """Rows in a file, one of them blank (the eighth) and some of them broken where the format can have such."""
    folder.mkdir(exist_ok=True)
    rows, path = [row(number, kind) for number in range(count)], folder / name
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
        path.write_text(path.read_text() + "a,b\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps([*rows, 5, {"instruction": 5, "output": "x"}]).replace("}, ", "},\n"))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join([*lines[:1200], "{", "", *lines[1200:], '{"instruction": ["x"], "output": "b"}']))
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["alpaca", "messages"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved", "folder"])
def test_rows_and_bad_rows_are_those_of_the_data_set(name, kind, tmp_path):
    if (name, kind) == ("rows.csv", "messages"):
        kind = "alpaca"
    if name == "folder":
        path = written(tmp_path / "f", "train-0.jsonl", kind).parent
        written(path, "train-1.jsonl", kind, count=10)
        written(path, "test.jsonl", kind, count=10)
    else:
        path = written(tmp_path, name, kind)
    stream = open_stream(path, max_bad_fraction=0.1)
    format = formats.detect(stream.head())
    loaded = sources.load(path, max_bad_fraction=0.1)
    assert formats.detect(loaded.dataset) == format
    places = []
    checked = formats.check(loaded.dataset, format, rejections=loaded.rejections, origin=loaded.origin)
    stream.write_rejected(tmp_path / "out" / "rejected.jsonl")
    assert list(stream.checked(format)) == checked.to_list()
    for place, _ in stream.rows(format):
        places.append(place)
    assert len(places) == len(checked)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == stream.rejected == len(loaded.rejections)
    assert {item["where"] for item in rejected} == {item.where for item in loaded.rejections}
    assert {item["reason"] for item in rejected} == {item.reason for item in loaded.rejections}
    assert not {item["where"] for item in rejected} & set(places)


def test_a_bad_row_stops_when_it_is_reached(tmp_path):
    path = written(tmp_path, "rows.jsonl", "alpaca")
    path.write_text(path.read_text().replace('" "', '"b"'))
    stream = open_stream(path)
    rows = iter(stream.checked(formats.detect(stream.head())))
    for number in range(1000):
        assert next(rows)["instruction"] == f"a {number}"
    with pytest.raises(DataError, match=r"rows.jsonl:1201: broken json") as caught:
        next(rows)
    assert caught.value.exit_code == 3
    assert "read so far" in caught.value.where


def test_the_share_of_bad_rows_is_judged_of_a_thousand_and_at_the_end(tmp_path):
    good, bad = '{"text": "a"}\n', "{\n"
    path = tmp_path / "rows.jsonl"

    def read(text, fraction=0.1):
        path.write_text(text)
        stream = open_stream(path, max_bad_fraction=fraction)
        return sum(1 for _ in stream.checked(formats.detect(stream.head())))

    assert read(bad * 50 + good * 950) == 950
    with pytest.raises(DataError, match="200 of 1200 rows"):
        read(bad * 200 + good * 1000)
    with pytest.raises(DataError, match="2 of 12 rows"):
        read(bad * 2 + good * 10)
    with pytest.raises(DataError, match="1 of 3000 rows"):
        read(good * 2999 + bad, fraction=0.0)


def test_no_row_is_left(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": " "}\n' * 9)
    stream = open_stream(path, max_bad_fraction=0.9)
    with pytest.raises(DataError, match="9 of 9"):
        list(stream.checked(formats.detect(stream.head())))
    path.write_text("")
    with pytest.raises(DataError, match="the data set is empty"):
        open_stream(path).head()
    path.write_text("{\n" * 5)
    with pytest.raises(DataError, match="5 of 5"):
        open_stream(path, max_bad_fraction=0.5).head()


@pytest.mark.parametrize(("split", "wanted"), [("train[:1100]", (0, 1100)), ("train[990:1010]", (990, 1010))])
def test_slices_are_those_of_the_data_set(split, wanted, tmp_path):
    path = written(tmp_path, "rows.jsonl", "alpaca")
    stream = open_stream(path, split=split, max_bad_fraction=0.1)
    format = formats.detect(stream.head())
    loaded = sources.load(path, split=split, max_bad_fraction=0.1)
    assert list(stream.checked(format)) == formats.check(loaded.dataset, format, rejections=loaded.rejections).to_list()
    first, places = stream.first(format)
    assert len(first) == len(places) == min(wanted[1], 2500) - wanted[0] - (wanted[0] <= 7)


def test_only_the_beginning_is_read(tmp_path, monkeypatch):
    path = written(tmp_path, "rows.jsonl", "messages", count=30_000)
    seen = 0
    read = readers.READERS[".jsonl"]

    def counted(path, rejections):
        nonlocal seen
        for item in read(path, rejections):
            seen += 1
            yield item

    monkeypatch.setitem(readers.READERS, ".jsonl", counted)
    stream = open_stream(path, max_bad_fraction=0.1)
    assert seen == 0
    rows = iter(stream.checked(formats.detect(stream.head())))
    assert next(rows)["messages"][0]["content"] == "hi 0"
    assert seen == 2000
    assert len(stream.first(formats.detect(stream.head()))[0]) == 1000


def test_hub_data_sets_are_opened_as_streams(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return Dataset.from_list(
            [{"question": f"q {n}", "answer": "a" if n else None} for n in range(300)]
        ).to_iterable_dataset()

    monkeypatch.setattr(streams, "load_dataset", load_dataset)
    stream = open_stream("owner/name", split="train[:250]", config="main", max_bad_fraction=0.1, token="t")
    assert asked == {"name": "owner/name", "config": "main", "split": "train", "token": "t", "streaming": True}
    rows = list(stream.rows(formats.detect(stream.head())))
    assert rows[0] == ("row 2", {"prompt": "q 1\n", "completion": "a"})
    assert len(rows) == 249

    def broken():
        yield from ({"question": f"q {n}", "answer": "a"} for n in range(150))
        raise ConnectionResetError("gone")

    monkeypatch.setattr(streams, "load_dataset", lambda *args, **options: broken())
    with pytest.raises(DataError, match="broke off after 100 rows") as caught:
        list(
            open_stream("owner/name").rows(
                formats.Format("prompt_completion", {"prompt": "question", "completion": "answer"})
            )
        )
    assert caught.value.why == "gone"
    monkeypatch.undo()
    with pytest.raises(DataError, match="could not be loaded"):
        open_stream("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("book.txt", {}, UnsupportedError, "running text"),
        ("rows.jsonl", {"split": "train[10%:]"}, ConfigError, "number of rows"),
        ("rows.jsonl", {"split": "train[-5:]"}, ConfigError, "number of rows"),
        ("rows.jsonl", {"split": "train["}, ConfigError, "cannot be understood"),
        ("rows.jsonl", {"max_bad_fraction": 1.0}, ConfigError, "max_bad_fraction"),
        ("no.jsonl", {}, DataError, "there is no data file"),
    ],
)
def test_what_cannot_be_streamed(name, options, error, words, tmp_path):
    for file in ("book.txt", "rows.jsonl"):
        (tmp_path / file).write_text('{"text": "a"}')
    with pytest.raises(error, match=words) as caught:
        open_stream(tmp_path / name, **options)
    assert caught.value.hint


def test_rendered_rows_are_those_of_the_data_set(tmp_path, tiny_tokenizer):
    datasets.disable_progress_bars()
    for rows in (
        [{"instruction": "say </s>" if n % 3 else "a", "output": "b</s>" if n % 2 else "b"} for n in range(9)],
        [{"text": "a</s>" if n % 2 else "a"} for n in range(9)],
        [{"messages": [USER, BOT], "tools": "[]" if n % 2 else None} for n in range(9)],
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stream = open_stream(path)
        format = formats.detect(stream.head())
        found = list(formats.render_stream(stream.checked(format), format.kind, tiny_tokenizer))
        expected = formats.to_training_rows(sources.load(path).dataset, format, tiny_tokenizer).to_list()
        assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
            {k: v for k, v in row.items() if v is not None} for row in expected
        ]

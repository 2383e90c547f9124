"""Tables joined to a data set: the same rows whether they stay in memory or go to a file, of which little is held."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pytest

from pantheraml.data import fitting
from pantheraml.data import stored as storing
from pantheraml.data.rows import Rejections
from pantheraml.data.stored import stored

TABLES = [
    pa.table({"a": pa.array([None, None])}),
    pa.table({"a": [{"x": 1}], "b": ["new"]}),
    pa.table({"a": pa.array([], pa.null())}),
    pa.table({"a": [{"x": 0.5, "y": ["z"]}, None]}),
    pa.table({"b": ["last"], "a": [{"y": ["z", None]}]}),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(storing, "MEMORY_BYTES", 0)
    return tmp_path / "pantheraml"


def test_a_file_gives_what_memory_gives(cache, monkeypatch):
    in_file = stored(iter(TABLES))
    assert [file["filename"] for file in in_file.cache_files] == [str(file) for file in cache.iterdir()]
    monkeypatch.undo()
    in_memory = stored(iter(TABLES))
    assert not in_memory.cache_files
    assert in_file.features == in_memory.features
    assert in_file.to_list() == in_memory.to_list()
    assert in_memory[3]["a"] == {"x": 0.5, "y": ["z"]}


def test_no_rows():
    assert len(stored(iter([]))) == len(stored(iter([TABLES[2]]))) == 0


def test_the_same_rows_are_stored_once(cache):
    first, second = stored(iter(TABLES)), stored(iter(TABLES))
    assert len(list(cache.iterdir())) == 1
    assert first._fingerprint == second._fingerprint
    other = stored(iter(TABLES[:2]))
    assert len(list(cache.iterdir())) == 2
    assert other._fingerprint != first._fingerprint


def test_the_cache_of_datasets_stays_empty_where_it_is_off(cache):
    datasets.disable_caching()
    try:
        assert len(stored(iter(TABLES))) == 6
    finally:
        datasets.enable_caching()
    assert not cache.exists()


def test_types_that_do_not_fit_leave_nothing_behind(cache):
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        stored(iter([pa.table({"a": ["x"]}), pa.table({"a": [[1]]})]))
    assert not list(cache.iterdir())


def test_one_table_at_a_time_is_held(cache):
    before, most = pa.total_allocated_bytes(), 0

    def tables():
        nonlocal most
        for number in range(50):
            most = max(most, pa.total_allocated_bytes() - before)
            yield pa.table({"number": pa.array([number] * 100_000)})

    dataset = stored(tables())
    assert len(dataset) == 5_000_000
    assert dataset[-1] == {"number": 49}
    assert most < 3 * 8 * 100_000


@pytest.mark.parametrize("description", ["Reading rows", None])
def test_a_bar_shows_how_far_it_is(cache, capsys, description):
    datasets.enable_progress_bars()
    try:
        stored(iter(TABLES), description)
    finally:
        datasets.disable_progress_bars()
    assert ("Reading rows: 6 rows" in capsys.readouterr().err) is (description is not None)


def test_long_rows_come_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_BATCH_LETTERS", 100)
    numbered = ((number, {"text": "x" * 40, "more": [{"a": "y" * 10}]}) for number in range(7))
    assert [[number for number, _ in batch] for batch in fitting.batches(numbered)] == [[0, 1], [2, 3], [4, 5], [6]]


def test_bad_rows_beyond_memory_go_to_a_file():
    rejections = Rejections(0.9)
    for number in range(6000):
        rejections.add(f"rows.jsonl:{number}", f"broken: {number % 2}", "\u20ac" * 3000)
    assert rejections._records._rolled
    assert len(rejections) == 6000
    both = Rejections(0.9)
    both.total = 10
    both.extend(rejections)
    kept = list(both)
    assert [item.where for item in kept] == [f"rows.jsonl:{number}" for number in range(6000)]
    assert kept[-1].row == "\u20ac" * 2000

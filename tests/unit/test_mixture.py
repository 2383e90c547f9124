"""Mixtures hold exactly the rows that their weights and seed say, and refuse data that do not fit together."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from pantheraml.data.mixture import mix
from pantheraml.errors import ArgumentError, ConfigError, DataError

in_memory_and_streaming = pytest.mark.parametrize("streaming", [False, True], ids=["in-memory", "streaming"])


def source(name, rows, *, streaming=False):
    dataset = Dataset.from_dict({"text": [f"{name}{index}" for index in range(rows)]})
    return dataset.to_iterable_dataset() if streaming else dataset


def texts(dataset):
    return [row["text"] for row in dataset]


@in_memory_and_streaming
def test_without_weights_rows_come_in_turn(streaming):
    sources = [source(name, rows, streaming=streaming) for name, rows in (("a", 3), ("b", 2))]
    assert texts(mix(sources))[:4] == ["a0", "b0", "a1", "b1"]
    assert texts(mix(sources, stop="all_exhausted"))[:5] == ["a0", "b0", "a1", "b1", "a2"]


@in_memory_and_streaming
@pytest.mark.parametrize("weights", [[0.3, 0.7], [3, 7], [1, 1]], ids=str)
def test_shares_are_those_of_the_weights(streaming, weights):
    mixed = texts(mix([source(name, 3000, streaming=streaming) for name in "ab"], weights))
    share = weights[0] / sum(weights)
    drawn = sum(text[0] == "a" for text in mixed)
    assert abs(drawn - share * len(mixed)) < 4 * math.sqrt(len(mixed) * share * (1 - share))
    for name in "ab":  # Each source's rows are all there, once, in order, up to where the mixture ends.
        own = [text for text in mixed if text[0] == name]
        assert own == [f"{name}{index}" for index in range(len(own))]
    assert max(drawn, len(mixed) - drawn) in (2999, 3000)


def test_each_row_comes_from_the_source_that_the_seed_draws():
    draws = np.random.default_rng(11).choice(2, size=1000, p=[0.3, 0.7])
    mixed = texts(mix([source("a", 5000), source("b", 5000)], [3, 7], seed=11))
    assert ["ab".index(text[0]) for text in mixed[:1000]] == draws.tolist()
    assert mixed != texts(mix([source("a", 5000), source("b", 5000)], [3, 7], seed=12))


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("weights", [None, [1, 4]], ids=str)
def test_streams_give_the_rows_of_data_in_memory(stop, weights):
    options = {"weights": weights, "stop": stop}
    sources = [[source(name, rows, streaming=flag) for name, rows in (("a", 40), ("b", 70))] for flag in (False, True)]
    in_memory, streamed = (mix(each, **options) for each in sources)
    assert isinstance(in_memory, Dataset)
    assert isinstance(streamed, IterableDataset)
    expected, found = texts(in_memory), texts(streamed)
    assert abs(len(expected) - len(found)) < 2
    assert all(one == other for one, other in zip(expected, found))


@in_memory_and_streaming
def test_all_exhausted_holds_every_row(streaming):
    mixed = texts(
        mix([source("a", 5, streaming=streaming), source("b", 50, streaming=streaming)], stop="all_exhausted")
    )
    assert set(mixed) == {f"a{index}" for index in range(5)} | {f"b{index}" for index in range(50)}


@in_memory_and_streaming
def test_columns_in_another_order_are_the_same(streaming):
    first, second = Dataset.from_dict({"x": [1, 3], "y": ["a", "c"]}), Dataset.from_dict({"y": ["b", "d"], "x": [2, 4]})
    sources = [each.to_iterable_dataset() if streaming else each for each in (first, second)]
    assert [(row["x"], row["y"]) for row in mix(sources)][:3] == [(1, "a"), (2, "b"), (3, "c")]


def unnamed(*rows):
    """A stream that does not know its columns."""
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    return stream


@pytest.mark.parametrize("make", [lambda row: Dataset.from_list([row]), unnamed], ids=["in-memory", "stream"])
def test_different_columns_are_named(make):
    with pytest.raises(DataError) as caught:
        mix([make({"text": "a", "same": 1}), make({"text": "a", "same": 1}), make({"body": "a", "same": 1})])
    message = str(caught.value)
    assert "data sets 0 and 2" in message
    assert "only data set 0 has text; only data set 2 has body" in message


def test_different_types_raise():
    with pytest.raises(DataError, match="cannot be mixed"):
        mix([Dataset.from_dict({"x": [1]}), Dataset.from_dict({"x": ["a"]})])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1], "1 weights for 2"),
        ([1, 0], "weight 1 is 0"),
        ([-0.5, 1.5], "weight 0 is -0.5"),
        ([1, math.nan], "weight 1 is nan"),
        ([1, math.inf], "weight 1 is inf"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_used_raise(weights, words):
    with pytest.raises(ConfigError, match=words):
        mix([source("a", 2), source("b", 2)], weights)


@pytest.mark.parametrize(
    ("datasets", "error", "words"),
    [
        ([], DataError, "no data set"),
        ([source("a", 2), source("b", 0)], DataError, "data set 1 is empty"),
        ([source("a", 2).to_iterable_dataset(), unnamed()], DataError, "data set 1 is empty"),
        ([source("a", 2), source("b", 2, streaming=True)], ArgumentError, "to_iterable_dataset"),
        ([DatasetDict(train=source("a", 2))], ArgumentError, "pick a split"),
        ([[{"text": "a"}]], ArgumentError, "item 0 is a list"),
    ],
    ids=["none", "empty", "empty-stream", "both-kinds", "dict", "list"],
)
def test_what_is_no_mixture_raises(datasets, error, words):
    with pytest.raises(error, match=words):
        mix(datasets)


def test_unknown_stop_raises():
    with pytest.raises(ConfigError, match="all_exhausted"):
        mix([source("a", 2)], stop="never")


def test_endless_streams_are_not_read_ahead():
    def count(name):
        yield from ({"text": f"{name}{index}"} for index in itertools.count())

    sources = [IterableDataset.from_generator(count, gen_kwargs={"name": name}) for name in "ab"]
    assert texts(mix(sources).take(3)) == ["a0", "b0", "a1"]

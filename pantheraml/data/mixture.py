"""Several data sets mixed into one, each with its share of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

from datasets import Dataset, IterableDataset, interleave_datasets

from ..errors import ArgumentError, ConfigError, DataError

Stop = Literal["first_exhausted", "all_exhausted"]
Rows = TypeVar("Rows", Dataset, IterableDataset)


def mix(
    datasets: Sequence[Rows],
    weights: Sequence[float] | None = None,
    seed: int = 3407,
    stop: Stop = "first_exhausted",
) -> Rows:
    """Mix data sets row by row; the rows of each keep their order.

    Args:
        datasets: Data sets with the same columns and types, all in memory (``Dataset``) or all streaming
            (``IterableDataset``).
        weights: Share of the rows that comes from each, in any unit: ``[3, 1]`` and ``[0.75, 0.25]`` are the same. The
            source of each row is drawn at random by these shares. None takes one row of each in turn.
        seed: Seed of the draws; it has no effect without weights. Default 3407.
        stop: ``first_exhausted`` ends the mixture when one data set is used up and repeats nothing.
            ``all_exhausted`` goes on until every row of every data set was used once, and starts those that end earlier
            again, so that the shares stay. Default ``first_exhausted``.

    Returns:
        The mixture, of the same type as the data sets. The same arguments give the same rows in the same order; only
        the end may differ between data in memory and streaming, by less than one row of each data set.

    Raises:
        DataError: no data set, an empty one, or columns or types that differ.
        ConfigError: ``weights`` or ``stop`` cannot be used.
        ArgumentError: not data sets, or both in memory and streaming ones.
    """
    datasets = list(datasets)
    if stop not in get_args(Stop):
        raise ConfigError(
            f"unknown stop {stop!r}", where="argument stop", hint=f"use one of {', '.join(get_args(Stop))}"
        )
    _check_kinds(datasets)
    shares = None if weights is None else _shares(weights, len(datasets))
    _check_columns(datasets)
    try:
        return interleave_datasets(datasets, probabilities=shares, seed=seed, stopping_strategy=stop)
    except ValueError as error:
        # The columns have been compared, so this is about their types.
        raise DataError(
            "the data sets cannot be mixed",
            where="argument datasets",
            why=str(error).strip().splitlines()[0],
            hint="bring the columns to the same types with Dataset.cast",
        ) from error


def _check_kinds(datasets: Sequence[Any]) -> None:
    if not datasets:
        raise DataError("there is no data set to mix", where="argument datasets", hint="pass at least one")
    for index, dataset in enumerate(datasets):
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ArgumentError(
                f"item {index} is a {type(dataset).__name__}, not a data set",
                where="argument datasets",
                hint="pick a split first" if isinstance(dataset, dict) else "pass Dataset or IterableDataset objects",
            )
    if len({isinstance(dataset, Dataset) for dataset in datasets}) > 1:
        raise ArgumentError(
            "data sets in memory and streaming ones cannot be mixed",
            where="argument datasets",
            hint="make all of them streaming with Dataset.to_iterable_dataset()",
        )


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """The weights scaled to a sum of 1."""
    weights = [float(weight) for weight in weights]
    if len(weights) != count:
        raise ConfigError(
            f"{len(weights)} weights for {count} data sets", where="argument weights", hint="give one each"
        )
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"weight {index} is {weight:g}",
                where="argument weights",
                hint="give a number above 0, or leave the data set out",
            )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _columns(dataset: Dataset | IterableDataset, index: int) -> list[str]:
    """The columns; of a stream that does not know them, those of its first row."""
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise _empty(index)
        return dataset.column_names
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise _empty(index)
    return list(first)


def _empty(index: int) -> DataError:
    return DataError(f"data set {index} is empty", where="argument datasets", hint="leave it out")


def _check_columns(datasets: Sequence[Dataset | IterableDataset]) -> None:
    """Refuse what would fill the rows of one data set with nulls for the columns of another."""
    found = [_columns(dataset, index) for index, dataset in enumerate(datasets)]
    for index, columns in enumerate(found[1:], start=1):
        if set(columns) != set(found[0]):
            sides = ((0, found[0], columns), (index, columns, found[0]))
            only = [(number, [name for name in own if name not in other]) for number, own, other in sides]
            raise DataError(
                "the data sets have different columns",
                where=f"data sets 0 and {index}",
                why="; ".join(f"only data set {number} has {', '.join(names)}" for number, names in only if names),
                hint="rename or remove columns until all have the same (Dataset.rename_column, Dataset.select_columns)",
            )

"""Batches for several ranks that hold every row once: what is left at the end of an epoch is dealt out evenly.

Accelerate fills an incomplete last round with rows from the beginning of the epoch, which trains them twice, or leaves
some ranks without a batch, for which the others wait for ever. Here the last rows are divided among the ranks, and a
rank that gets none runs a batch without labels, which adds nothing to the loss or the gradient. Evaluations have
batches as one process has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ..errors import UnsupportedError

IGNORED = -100
# An index that no row has, nor an idle one.
MISSING = -sys.maxsize
_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class EvenBatches(BatchSampler):
    """Batches of all ranks in turns: the first is rank 0's, the second rank 1's. A negative index -1-i is row i idle.

    Args:
        sampler: Yields row indices, the same on every rank. Accelerate may replace it.
        rows: Rows in a batch.
        ranks: Number of ranks, or of groups of them that share each batch; as many batches make a round.
        copies: Ranks in a group, default 1: each batch comes as often, one time after the other.
    """

    def __init__(self, sampler: Any, rows: int, ranks: int, copies: int = 1) -> None:
        self.sampler: Any = sampler
        self.rows = rows
        self.ranks = ranks
        self.copies = copies
        # None tells Accelerate that batches are of any length.
        self.batch_size = None  # type: ignore[assignment]
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.rows * self.ranks)) * self.ranks * self.copies

    def __iter__(self) -> Iterator[list[int]]:
        pending: list[int] = []
        for index in self.sampler:
            pending.append(index)
            if len(pending) == self.rows * self.ranks:
                yield from self._copied(pending)
                pending = []
        if pending:
            yield from self._copied(pending)

    def _copied(self, indices: Sequence[int]) -> Iterator[list[int]]:
        for batch in self._dealt(indices):
            for _ in range(self.copies):
                yield list(batch)

    def _dealt(self, indices: Sequence[int]) -> Iterator[list[int]]:
        share, over = divmod(len(indices), self.ranks)
        start = 0
        for rank in range(self.ranks):
            stop = start + share + (rank < over)
            yield list(indices[start:stop]) or [-1 - indices[0]]
            start = stop


class OrderedBatches(EvenBatches):
    """The same for an evaluation, whose figures are averaged over rows: batches as one process has them.

    What is missing in the last round is there as ``MISSING``, so that Accelerate finds batches of one length, and knows
    how many of the last figures are of no row.
    """

    def __init__(self, sampler: Any, rows: int, ranks: int, copies: int = 1) -> None:
        super().__init__(sampler, rows, ranks, copies)
        self.batch_size = rows

    def _dealt(self, indices: Sequence[int]) -> Iterator[list[int]]:
        for start in range(0, self.ranks * self.rows, self.rows):
            batch = list(indices[start : start + self.rows]) or [-1 - indices[0]]
            yield batch + [MISSING] * (self.rows - len(batch))


class _Idle(dict[str, Any]):
    """A row that stands in where a rank has none."""


class _Rows(Dataset[Any]):
    """A data set that also answers to the negative indices of ``EvenBatches``.

    Args:
        dataset: The data set.
        filled: Whether an idle row stands for each that is missing, so that all ranks have as many rows.
    """

    def __init__(self, dataset: Any, *, filled: bool = False) -> None:
        self.dataset = dataset
        self.filled = filled

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index if index >= 0 else -1 - index]
        return row if index >= 0 else _Idle(row)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if self.filled:
            idle = min(indices[0], -1 - indices[0])
            indices = [idle if index == MISSING else index for index in indices]
        indices = [index for index in indices if index != MISSING]
        if min(indices) < 0 or not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        return self.dataset.__getitems__(indices)


class _CopiedRows(_Rows):
    """Rows that several ranks read; Accelerate counts each as often as there are figures of it."""

    def __init__(self, dataset: Any, copies: int) -> None:
        super().__init__(dataset)
        self.total_dataset_length = len(dataset) * copies


class _Collator:
    """The trainer's collator; idle rows lose their labels."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        idle = [isinstance(row, _Idle) for row in rows]
        # A user's collator may name its labels otherwise: then the row counts twice, as Accelerate has it.
        if not any(idle) or "labels" not in batch:
            return batch
        if all(idle):
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        elif len(batch["labels"]) == len(rows):
            batch["labels"] = batch["labels"].clone()
            batch["labels"][torch.tensor(idle)] = IGNORED
        else:
            # Rows that are joined to one: no rank needs as many of them as the others.
            batch = self.collate([row for row in rows if not isinstance(row, _Idle)])
        return batch


def evened(loader: DataLoader[Any], ranks: int) -> DataLoader[Any]:
    """The same loader with ``EvenBatches``; streams, batch samplers of other kinds and ``drop_last`` stay as they are.

    Args:
        loader: A loader before Accelerate prepares it, whose batches have ``labels``.
        ranks: Number of ranks.
    """
    if _obstacle(loader) is not None:
        return loader
    sampler: Any = loader.batch_sampler
    return _with(loader, _Rows(loader.dataset), EvenBatches(sampler.sampler, sampler.batch_size, ranks))


def ordered(loader: DataLoader[Any], ranks: int, *, filled: bool) -> DataLoader[Any]:
    """The same loader with ``OrderedBatches``, for an evaluation; what ``evened`` leaves stays as it is.

    Args:
        loader: A loader before Accelerate prepares it, whose batches have ``labels``.
        ranks: Number of ranks.
        filled: Whether all ranks have to have as many rows, because what the model makes of them is gathered.
    """
    if _obstacle(loader) is not None:
        return loader
    sampler: Any = loader.batch_sampler
    rows = _Rows(loader.dataset, filled=filled)
    return _with(loader, rows, OrderedBatches(sampler.sampler, sampler.batch_size, ranks))


def shared(loader: DataLoader[Any], groups: int, ranks: int, *, training: bool) -> DataLoader[Any]:
    """The same loader for groups of neighbouring ranks, all of which get the batch of their group.

    Args:
        loader: A loader before Accelerate prepares it, whose batches have ``labels``.
        groups: Number of groups.
        ranks: Number of ranks in each.
        training: Whether what is left at the end of an epoch is dealt out evenly.

    Raises:
        UnsupportedError: a stream, ``drop_last`` or a batch sampler of another kind.
    """
    obstacle = _obstacle(loader)
    if obstacle is not None:
        raise UnsupportedError(
            f"the batches of {obstacle} cannot be shared by ranks",
            where="context_parallel",
            hint="give a data set with a length, and leave dataloader_drop_last and samplers of batches out",
        )
    sampler: Any = loader.batch_sampler
    kind = EvenBatches if training else OrderedBatches
    rows = _Rows(loader.dataset) if training else _CopiedRows(loader.dataset, ranks)
    return _with(loader, rows, kind(sampler.sampler, sampler.batch_size, groups, ranks))


def _obstacle(loader: DataLoader[Any]) -> str | None:
    """What of a loader is not made for ``EvenBatches``."""
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        return "a stream"
    if loader.drop_last:
        return "a loader that drops the last"
    if type(sampler) is not BatchSampler or not hasattr(sampler.sampler, "__len__"):
        return type(sampler).__name__
    return None


def _with(loader: DataLoader[Any], rows: Dataset[Any], batches: BatchSampler) -> DataLoader[Any]:
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=_Collator(loader.collate_fn),
        **{name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)},
    )

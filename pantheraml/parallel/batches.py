"""Batches for several ranks that hold every row once: what is left at the end of an epoch is dealt out evenly.

Accelerate fills an incomplete last round with rows from the beginning of the epoch, which trains them twice, or leaves
some ranks without a batch, for which the others wait for ever. Here the last rows are divided among the ranks, and a
rank that gets none runs a batch without labels, which adds nothing to the loss or the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

IGNORED = -100
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
        ranks: Number of ranks; as many batches make a round.
    """

    def __init__(self, sampler: Any, rows: int, ranks: int) -> None:
        self.sampler: Any = sampler
        self.rows = rows
        self.ranks = ranks
        # None tells Accelerate that batches are of any length.
        self.batch_size = None  # type: ignore[assignment]
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.rows * self.ranks)) * self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        pending: list[int] = []
        for index in self.sampler:
            pending.append(index)
            if len(pending) == self.rows * self.ranks:
                yield from self._dealt(pending)
                pending = []
        if pending:
            yield from self._dealt(pending)

    def _dealt(self, indices: Sequence[int]) -> Iterator[list[int]]:
        share, over = divmod(len(indices), self.ranks)
        start = 0
        for rank in range(self.ranks):
            stop = start + share + (rank < over)
            yield list(indices[start:stop]) or [-1 - indices[0]]
            start = stop


class _Idle(dict[str, Any]):
    """A row that stands in where a rank has none."""


class _Rows(Dataset[Any]):
    """A data set that also answers to the negative indices of ``EvenBatches``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index if index >= 0 else -1 - index]
        return row if index >= 0 else _Idle(row)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if indices[0] < 0 or not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        return self.dataset.__getitems__(indices)


class _Collator:
    """The trainer's collator; idle rows lose their labels."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        # A user's collator may name its labels otherwise: then the row counts twice, as Accelerate has it.
        if isinstance(rows[0], _Idle) and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


def evened(loader: DataLoader[Any], ranks: int) -> DataLoader[Any]:
    """The same loader with ``EvenBatches``; streams, batch samplers of other kinds and ``drop_last`` stay as they are.

    Args:
        loader: A loader before Accelerate prepares it, whose batches have ``labels``.
        ranks: Number of ranks.
    """
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized) or loader.drop_last:
        return loader
    if type(sampler) is not BatchSampler or not hasattr(sampler.sampler, "__len__"):
        return loader
    return DataLoader(
        _Rows(loader.dataset),
        batch_sampler=EvenBatches(sampler.sampler, sampler.batch_size, ranks),
        collate_fn=_Collator(loader.collate_fn),
        **{name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)},
    )

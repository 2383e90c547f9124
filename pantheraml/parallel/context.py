"""Sequences divided over ranks: each holds its share of the tokens of every row, and of no row all of them.

Everything but attention works on tokens one by one. Before attention the ranks of a group exchange queries, keys and
values, so that each has all tokens for its share of the heads; afterwards they exchange the results back
(DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509). So attention itself stays what it is on one card, documents and
windows included.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from ..device import get_device
from ..errors import ConfigError, UnsupportedError
from .batches import IGNORED
from .ranks import get_rank, get_world_size

# Under this name a batch tells how it was divided.
DIVISION = "division"
# What of a batch has a value for each token, with what fills it up; and what tells of documents, which is told anew.
_PER_TOKEN = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
_PER_BATCH = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


# ---------------------------------------------------------------- exchange


@dataclass(frozen=True, eq=False)
class ContextGroup:
    """The ranks that share each sequence.

    Attributes:
        process_group: Theirs.
        size: How many they are.
        rank: Number of this one among them; it holds the tokens from ``rank * T / size`` on.
    """

    process_group: Any
    size: int
    rank: int

    def repeats(self, heads: int) -> int:
        """How often each of ``heads`` is repeated so that they can be divided among the ranks."""
        return math.lcm(heads, self.size) // heads

    def to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From all heads of this rank's tokens to all tokens of this rank's heads, without autograd.

        Heads of keys that are fewer than the ranks are repeated.

        Args:
            q: [B, H, T / size, D].
            k: [B, H_kv, T / size, D].
            v: [B, H_kv, T / size, D_v].

        Returns:
            [B, H / size, T, D], [B, H', T, D] and [B, H', T, D_v].
        """
        again = self.repeats(k.shape[1])
        by_token = [x.detach().transpose(1, 2) for x in (q, k, v)]
        if again > 1:
            by_token[1:] = [x.repeat_interleave(again, 2) for x in by_token[1:]]
        return tuple(x.transpose(1, 2) for x in self._to_heads(by_token))

    def to_heads_backward(self, grads: Sequence[torch.Tensor], heads: int) -> list[torch.Tensor]:
        """Gradients of what ``to_heads`` was given, of which keys had ``heads``; [B, heads, T / size, D]."""
        dq, dk, dv = self._to_tokens([x.detach().transpose(1, 2) for x in grads])
        if dk.shape[2] != heads:
            dk, dv = (x.unflatten(2, (heads, -1)).sum(3) for x in (dk, dv))
        return [x.transpose(1, 2) for x in (dq, dk, dv)]

    def to_tokens(self, result: torch.Tensor) -> torch.Tensor:
        """From all tokens of this rank's heads [B, T, H / size, D] to all heads of its tokens [B, T / size, H, D]."""
        return self._to_tokens([result.detach()])[0]

    def to_tokens_backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient [B, T, H / size, D] of what ``to_tokens`` was given."""
        return self._to_heads([grad.detach()])[0]

    def heads(self, per_head: torch.Tensor) -> torch.Tensor:
        """This rank's share of a tensor with a value for each head [H]."""
        return per_head.chunk(self.size)[self.rank]

    def _to_heads(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B, T / size, H, D] to [B, T, H / size, D], of several tensors in one message; results share their memory."""
        batch, tokens = tensors[0].shape[:2]
        shapes = [(self.size, x.shape[2] // self.size, x.shape[3]) for x in tensors]
        widths = [heads * features for _, heads, features in shapes]
        sent = tensors[0].new_empty(self.size, batch, tokens, sum(widths))
        for x, shape, part in zip(tensors, shapes, sent.split(widths, -1)):
            part.unflatten(-1, shape[1:]).copy_(x.unflatten(2, shape[:2]).permute(2, 0, 1, 3, 4))
        # Of a single row the parts of the ranks follow each other in memory as its tokens do.
        received = self._exchange(sent).transpose(0, 1).reshape(batch, self.size * tokens, -1)
        return [part.unflatten(-1, shape[1:]) for part, shape in zip(received.split(widths, -1), shapes)]

    def _to_tokens(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B, T, H / size, D] to [B, T / size, H, D], of several tensors in one message."""
        batch, tokens = tensors[0].shape[0], tensors[0].shape[1] // self.size
        shapes = [tuple(x.shape[2:]) for x in tensors]
        widths = [heads * features for heads, features in shapes]
        sent = tensors[0].new_empty(self.size, batch, tokens, sum(widths))
        for x, shape, part in zip(tensors, shapes, sent.split(widths, -1)):
            part.unflatten(-1, shape).copy_(x.unflatten(1, (self.size, tokens)).transpose(0, 1))
        received = self._exchange(sent)
        return [
            part.unflatten(-1, shape).permute(1, 2, 0, 3, 4).flatten(2, 3)
            for part, shape in zip(received.split(widths, -1), shapes)
        ]

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        return received

    def agree(self, numbers: Sequence[int], *, least: bool = False) -> list[int]:
        """The same numbers on all ranks: of each the largest, or the least, that one of them has."""
        facts = torch.tensor(numbers, dtype=torch.int64, device=get_device().torch_device)
        dist.all_reduce(facts, dist.ReduceOp.MIN if least else dist.ReduceOp.MAX, group=self.process_group)
        return facts.tolist()

    def same(self, number: int) -> torch.Tensor:
        """Whether all ranks have the same number: a bool on the device, which is not waited for."""
        extremes = torch.tensor([number, -number], dtype=torch.int64, device=get_device().torch_device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.process_group)
        return extremes[0] == -extremes[1]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total


def context_group(size: int) -> ContextGroup:
    """The group of ``size`` neighbouring ranks that this one belongs to. Every rank has to call it.

    Raises:
        ConfigError: the ranks cannot be divided into such groups.
    """
    ranks = get_world_size()
    if not 1 < size <= ranks or ranks % size:
        raise ConfigError(
            f"{ranks} {'processes' if ranks > 1 else 'process'} cannot be divided into groups of {size}",
            where="context_parallel",
            hint="start a number of processes that it divides (torchrun --nproc_per_node=...), or leave it out",
        )
    return _made(size, dist.group.WORLD)


@functools.lru_cache(maxsize=4)
def _made(size: int, world: Any) -> ContextGroup:
    """Made once in each process group."""
    shape, names = (get_world_size() // size, size), ("data", "context")
    mesh = init_device_mesh(get_device().torch_type, shape, mesh_dim_names=names)["context"]
    return ContextGroup(mesh.get_group(), size, get_rank() % size)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ContextGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.heads = group, k.shape[1]
        return group.to_heads(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.group.to_heads_backward(grads, ctx.heads)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ContextGroup, result: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        return group.to_tokens(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return None, ctx.group.to_tokens_backward(*grads)


def attend_over_ranks(
    group: ContextGroup,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Attention between this rank's tokens and all before them, under autograd.

    Args:
        group: The ranks that share the sequences.
        attend: From q, k, v [B, heads, T, D] to [B, T, heads, D_v].
        q: [B, H, T / size, D].
        k: [B, H_kv, T / size, D].
        v: [B, H_kv, T / size, D_v].

    Returns:
        [B, T / size, H, D_v].
    """
    return _ToTokens.apply(group, attend(*_ToHeads.apply(group, q, k, v)))


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Division:
    """What a divided batch was.

    Attributes:
        lengths: Tokens of its documents, one after the other and row after row.
        batch: Rows.
        length: Tokens of a row, on all ranks.
        real: Those of them that were there before the rows were filled up.
        last: The largest position of a token.
        checksum: Of its tokens.
    """

    lengths: tuple[int, ...]
    batch: int
    length: int
    real: int = 0
    last: int = 0
    checksum: int = 0


def divide(batch: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """This rank's share of a batch: some of the tokens of each row, with their positions and next tokens in the whole.

    Args:
        batch: ``input_ids`` and ``labels`` [B, T], with the ``attention_mask`` of rows that are padded on the right, or
            with ``position_ids`` that begin anew with each document.
        rank: Number of this rank among those that share the batch.
        ranks: How many they are.

    Returns:
        ``input_ids``, ``position_ids`` and, if it was there, ``attention_mask`` [B, T' / ranks], where T' is T filled
        up; ``labels`` and ``shift_labels``, both the labels of the following tokens; under ``DIVISION`` a ``Division``.

    Raises:
        UnsupportedError: the batch holds something else, or is padded on the left.
    """
    unknown = batch.keys() - _PER_TOKEN.keys() - _PER_BATCH
    if unknown or "labels" not in batch:
        raise UnsupportedError(
            f"a batch with {', '.join(sorted(unknown)) or 'no labels'} cannot be divided over the ranks",
            where="context_parallel",
            hint="it is for batches of token ids and labels: leave data_collator out, or train without it",
        )
    rows, length = batch["input_ids"].shape
    whole = {name: batch[name] for name in _PER_TOKEN if name in batch}
    mask = whole.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UnsupportedError(
            "rows that are padded on the left cannot be divided over the ranks",
            where="context_parallel",
            hint="set tokenizer.padding_side = 'right'",
        )
    positions = whole.setdefault("position_ids", torch.arange(length).expand(rows, length))
    labels = whole.pop("labels")
    # The last token of a share learns the first of the next rank's.
    whole["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    share = -(-length // ranks)
    missing = share * ranks - length
    begins = F.pad(positions == 0, (0, missing))
    begins[:, 0] = True
    if missing:
        # What fills a row up goes on with its last document, whose tokens do not look at it.
        whole = {name: F.pad(x, (0, missing), value=_PER_TOKEN.get(name, IGNORED)) for name, x in whole.items()}
        whole["position_ids"][:, length:] = positions[:, -1:]
    bounds = [*begins.flatten().nonzero().flatten().tolist(), begins.numel()]
    lengths = tuple(after - before for before, after in itertools.pairwise(bounds))
    shared: dict[str, Any] = {n: x[:, rank * share : (rank + 1) * share].contiguous() for n, x in whole.items()}
    # Trainers look for them; the loss reads those that are shifted.
    shared["labels"] = shared["shift_labels"]
    checksum = zlib.crc32(batch["input_ids"].contiguous().numpy().tobytes())
    return shared | {DIVISION: Division(lengths, rows, share * ranks, length, int(positions.max()), checksum)}


class DividingCollator:
    """A collator of which this rank keeps its share."""

    def __init__(self, collate: Callable[[list[Any]], Any], group: ContextGroup) -> None:
        self.collate = collate
        # Not the group: workers get a copy of this.
        self.rank, self.ranks = group.rank, group.size

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Collate rows and keep this rank's share."""
        return divide(self.collate(rows), self.rank, self.ranks)


# ---------------------------------------------------------------- the forward


@dataclass(frozen=True, eq=False)
class Divided:
    """The batch of a forward that several ranks make together.

    Attributes:
        group: They.
        division: What they share.
        known: What was found out about it, by anybody.
    """

    group: ContextGroup
    division: Division
    known: dict[Any, Any] = field(default_factory=dict)


_current: ContextVar[Divided | None] = ContextVar("pantheraml_divided", default=None)


def current() -> Divided | None:
    """The divided batch whose forward this is; None in any other, and in a backward on a thread of its own."""
    return _current.get()


@contextlib.contextmanager
def dividing(group: ContextGroup, division: Division) -> Iterator[None]:
    """Inside, forwards are of one share of a batch."""
    token = _current.set(Divided(group, division))
    try:
        yield
    finally:
        _current.reset(token)

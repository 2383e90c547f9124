"""Which keys each token may look at, told as the documents of a batch instead of as a T x T mask.

A causal mask whose rows hold one document or several, with a window or without, is the numbers of tokens of the
documents and the width of the window. The kernels want just that.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ...parallel.context import ContextGroup

# Keywords of attention functions that tell of packed documents.
PACKING = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def lasting() -> contextlib.AbstractContextManager[Any]:
    """Inside, tensors are made that training can use, even when inference makes them first and they are kept."""
    return torch.inference_mode(False)


@dataclass(eq=False)
class Documents:
    """Tokens look at those before them in their own document, and no further back than the window.

    Takes the place of a mask between transformers' mask functions and the attention function.

    Attributes:
        cumulative: First token of each document in the flattened batch, and B * T at the end; [N + 1], int32.
        longest: Tokens of the longest document, or more.
        batch: B.
        length: T. No document goes on in the next row.
        window: Keys that a token sees at most, itself included; None for all.
    """

    cumulative: torch.Tensor
    longest: int
    batch: int
    length: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window >= self.longest:
            self.window = None

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document. Reads the device once."""
        return tuple(self.cumulative.diff().tolist())

    @property
    def is_whole_rows(self) -> bool:
        """Whether each row is one document."""
        return self.cumulative.numel() == self.batch + 1

    @property
    def are_equally_long(self) -> bool:
        """Whether all documents have ``longest`` tokens, so that they can be rows of a batch. Known on the host."""
        return (self.cumulative.numel() - 1) * self.longest == self.batch * self.length

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """The first key that each token sees, counted from the start of its row; [B, T], int32."""
        tokens = self.batch * self.length
        with lasting():
            starts = self.cumulative[:-1].repeat_interleave(self.cumulative.diff(), output_size=tokens)
            starts = (starts.view(self.batch, self.length) % self.length).int()
            if self.window is None:
                return starts
            return torch.maximum(starts, torch.arange(self.length, device=starts.device).int() - (self.window - 1))

    def dense(self) -> torch.Tensor:
        """The mask in full: [B, 1, T, T], True where a token (row) sees a key (column)."""
        index = torch.arange(self.length, device=self.cumulative.device)
        return ((index >= self.first[..., None]) & (index <= index[:, None]))[:, None]

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Documents:
        """The same on another device, for layers that lie on another one; a dtype changes nothing."""
        if not isinstance(device, int | str | torch.device) or torch.empty(0, device=device).device == self.device:
            return self
        return replace(self, cumulative=self.cumulative.to(device))

    @property
    def device(self) -> torch.device:
        """Where ``cumulative`` lies."""
        return self.cumulative.device


@dataclass(eq=False)
class Divided:
    """Documents of which each rank of a group holds its share of the tokens.

    Attributes:
        documents: Of the whole batch.
        group: The ranks.
    """

    documents: Documents
    group: ContextGroup

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Divided:
        """The same on another device; a dtype changes nothing."""
        documents = self.documents.to(device)
        return self if documents is self.documents else replace(self, documents=documents)


def from_lengths(
    lengths: Sequence[int], batch: int, length: int, window: int | None, device: torch.device | str
) -> Documents:
    """Describe documents of which the host knows the ``lengths``."""
    with lasting():
        cumulative = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    documents = Documents(cumulative, max(lengths), batch, length, window)
    documents.lengths = tuple(lengths)
    return documents


@functools.lru_cache(maxsize=8)
def whole_rows(batch: int, length: int, window: int | None, device: torch.device) -> Documents:
    """One document a row."""
    return from_lengths([length] * batch, batch, length, window, device)


def from_mask_function(
    mask_function: MaskFunction, batch: int, length: int, window: int | None, device: torch.device | str
) -> Documents | None:
    """Recognise documents in a function that says who sees whom.

    The function is asked about neighbours, which tells where documents begin, and then about the corners of what every
    token should see and should not. Time and memory are O(B * T), and the device is read once. Chunked attention comes
    out as documents of the chunk's size.

    Args:
        mask_function: ``(batch, head, query, key) -> bool``, for index tensors that broadcast.
        batch: B.
        length: T.
        window: Width of the window, or of the chunks, or None.
        device: Where the function's own tensors lie.

    Returns:
        The documents, or None where the function says something else.
    """
    rows, head = torch.arange(batch, device=device)[:, None], torch.zeros(1, 1, dtype=torch.long, device=device)
    index = torch.arange(length, device=device)[None]

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask_function(rows, head, query, key).expand(batch, query.shape[-1])

    begins = F.pad(~sees(index[:, 1:], index[:, :-1]), (1, 0), value=True)
    starts = torch.where(begins, index, 0).cummax(-1).values
    first = starts if window is None else torch.maximum(starts, index - (window - 1))
    position = index.expand(batch, length)
    seen = (position, first, (first + position) // 2)
    # Where there is no such key, the nearest one is asked about, which is seen.
    unseen = (
        ((position + 1).clamp(max=length - 1), position == length - 1),
        (torch.full_like(position, length - 1), position == length - 1),
        ((first - 1).clamp(min=0), first == 0),
        (torch.zeros_like(position), first == 0),
    )
    keys = torch.cat([*seen, *(key for key, _ in unseen)], -1)
    due = torch.cat([torch.ones_like(begins)] * len(seen) + [expected for _, expected in unseen], -1)
    agrees = (sees(index.repeat(1, len(seen) + len(unseen)), keys) == due).all()
    flags = torch.cat([begins.flatten(), agrees[None]]).cpu()
    return from_lengths(_between(flags[:-1]), batch, length, window, device) if flags[-1] else None


def _between(begins: torch.Tensor) -> list[int]:
    """Lengths of what begins at the True of a flat tensor on the CPU; its first is True."""
    bounds = [*begins.nonzero().flatten().tolist(), begins.numel()]
    return [after - before for before, after in itertools.pairwise(bounds)]


# The tensor is the same in every layer of a forward, and in what is recomputed of it: the device is read once.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _remembered(tensor: torch.Tensor, key: tuple[Any, ...], make: Callable[[], Documents | None]) -> Documents | None:
    entries = _known.setdefault(tensor, {})
    key = (*key, 0 if tensor.is_inference() else tensor._version)
    if key not in entries:
        entries[key] = make()
    return entries[key]


def from_keywords(
    keywords: dict[str, Any], batch: int, length: int, window: int | None, device: torch.device
) -> Documents | None:
    """Recognise packing that the mask does not tell of, from what reaches the attention function.

    transformers leaves packing out of the mask when a key-value cache or a mask of padding is passed along, and some
    families (gpt-oss) never ask.

    Args:
        keywords: Keyword arguments of the attention function; ``cu_seq_lens_q`` and ``max_length_q``, or
            ``position_ids`` [B, T] in which 0 comes again.
        batch: B.
        length: T.
        window: Width of the layer's window, or None.
        device: Where the layer lies.

    Returns:
        The documents, or None where each row is one.
    """
    cumulative, positions = keywords.get("cu_seq_lens_q"), keywords.get("position_ids")
    if isinstance(cumulative, torch.Tensor):
        longest = keywords.get("max_length_q")

        def given() -> Documents:
            at = cumulative.to(device, torch.int32)
            return Documents(at, int(at.diff().max()) if longest is None else int(longest), batch, length, window)

        return _remembered(cumulative, (batch, length, window, device), given)
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.shape[-1] != length:
        return None

    def found() -> Documents | None:
        begins = positions == 0
        if not begins[:, 1:].any():
            return None
        # A copy: rows that are expanded share their memory.
        begins = begins.expand(batch, length).cpu().clone()
        begins[:, 0] = True
        return from_lengths(_between(begins.flatten()), batch, length, window, device)

    return _remembered(positions, (batch, length, window, device), found)

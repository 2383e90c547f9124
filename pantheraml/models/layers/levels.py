"""What of a decoder layer stays in memory between forward and backward, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch


class Keep(IntEnum):
    """What of a layer stays in memory between forward and backward; each level includes the ones below it."""

    INPUT = 0
    """The layer's input."""
    ATTENTION = 1
    """The result of attention (and its row statistics), so that attention is not run again."""
    RESIDUAL = 2
    """Queries, keys, values, and the residual between attention and MLP: only gate and up are multiplied again."""
    ALL = 3
    """The outputs of gate and up too: no matrix product is repeated."""


class Host(IntEnum):
    """What of that which stays waits in host memory."""

    NOTHING = 0
    """All of it stays on the device."""
    RESULTS = 1
    """The layer's input and, where it stays, the result of attention (and its row statistics)."""
    RESIDUAL = 2
    """All but gate and up; for layers that keep the residual."""


class Level(NamedTuple):
    """What of a layer stays, and where.

    Attributes:
        keep: What stays.
        host: What of it waits in host memory.
    """

    keep: Keep
    host: Host = Host.NOTHING


LEVELS = tuple(Level(keep, host) for keep in Keep for host in Host if host < Host.RESIDUAL or keep >= Keep.RESIDUAL)


# Moves tensors to the host and returns what brings them back.
Offload = Callable[[Sequence[torch.Tensor]], Callable[[], list[torch.Tensor]]]

"""How memory is shared out between decoder layers: the levels at which a byte saves the most time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layers.costs import Cost

# Layers whose tensors are on the device although they wait on the host: on their way there, in use, coming back.
_UNDERWAY = 3


def least_of(costs: Mapping[Any, Cost]) -> Any:
    """The level that holds the least on the device, and of those the fastest."""
    return min(costs, key=lambda level: (costs[level].bytes, costs[level].seconds))


def upgrades(costs: Mapping[Any, Cost]) -> list[tuple[Any, int, float]]:
    """The levels worth keeping at, each with the bytes and seconds beyond the one before, the best byte first.

    Levels that save less time a byte than a larger one does are passed over, so that the gain a byte only falls.
    """
    chosen: list[tuple[Any, int, float]] = []
    level = least_of(costs)
    while True:
        here = costs[level]
        ahead = [(k, c.bytes - here.bytes, here.seconds - c.seconds) for k, c in costs.items() if c.bytes > here.bytes]
        ahead = [(k, more, gain) for k, more, gain in ahead if gain > 0]
        if not ahead:
            return chosen
        best = max(ahead, key=lambda entry: (entry[2] / entry[1], entry[1]))
        chosen.append(best)
        level = best[0]


def allot(costs: Sequence[Mapping[Any, Cost]], budget: int) -> list[Any]:
    """Choose each layer's level so that ``budget`` bytes in all save the most time.

    Args:
        costs: Of each layer in forward order, what the levels it can be kept at hold and take. Of a sharded model then
            the same of each layer's weights.
        budget: Bytes of the device to spend; what the least levels hold is spent in any case.
    """
    levels = [least_of(c) for c in costs]
    budget -= spent(costs, levels)
    steps = [
        (-gain / more, order, -index, index, level, more)
        for index, c in enumerate(costs)
        for order, (level, more, gain) in enumerate(upgrades(c))
    ]
    full: set[int] = set()
    for _, _, _, index, level, more in sorted(steps):
        if index in full:
            continue
        if more > budget:
            full.add(index)
            continue
        levels[index] = level
        budget -= more
    return levels


def spent(costs: Sequence[Mapping[Any, Cost]], levels: Sequence[Any]) -> int:
    """Bytes of the device that layers hold at ``levels``."""
    return sum(c[level].bytes for c, level in zip(costs, levels))


def underway(costs: Sequence[Mapping[Any, Cost]], levels: Sequence[Any]) -> int:
    """Bytes of the device that tensors on their way to the host and back take at a time."""
    return _UNDERWAY * max((c[level].host_bytes for c, level in zip(costs, levels)), default=0)


def allot_with_room(costs: Sequence[Mapping[Any, Cost]], budget: int) -> list[Any]:
    """``allot``, where the tensors that are on their way to the host and back find room too."""
    levels = allot(costs, budget)
    moving = underway(costs, levels)
    return allot(costs, budget - moving) if moving else levels

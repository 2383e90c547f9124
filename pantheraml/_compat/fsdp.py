"""torch's FSDP2 shards parameters of integers, as the bytes of 4-bit weights are.

Goes when torch 2.13 is the oldest release in use. 2.9 and 2.11 make every sharded parameter as one that trains, which
torch refuses for integers, and only then ask whether the original did. While a unit is sharded, the private module that
does so sees a ``torch.nn`` whose parameters of integers do not train; nothing of it stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

FIXED_IN = (2, 13)


class _Parameters:
    """``torch.nn`` but for ``Parameter``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:  # noqa: N802 torch's name
        """``nn.Parameter``, by default trained if its dtype can be."""
        return nn.Parameter(data, requires_grad=data.is_floating_point() if requires_grad is None else requires_grad)


@contextlib.contextmanager
def integers_allowed() -> Iterator[None]:
    """Inside, ``fully_shard`` takes parameters of any dtype."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIXED_IN:
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param as module

    before = module.nn
    module.nn = _Parameters()  # type: ignore[assignment]
    try:
        yield
    finally:
        module.nn = before

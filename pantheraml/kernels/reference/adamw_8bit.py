"""AdamW with states in 8 bits in eager torch: the specification of ``pantheraml.kernels.adamw_8bit``.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861. The layout of the
states is that of bitsandbytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Elements that share a scale.
BLOCK = 256
# Decades of the dynamic map under its largest value.
_DECADES = 7
# The least normal number: scales under it have no finite inverse.
TINY = torch.finfo(torch.float32).tiny


class Codebook(NamedTuple):
    """What the 256 codes of a state stand for.

    Attributes:
        values: ``[256]`` float32, ascending, in units of the block's scale.
        floors: ``[256]`` float32: a number has the last code whose floor is below it. Halfway between neighbours; but
            no negative number, however small, gets the code of zero. The first is -infinity.
    """

    values: torch.Tensor
    floors: torch.Tensor


class Scalars(NamedTuple):
    """The numbers of one step, in the form in which they are applied.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        gain1: ``1 - beta1``.
        gain2: ``1 - beta2``.
        rate: Learning rate with both bias corrections.
        eps: ``eps`` with the bias correction of the second moment's root.
        keep: Share of a parameter that weight decay leaves.
    """

    beta1: float
    beta2: float
    gain1: float
    gain2: float
    rate: float
    eps: float
    keep: float

    @classmethod
    def of(cls, *, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Scalars:
        """From the options of AdamW and the number of the step, counted from 1."""
        root = math.sqrt(1 - beta2**step)
        rate = lr * root / (1 - beta1**step)
        return cls(beta1, beta2, 1 - beta1, 1 - beta2, rate, eps * root, 1 - lr * weight_decay)

    def arguments(self) -> dict[str, float]:
        """As keyword arguments of the kernels."""
        return {name: float(value) for name, value in zip(self._fields, self)}


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """The dynamic map ``[256]``, up to rounding: zero, the middles of ever finer parts of seven decades, and 1.

    With ``signed``, decade ``i`` (from 0, the lowest) has ``2**i`` parts of each sign, else ``2**(i + 1)``.
    """
    positive = []
    for decade in range(_DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        middles = 0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
        positive.append(middles * 10.0 ** (decade - _DECADES + 1))
    found = torch.cat(positive)
    edges = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([-found, found, edges] if signed else [found, edges]).sort().values.float()


def codebook(values: torch.Tensor, *, signed: bool) -> Codebook | None:
    """The codebook of a map, or None where it is not the dynamic map. Waits for the device."""
    if values.shape != (256,) or values.dtype != torch.float32:
        return None
    expected = dynamic_map(signed=signed).to(values.device)
    if not torch.allclose(values, expected, rtol=1e-6, atol=0.0):
        return None
    floors = torch.full_like(values, -math.inf)
    floors[1:] = (values[:-1] + values[1:]) / 2
    if signed:
        # The first moment keeps its sign. Zero itself stays above the floor.
        floors[values == 0] = -TINY
    return Codebook(values.contiguous(), floors)


def decode(codes: torch.Tensor, absmax: torch.Tensor, book: Codebook) -> torch.Tensor:
    """The flat float32 state of flat codes ``[n]`` and the scales ``[ceil(n / 256)]`` of their blocks."""
    return book.values[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def encode(state: torch.Tensor, book: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes of a flat float32 state, and the largest absolute value of each block."""
    count = state.numel()
    blocks = F.pad(state, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=TINY))[:, None]
    codes = torch.bucketize(scaled, book.floors[1:], out_int32=True).to(torch.uint8)
    return codes.view(-1)[:count], absmax


def adamw_8bit(
    p: torch.Tensor,
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    absmax: tuple[torch.Tensor, torch.Tensor],
    books: tuple[Codebook, Codebook],
    scalars: Scalars,
) -> None:
    """One step in place; arguments as in ``pantheraml.kernels.adamw_8bit``. Everything between is float32."""
    g = gradient.detach().reshape(-1).float()
    w = p.detach().reshape(-1).float()
    moment, square = (decode(code.view(-1), scale, book) for code, scale, book in zip(states, absmax, books))
    moment = scalars.beta1 * moment + scalars.gain1 * g
    square = scalars.beta2 * square + scalars.gain2 * g * g
    finite = g.isfinite()
    zero = torch.zeros_like(g)
    moment, square = torch.where(finite, moment, zero), torch.where(finite, square, zero)
    updated = w * scalars.keep - scalars.rate * (moment / (square.sqrt() + scalars.eps))
    p.detach().copy_(torch.where(finite, updated, w).view(p.shape))
    for state, values, scale, book in zip(states, (moment, square), absmax, books):
        codes, largest = encode(values, book)
        state.copy_(codes.view(state.shape))
        scale.copy_(largest)

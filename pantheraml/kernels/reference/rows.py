"""From a chunk of logits to losses and gradient: the formulas, the interface, and the eager implementation.

For a row with raw logits ``a``, label ``y`` and vocabulary size ``V``::

    z    = logit_scale * a;  z = soft_cap * tanh(z / soft_cap) if soft_cap;  z = z / temperature
    lse  = log(sum_v exp(z_v))
    loss = (1 - eps) * (lse - z_y) + eps * (lse - mean_v z_v) + z_loss * lse**2
    dz_v = (1 + 2 * z_loss * lse) * exp(z_v - lse) - (1 - eps) * [v == y] - eps / V
    da_v = dz_v * logit_scale / temperature * (1 - tanh(.)**2 if soft_cap else 1)

Everything after the logits is in float32 (float64 for float64 logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ...errors import ConfigError


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class RowOptions:
    """What happens between the raw logits and the loss of a row; see the formulas at the top of this file."""

    label_smoothing: float = 0.0
    soft_cap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"label_smoothing must lie in [0, 1), not {self.label_smoothing}", where="label_smoothing"
            )
        if self.soft_cap is not None and not self.soft_cap > 0.0:
            raise ConfigError(f"soft_cap must be positive or None, not {self.soft_cap}", where="soft_cap")
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature must be positive, not {self.temperature}", where="temperature")
        if self.z_loss < 0.0:
            raise ConfigError(f"z_loss must not be negative, not {self.z_loss}", where="z_loss")


class RowResult(NamedTuple):
    """Per row of a chunk: loss, entropy and whether the label is the most likely token; and d loss / d logits."""

    loss: torch.Tensor
    entropy: torch.Tensor | None
    is_top1: torch.Tensor | None
    gradient: torch.Tensor | None


class RowStep(Protocol):
    """From a chunk of logits to its losses and gradient.

    ``logits`` [n, V] may be overwritten (by its gradient). ``coefficients`` [n] multiply each row's gradient, not its
    loss. Labels lie in [0, V).
    """

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        coefficients: torch.Tensor,
        options: RowOptions,
        *,
        gradient: bool,
        entropy: bool,
        top1: bool,
    ) -> RowResult:
        """See the class."""
        ...


def eager_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    options: RowOptions,
    *,
    gradient: bool,
    entropy: bool,
    top1: bool,
) -> RowResult:
    """Plain torch implementation of ``RowStep``; leaves ``logits`` as they are."""
    wide = accumulation_dtype(logits.dtype)
    z = logits.to(wide) * options.logit_scale
    tanh = None
    if options.soft_cap is not None:
        tanh = torch.tanh(z / options.soft_cap)
        z = tanh * options.soft_cap
    z = z / options.temperature
    at_label = labels.unsqueeze(1)
    z_label = z.gather(1, at_label).squeeze(1)
    lse = torch.logsumexp(z, dim=1)
    smoothing = options.label_smoothing
    loss = lse - z_label
    if smoothing:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - z.mean(dim=1))
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    is_top1 = z_label >= z.amax(dim=1) if top1 else None
    softmax = (z - lse.unsqueeze(1)).exp_() if gradient or entropy else None
    row_entropy = lse - torch.linalg.vecdot(softmax, z) if entropy and softmax is not None else None
    if not gradient or softmax is None:
        return RowResult(loss, row_entropy, is_top1, None)
    del z
    if options.z_loss:
        softmax.mul_((1.0 + 2.0 * options.z_loss * lse).unsqueeze(1))
    if smoothing:
        softmax.sub_(smoothing / logits.shape[1])
    softmax.scatter_add_(1, at_label, torch.full_like(at_label, -(1.0 - smoothing), dtype=wide))
    if tanh is not None:
        softmax.mul_(1.0 - tanh.square_())
    row_factor = coefficients.to(wide) * (options.logit_scale / options.temperature)
    softmax.mul_(row_factor.unsqueeze(1))
    return RowResult(loss, row_entropy, is_top1, softmax.to(logits.dtype))

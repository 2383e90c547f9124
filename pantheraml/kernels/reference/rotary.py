"""Rotary position embedding in eager torch: the specification of ``pantheraml.kernels.rotary``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .rms_norm import rms_norm


def rotate(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The partner of every element, with its sign: ``(-x2, x1)`` for halves or for pairs of the last dimension."""
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def select(
    table: torch.Tensor, position_ids: torch.Tensor | None, sections: Sequence[int] | None, layout: str
) -> torch.Tensor:
    """The rows of cos or sin that belong to each token: ``[B or 1, T, R]``."""
    if position_ids is not None:
        table = table[position_ids]
    if sections is not None:
        # channel -> which of the three position axes it follows
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
        axis = torch.cat((axis, axis)) if layout == "half" else axis.repeat_interleave(2)
        axis = axis.to(table.device).expand(1, *table.shape[1:])
        table = table.gather(0, axis).squeeze(0)
    return table if table.dim() == 3 else table.unsqueeze(0)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    position_ids: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    head_axis: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x * cos + rotate(x) * sin`` on the first R channels; see ``pantheraml.kernels.rotary``."""
    cos, sin = (select(table, position_ids, sections, layout).unsqueeze(head_axis) for table in (cos, sin))
    width = cos.shape[-1]

    def apply(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :width], x[..., width:]
        result = (turned * cos + rotate(turned, layout) * sin).to(x.dtype)
        return torch.cat((result, rest), dim=-1) if rest.shape[-1] else result

    return apply(q), apply(k)


def qk_norm_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    layout: str = "half",
    position_ids: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    head_axis: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm`` of every head, then ``rotary``; see ``pantheraml.kernels.qk_norm_rotary``."""
    casting = "float32" if offset else "input"

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x, weight, eps, offset=offset, casting=casting)
        assert isinstance(y, torch.Tensor)
        return y.to(x.dtype)

    options = {"layout": layout, "position_ids": position_ids, "sections": sections, "head_axis": head_axis}
    return rotary(norm(q, q_weight), norm(k, k_weight), cos, sin, **options)  # type: ignore[arg-type]

"""Matrix products of groups of rows with a matrix each, in plain torch: the specification, for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .glu import packed_glu


def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``y[i] = x[i] @ weight[g].T`` for the rows ``i`` of each group ``g``.

    Args:
        x: [M, I], rows sorted by group.
        weight: [G, O, I].
        ends: [G], the row after the last of each group; ``ends[-1] == M``.

    Returns:
        [M, O].
    """
    parts, start = [], 0
    for matrix, end in zip(weight, ends.tolist()):
        parts.append(x[start:end] @ matrix.t())
        start = end
    return torch.cat(parts)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``grouped_gemm`` plus ``bias[g]`` plus ``scaling * (x @ A[g].T) @ B[g].T``: [G, O], [G, r, I] and [G, O, r]."""
    y = grouped_gemm(x, weight.to(x.dtype), ends)
    if A is not None and B is not None:
        y = y + scaling * grouped_gemm(grouped_gemm(x, A.to(x.dtype), ends), B.to(x.dtype), ends)
    if bias is not None:
        lengths = torch.diff(ends, prepend=ends.new_zeros(1))
        y = y + bias.to(x.dtype).repeat_interleave(lengths, 0)
    return y


def experts_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: Sequence[Any],
    down: Sequence[Any],
    activation: str = "silu",
    **options: Any,
) -> torch.Tensor:
    """``sum_k weights[t, k] * down[e](glu(up[e](x[t])))`` with ``e = experts[t, k]``.

    ``up`` and ``down`` hold weight, bias, A, B and scaling as ``grouped_linear`` takes them; ``options`` are those of
    ``packed_glu``.
    """

    def linear(rows: torch.Tensor, stack: Sequence[Any]) -> torch.Tensor:
        weight, bias, A, B, scaling = stack
        return grouped_linear(rows, weight, ends, A, B, scaling, bias=bias)

    counts = torch.bincount(experts.reshape(-1), minlength=up[0].shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    hidden = packed_glu(linear(permute(x, experts), up), activation, **options)
    return unpermute(linear(hidden, down), experts, weights)


def permute(x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` [T, H], one for each of the experts [T, K] that a token chose, sorted by expert (stably)."""
    order = experts.reshape(-1).argsort(stable=True)
    return x[order // experts.shape[1]]


def unpermute(y: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows of ``y`` [T * K, H] times its ``weights`` [T, K], in float32, in the dtype of ``y``."""
    wide = torch.promote_types(torch.float32, y.dtype)
    inverse = experts.reshape(-1).argsort(stable=True).argsort()
    rows = y[inverse].view(*experts.shape, y.shape[1]).to(wide)
    return (rows * weights.to(wide).unsqueeze(-1)).sum(1).to(y.dtype)

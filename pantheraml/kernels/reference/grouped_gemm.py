"""Matrix products of groups of rows with a matrix each, in plain torch: the specification, for autograd."""

from __future__ import annotations

import torch


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


def lora_grouped_gemm(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``grouped_gemm`` plus ``scaling * (x @ A[g].T) @ B[g].T``, with A [G, r, I] and B [G, O, r]."""
    update = grouped_gemm(grouped_gemm(x, A.to(x.dtype), ends), B.to(x.dtype), ends)
    return grouped_gemm(x, weight.to(x.dtype), ends) + scaling * update


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

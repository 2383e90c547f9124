"""The balance of experts' load over the tokens of all ranks that share each sequence.

It is no mean over tokens: each expert's share of the tokens is multiplied by its mean probability. So the ranks add up
both before. The formula is that of transformers' ``load_balancing_loss_func`` (https://arxiv.org/abs/2101.03961).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..parallel.context import Divided


def balance_over_ranks(
    router_logits: Sequence[torch.Tensor], chosen: int, mask: torch.Tensor | None, divided: Divided
) -> torch.Tensor:
    """The balance loss of a divided batch, the same on all its ranks.

    Args:
        router_logits: Of each layer, [B * T / ranks, experts].
        chosen: Experts that a token is sent to.
        mask: [B, T / ranks], 0 where a token is padding; None where none is but what filled the rows up.
        divided: The batch.

    Returns:
        0-d, float32. Its gradient is that of this rank's tokens times the number of ranks, so that the mean over the
        ranks is the gradient of the whole.
    """
    device, experts = router_logits[0].device, router_logits[0].shape[-1]
    group, division = divided.group, divided.division
    if mask is None:
        share = division.length // group.size
        mask = (torch.arange(share) + group.rank * share < division.real).expand(division.batch, share)
    weights = mask.reshape(-1).to(device, torch.float32)
    counts, probabilities = (torch.zeros(experts, dtype=torch.float32, device=device) for _ in range(2))
    for logits in router_logits:
        routed = logits.softmax(-1)
        experts_of = routed.detach().topk(chosen, -1).indices
        counts = counts.scatter_add(0, experts_of.flatten(), weights.repeat_interleave(chosen))
        probabilities = probabilities + (routed.float() * weights[:, None]).sum(0)
    rows = weights.sum() * len(router_logits)
    sums = group.sum(torch.cat([counts, probabilities, rows[None]]))
    counts, total, rows = sums[:experts], sums[experts:-1], sums[-1]
    total = total + group.size * (probabilities - probabilities.detach())
    return experts * (counts / rows * (total / rows)).sum()

"""What each level of keeping a decoder layer's activations holds in memory and takes in time, from its shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .attention import AttentionPlan
from .decoder import DecoderPlan, parts_of
from .levels import LEVELS, Host, Keep, Level
from .slots import plan_of, swap_of


@dataclass(frozen=True)
class Cost:
    """What keeping a layer at one level takes.

    Attributes:
        bytes: Held on the device between forward and backward.
        seconds: Of computing again and of waiting for copies, as an estimate by which levels are compared.
        host_bytes: Held on the host.
    """

    bytes: int
    seconds: float
    host_bytes: int = 0


# Rates by which recomputation is estimated; only their ratios matter. Products and attention as measured on an H100.
_PRODUCT_RATE = 750e12
_ATTENTION_RATE = 500e12
# A copy to the host runs beside the arithmetic, which feels this share of it (512 MiB there and back cost a layer 2 ms
# on an H100), and waits for what outlasts it.
_HOST_RATE = 50e9
_HOST_FELT = 0.11
# Gathering weights runs beside the arithmetic, which feels this share of it, and waits for what outlasts it.
_GATHERING_FELT = 0.4
_STATISTIC_BYTES = 4


def forward_seconds(layer: nn.Module, tokens: int) -> float:
    """How long the products of a layer's forward take, as an estimate like those of ``costs_of``."""
    # Bytes of 4-bit weights stand for two numbers each.
    weights = sum(p.numel() * (2 if p.dtype is torch.uint8 else 1) for p in layer.parameters())
    return 2.0 * tokens * weights / _PRODUCT_RATE


def cost_of_weights(layer: nn.Module, tokens: int, held: int, seconds: float) -> dict[bool, Cost]:
    """What it takes to gather a sharded layer's weights again for its backward, and to keep them: False and True.

    Args:
        layer: A decoder layer.
        tokens: Tokens of a forward.
        held: Bytes of the gathered weights.
        seconds: Of gathering them while nothing else runs.
    """
    # A backward, beside which they are gathered, is no shorter than a forward.
    felt = _GATHERING_FELT * seconds + max(0.0, seconds - forward_seconds(layer, tokens))
    return {False: Cost(0, felt), True: Cost(held, 0.0)}


def costs_of(layer: nn.Module, tokens: int, length: int) -> dict[Level, Cost] | None:
    """What each level of a layer holds and takes to compute again.

    Args:
        layer: A decoder layer.
        tokens: Tokens of a forward (batch x sequence).
        length: Sequence length.

    Returns:
        The costs, those that hold the least on the device first, or None for a layer that does not run as one node.
    """
    swap = swap_of(layer)
    parts = parts_of(layer) if swap is not None and isinstance(swap.plan, DecoderPlan) else None
    if parts is None:
        return None
    plan: AttentionPlan = plan_of(parts.attention)
    widths = [(linear.in_features, linear.out_features) for linear in parts.linears]
    around = len(plan.inputs) + 1
    hidden = widths[0][0]
    q_width, kv_width = (widths[0][1], widths[1][1]) if plan.widths is None else plan.widths[:2]
    inner = sum(out for _, out in widths[around:-1])
    element = next((p.element_size() for n in parts.norms if n is not None for p in n.parameters()), 2)
    heads = q_width // plan.head_dim
    _, after, _, after_mlp = parts.norms
    unnormed = q_width + kv_width if parts.head_norms is not None else 0

    # Bytes of a token, by what has to stay for them.
    bytes_of = {
        Keep.INPUT: hidden * element,
        Keep.ATTENTION: q_width * element + heads * _STATISTIC_BYTES,
        Keep.RESIDUAL: (q_width + 2 * kv_width + hidden + unnormed + (hidden if after is not None else 0)) * element,
        Keep.ALL: (inner + (hidden if after_mlp is not None else 0)) * element,
    }
    reach = {Host.NOTHING: -1, Host.RESULTS: Keep.ATTENTION, Host.RESIDUAL: Keep.RESIDUAL}

    products = [2.0 * tokens * a * b / _PRODUCT_RATE for a, b in widths]
    attention = 2.0 * tokens * length * q_width / _ATTENTION_RATE
    forward = sum(products) + attention
    takes = {Keep.ALL: 0.0}
    takes[Keep.RESIDUAL] = sum(products[around:-1]) + (products[-1] if after_mlp is not None else 0.0)
    takes[Keep.ATTENTION] = takes[Keep.RESIDUAL] + sum(products[:around])
    takes[Keep.INPUT] = takes[Keep.ATTENTION] + attention
    costs = {}
    for level in LEVELS:
        moved = tokens * sum(b for k, b in bytes_of.items() if k <= min(level.keep, reach[level.host]))
        stays = tokens * sum(b for k, b in bytes_of.items() if reach[level.host] < k <= level.keep)
        copy = moved / _HOST_RATE
        felt = 2 * (_HOST_FELT * copy + max(0.0, copy - forward))
        costs[level] = Cost(stays, takes[level.keep] + felt, moved)
    return dict(sorted(costs.items(), key=lambda entry: entry[1].bytes))

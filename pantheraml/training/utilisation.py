"""How much of a device's peak the products with a model's weights take (model FLOPs utilisation, MFU).

The definition is that of PaLM (https://arxiv.org/abs/2204.02311, appendix B) without attention's own products, and for
weights that are not trained without the gradient of the weight: a token costs 4 floating-point operations for each
weight that it is multiplied with, and 2 more where the weight is trained. Recomputed activations count once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..device import Device
from ..models import stacks
from ..models.record import record_of
from ..models.roles import looks_like_experts

# Dense bf16 or fp16 products of a device, in 10^12 operations a second, by a part of its name; of several the first
# that matches. From the makers' data sheets, where figures with sparsity are twice these.
PEAKS: dict[str, float] = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "T4": 65.0,
    "V100 PCIE": 112.0,
    "V100": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def peak_of(device: Device) -> float | None:
    """Operations a second that a device's 16-bit products reach at most, or None where that is not known."""
    words = device.name.replace("-", " ").split()
    for name, teraflops in PEAKS.items():
        parts = name.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return teraflops * 1e12
    return None


def flops_per_token(model: nn.Module) -> float:
    """Operations that a token takes in the products with a model's weights, forward and backward.

    Args:
        model: A model, whole or sharded, quantised or not. Of a mixture's experts those that a token reaches count.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(text, "num_experts_per_tok", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not head:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            count = float(numbers_in(module, parameter))
            stack = stacks.packed_shape(module) or (parameter.shape if looks_like_experts(module) else None)
            if chosen is not None and stack is not None:
                count *= min(chosen / stack[0], 1.0)
            total += count * (6 if parameter.requires_grad else 4)
    return total


def numbers_in(module: nn.Module, parameter: nn.Parameter) -> int:
    """How many numbers a parameter of a module stands for, also one that is packed, whole or sharded."""
    stack = stacks.packed_shape(module)
    if stack is not None:
        return torch.Size(stack).numel()
    state = getattr(parameter, "quant_state", None)
    if state is None and parameter is module._parameters.get("weight") and not parameter.is_floating_point():
        # Of a sharded model the layer has the state.
        state = vars(module).get("quant_state")
    return parameter.numel() if state is None else state.shape.numel()


def ceiling(model: nn.Module, args: Any, device: Device) -> float | None:
    """Tokens a second at which one device would be at its peak, or None where that is not known.

    Args:
        model: The model that is trained.
        args: The trainer's config.
        device: The device of this rank.
    """
    record = record_of(model)
    mixed = getattr(args, "bf16", False) or getattr(args, "fp16", False)
    peak, flops = peak_of(device), flops_per_token(model)
    if peak is None or not flops or (record is not None and record.quantization.startswith("fp8")):
        return None
    if not mixed and (record is None or record.dtype not in _SIXTEEN_BITS):
        return None
    return peak / flops

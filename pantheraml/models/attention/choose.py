"""Which attention a model gets: ours where nobody asked for another and it gives the family's own numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import log
from ...device import Device, get_device
from ...errors import UnsupportedError
from ...parallel.parts import in_parts
from ..layers.attention import plan
from ..probe import FOREIGN_ERRORS
from ..roles import Role, find_roles
from . import table, xla
from .documents import whole_rows
from .interface import NAME, attention_forward, attention_mask

_RECORDER = "pantheraml_recorder"
_TOKENS = 7
# Scores that caps and sinks change visibly.
_SPREAD = 4.0


def register() -> str:
    """Make the pair known to transformers under its name, which is returned. Registering again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def check_request(value: Any, device: Device | None = None) -> None:
    """Refuse an ``attn_implementation`` argument that the device cannot serve.

    Args:
        value: What the caller asked for: a name, a dict of names, or None.
        device: Where it would run; this process's device when None.

    Raises:
        UnsupportedError: flash attention on a device older than compute capability 8.0, or on none.
    """
    device = device or get_device()
    for name in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(name, str) or not name.startswith("flash_attention"):
            continue
        old = device.type == "cuda" and (device.capability or (0, 0)) < (8, 0)
        if old or device.type in ("cpu", "mps", "xla"):
            raise UnsupportedError(
                f"attn_implementation={name!r} cannot run on {device.name or device.type}",
                where="argument attn_implementation",
                why="FlashAttention needs a GPU of compute capability 8.0 or more",
                hint="leave attn_implementation out: the fastest that runs here is chosen",
            )


def prefer(model: Any) -> bool:
    """Let a model use this attention that resolved to stock ``sdpa``, or to eager because stock sdpa lacks something.

    An implementation that the caller asked for by name is never replaced; the loader calls this only when nobody did.

    Args:
        model: A transformers model with its weights.

    Returns:
        Whether the model uses it.
    """
    resolved = getattr(model.config, "_attn_implementation", None)
    device = get_device()
    features: dict[str, bool] | None = {}
    if device.type == "xla":
        if resolved != "sdpa":
            return False
        model.set_attn_implementation(xla.register())
        return True
    if resolved not in ("sdpa", "eager"):
        return False
    if resolved == "eager":
        features = _features_of_eager(model)
    if features is None:
        return False
    model.set_attn_implementation(register())
    log.once(describe(model, device, **features))
    return True


def describe(model: Any, device: Device, *, softcap: bool = False, sinks: bool = False) -> str:
    """One line: the kernels that serve ``model`` on ``device``, whole rows first, then packed ones."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    limit = getattr(config, "max_position_embeddings", None) or table.ANY

    def first(kind: str) -> str:
        call = table.Call(kind, head_dim, model.dtype, limit, softcap=softcap, sinks=sinks)
        return (table.order(call, device) or ("sdpa",))[0]

    packed = first("documents")
    whole = packed if softcap or sinks else first("causal")
    traits = [f"head_dim {head_dim}", str(model.dtype).removeprefix("torch.")]
    traits += ["soft cap"] * softcap + ["sinks"] * sinks
    return f"attention ({', '.join(traits)}): {whole}; packed rows and windows: {packed}"


def _features_of_eager(model: Any) -> dict[str, bool] | None:
    """What the attention of a family without stock sdpa has besides the common; None where ours differs from it.

    The model's layers are asked what they tell the attention function; with that, the family's eager function and ours
    get the same numbers.
    """
    if model._supports_sdpa or not model._supports_attention_backend:
        return None
    if any(parameter.is_meta or not parameter.numel() for parameter in model.parameters()):
        return None
    try:
        calls = _learnt(model) if in_parts(model) else _recorded(model)
        if not calls or not all(_agree(module, keywords) for module, keywords in calls):
            return None
    except FOREIGN_ERRORS as error:
        log.get_logger().debug("attention of %s: %s", type(model).__name__, error)
        return None
    given = {name for _, keywords in calls for name, value in keywords.items() if value is not None}
    return {"softcap": "softcap" in given, "sinks": "s_aux" in given}


def _recorded(model: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Each attention layer of ``model`` and the keyword arguments that it gives the attention function."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **keywords: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append((module, keywords))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_RECORDER] = record
    ALL_MASK_ATTENTION_FUNCTIONS[_RECORDER] = attention_mask
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.set_attn_implementation(_RECORDER)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.arange(_TOKENS, device=model.device)[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_RECORDER], ALL_MASK_ATTENTION_FUNCTIONS[_RECORDER]
        for module, training in modes:
            module.training = training
    return calls


def _learnt(model: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The same of a model that cannot run: each layer is asked by itself, with other weights; none where one is odd."""
    asked = [candidate.module for candidate in find_roles(model) if candidate.role is Role.ATTENTION]
    if any("Attention" in type(module).__name__ and module not in asked for module in model.modules()):
        return []
    calls = []
    for module in asked:
        swap = plan(module)
        if isinstance(swap, str):
            return []
        calls.append((module, swap.plan.keywords(module)))
    return calls


def _agree(module: Any, keywords: dict[str, Any]) -> bool:
    eager: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(7)
    groups = module.num_key_value_groups
    heads = module.config.num_attention_heads
    shapes = [(1, heads, _TOKENS, module.head_dim)] + [(1, heads // groups, _TOKENS, module.head_dim)] * 2
    query, key, value = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    query = query * _SPREAD * math.sqrt(module.head_dim)
    for window in (None, 3):
        documents = whole_rows(1, _TOKENS, window, device)
        bias = torch.zeros(documents.dense().shape, device=device).masked_fill(~documents.dense(), -math.inf)
        with torch.no_grad():
            expected, _ = eager(module, query, key, value, bias, **keywords)
            got, _ = attention_forward(module, query, key, value, documents, **keywords)
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            return False
    return True

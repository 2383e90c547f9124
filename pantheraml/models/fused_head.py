"""TRL's contract for log-probabilities without logits, served by the model's own forward and lazy logits.

TRL's trainers (1.15 and later) give a model's instance a forward that takes ``fused_lm_head=True`` and returns
``FusedCausalLMOutput``: loss, log-probabilities a token, and statistics for metrics. Theirs runs the backbone and
multiplies with ``lm_head.weight`` itself, with the scale and soft cap that the config's attribute names suggest. Ours
runs the family's own forward, whose head returns lazy logits, and reads there what the family did to them. So adapters
and copies on the head, unusual scalings and layers between backbone and head come out as in the family's forward.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..parallel.context import current
from .balance import balance_over_ranks
from .layers import head as head_layer
from .layers.projection import lazy_heads
from .layers.slots import Swap, foreign_forward, install, is_installed
from .loss import supervised, token_statistics
from .roles import base_model, find_head, head_modules

_KEY = "_pantheraml_fused_head"
_KEYWORD = "fused_lm_head"
# accelerate's hook, which brings what a model computes on several devices to the one that the inputs came from. TRL's
# patch takes the place of the forward that calls it, and TRL divides the log-probabilities by counts on that device.
_PLACEMENT, _HOOKED = "_hf_hook", "_old_forward"


@dataclass
class FusedHead:
    """What TRL's patch of a model was made with, and the patch.

    Attributes:
        temperature: Divides the logits.
        float32: Whether the head's product is taken in float32, outside autocast.
        outputs: Fields of the output to compute besides the loss.
        output_class: TRL's output class.
        replaced: TRL's forward, for what is not served here.
    """

    temperature: float
    float32: bool
    outputs: tuple[str, ...]
    output_class: type
    replaced: Any


def _trl_patch(method: Any) -> FusedHead | None:
    """Read what TRL's patched forward was made with; None when the forward is not TRL's patch."""
    function: Any = getattr(method, "__func__", None)
    code = getattr(function, "__code__", None)
    if code is None or _KEYWORD not in code.co_varnames:
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    output_class = function.__globals__.get("FusedCausalLMOutput")
    if output_class is None or not {"temperature", "cast_lm_head_to_fp32", "outputs"} <= cells.keys():
        return None
    return FusedHead(
        temperature=float(cells["temperature"]),
        float32=bool(cells["cast_lm_head_to_fp32"]),
        outputs=tuple(cells["outputs"]),
        output_class=output_class,
        replaced=method,
    )


def fused_head_of(model: nn.Module) -> FusedHead | None:
    """Return what ``install_fused_head`` put into a transformers model, or None."""
    return model.__dict__.get(_KEY)


def install_fused_head(model: nn.Module) -> bool:
    """Serve TRL's fused head contract with this package's kernels.

    Call it after TRL's trainer patched the model. Temperature, precision and outputs are those TRL asked for.

    Args:
        model: An adapted transformers model or PEFT's wrapper around one.

    Returns:
        Whether TRL's patch was found and replaced. False for a model without the patch, and for one whose head is not
        adapted, where TRL's own forward goes on serving.
    """
    inner = base_model(model)
    fused = _trl_patch(inner.__dict__.get("forward"))
    found = find_head(inner)
    if fused is None or found is None:
        return False
    for _, module in head_modules(*found):
        if is_installed(module):
            continue
        if not fused.float32 or foreign_forward(module) is None or type(module).forward is not nn.Linear.forward:
            return False
        # TRL casts this head to float32 and gives it a forward that does the same to its input.
        plan = head_layer.HeadPlan(plain=True, float32=True)
        install(module, Swap("head", "linear_cross_entropy (float32)", plan, head_layer.forward))
    inner.__dict__[_KEY] = fused
    inner.__dict__["forward"] = types.MethodType(_with_signature_of(type(inner)), inner)
    return True


def uninstall_fused_head(model: nn.Module) -> None:
    """Put TRL's own patch back."""
    inner = base_model(model)
    fused = inner.__dict__.pop(_KEY, None)
    if fused is not None:
        inner.__dict__["forward"] = fused.replaced


@functools.cache
def _with_signature_of(cls: type) -> Any:
    # generate() checks its keyword arguments against the signature of forward.
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = self.__dict__.get(_PLACEMENT)
        if hook is None or getattr(self.__dict__.get(_HOOKED), "__func__", None) is forward:
            return _forward(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, _forward(self, *args, **kwargs))

    return forward


def _forward(
    self: Any,
    *args: Any,
    fused_lm_head: bool = False,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    if not fused_lm_head:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return type(self).forward(self, *args, **kwargs)
    fused = fused_head_of(self)
    assert fused is not None
    if labels is None and shift_labels is None:
        raise UnsupportedError("the fused head scores labels, and none were given", where="argument labels")
    kwargs["use_cache"] = False
    config = self.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    if shift_labels is None:
        assert labels is not None
        targets = labels[:, 1:]
    else:
        targets = shift_labels
    kept = supervised(targets)
    with lazy_heads():
        result = type(self).forward(self, *args, **kwargs)
    logits = result.logits if shift_labels is not None else result.logits[:, :-1]
    targets = targets.to(logits.device)
    statistics = token_statistics(
        logits,
        targets,
        outputs=tuple(name for name in fused.outputs if name != "log_probs"),
        temperature=fused.temperature,
        float32=fused.float32,
        kept=kept,
    )
    mask = targets != -100
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -statistics.log_probs.sum() / (count.to(logits.device) if isinstance(count, torch.Tensor) else count)
    aux_loss, divided = getattr(result, "aux_loss", None), current()
    if aux_loss is not None and divided is not None:
        padding = kwargs.get("attention_mask")
        aux_loss = balance_over_ranks(result.router_logits, config.num_experts_per_tok, padding, divided)
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
    return fused.output_class(loss=loss, label_mask=mask, aux_loss=aux_loss, **vars(statistics))

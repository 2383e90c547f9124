"""Quantisation-aware training: linear layers compute with what torchao will round their weights and inputs to.

The rounding is that of torchao's fake quantisers, through which gradients pass as if they were not there. With LoRA the
weight that is rounded has the adapter in it, since that is the weight that will be saved.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import log
from ..device import require
from ..errors import ArgumentError, ConfigError, ConflictError, UnsupportedError, nearest
from .roles import base_model, is_lora, looks_like_experts

_ATTRIBUTE = "_pantheraml_qat"
_GROUPS = {"int4": 32, "int8-int4": 32, "fp8-int4": 128}  # weights that share a scale, where it is not a row
# Scheme -> what it means, and the class of torchao's configuration.
SCHEMES: dict[str, tuple[str, str]] = {
    "int4": ("weights in 4 bits, a scale for 32", "IntxWeightOnlyConfig"),
    "int8": ("weights in 8 bits, a scale a row", "IntxWeightOnlyConfig"),
    "int8-int4": ("weights in 4 bits, a scale for 32; inputs in 8 bits", "Int8DynamicActivationIntxWeightConfig"),
    "fp8-int4": ("weights in 4 bits, a scale for 128; inputs in fp8", "Float8DynamicActivationInt4WeightConfig"),
    "fp8-fp8": ("weights and inputs in fp8, a scale a row", "Float8DynamicActivationFloat8WeightConfig"),
}
_PHONE = "phone-deployment"
_ELSEWHERE = {"cactus": "it is the format of another engine, and torchao has no configuration for it"}


def check_scheme(scheme: Any, model_type: str | None = None) -> str:
    """Return the scheme that is meant.

    Args:
        scheme: A name; case does not matter.
        model_type: The model's, on which ``"phone-deployment"`` depends.

    Raises:
        ArgumentError: no text.
        UnsupportedError: a scheme of the API that torchao does not have.
        ConfigError: no such scheme.
    """
    if not isinstance(scheme, str):
        raise ArgumentError(f"qat_scheme must be a name, got {scheme!r}", where="argument qat_scheme")
    name = scheme.strip().lower()
    known = [*SCHEMES, _PHONE]
    listed = "; ".join(f"{key!r}: {about}" for key, (about, _) in SCHEMES.items())
    hint = f"the schemes are {listed}; {_PHONE!r}: 'int8-int4', or 'int4' for Gemma 3"
    if name in _ELSEWHERE:
        raise UnsupportedError(
            f"the scheme {scheme!r} cannot be used", where="argument qat_scheme", why=_ELSEWHERE[name], hint=hint
        )
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(
            f"unknown scheme {scheme!r}" + (f"; did you mean {close!r}?" if close else ""),
            where="argument qat_scheme",
            hint=hint,
        )
    if name == _PHONE:
        return "int4" if (model_type or "").startswith("gemma3") else "int8-int4"
    return name


def torchao_config(scheme: str) -> Any:
    """Return the configuration by which a model trained with ``scheme`` is quantised.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    require("torchao", what=f"qat_scheme={scheme!r}")
    from torchao import quantization

    four_bits: Any = getattr(torch, "int4")  # noqa: B009 - torch's stubs lack it
    group = quantization.PerGroup(_GROUPS.get(scheme, 1))
    arguments: dict[str, dict[str, Any]] = {
        "int4": {"weight_dtype": four_bits, "granularity": group},
        "int8": {"weight_dtype": torch.int8, "granularity": quantization.PerAxis(0)},
        "int8-int4": {"weight_dtype": four_bits, "weight_granularity": group},
        "fp8-int4": {},
        "fp8-fp8": {"granularity": quantization.PerRow()},
    }
    return getattr(quantization, SCHEMES[scheme][1])(**arguments[scheme])


def scheme_of(model: nn.Module) -> str | None:
    """The scheme that a model is trained with, or None."""
    return vars(base_model(model)).get(_ATTRIBUTE)


def check_model(model: nn.Module, scheme: str, adapter: Any = None) -> None:
    """Refuse what cannot be trained with ``scheme``; nothing is changed.

    Args:
        model: A transformers model, or PEFT's wrapper around one.
        scheme: What ``check_scheme`` gave.
        adapter: The configuration of the LoRA that it will get.

    Raises:
        MissingDependencyError: torchao is not installed.
        ConflictError: the model is quantised, or an option of the adapter makes its weight unknown while it trains.
        UnsupportedError: it has experts, layers on several devices, or rows that do not divide into the groups.
    """
    require("torchao", what=f"qat_scheme={scheme!r}")
    if adapter is not None and (adapter.use_dora or adapter.lora_bias or adapter.lora_dropout):
        raise ConflictError(
            "qat_scheme works with plain LoRA only: the weight with the adapter in it is what is rounded",
            hint="leave out use_dora, lora_bias and lora_dropout",
        )
    group = _GROUPS.get(scheme, 1)
    for path, module in base_model(model).named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and (weight.dtype.itemsize == 1 or type(weight).__name__ == "Params4bit"):
            raise ConflictError(
                "qat_scheme needs weights in 16 or 32 bit", where=path, hint="load the model with load_in_4bit=False"
            )
        if looks_like_experts(module):
            raise UnsupportedError("experts are not trained with a qat_scheme", where=path, hint="leave it out")
        if hasattr(module, "_hf_hook"):
            raise UnsupportedError(
                "qat_scheme does not work with layers that are placed by hooks",
                where=path,
                hint="load the model onto one device",
            )
    for path, module in _reached(model).items():
        if module.in_features % group:
            raise UnsupportedError(
                f"rows of {module.in_features} do not divide into the groups of {group} that {scheme!r} has",
                where=path,
                hint="use 'int8' or 'fp8-fp8'",
            )


def _reached(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that transformers quantises when it loads with torchao: all but the head."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    inner = base_model(model)
    kept = [name.replace(".base_layer", "") for name in get_keys_to_not_convert(inner)]
    kept += inner._keep_in_fp32_modules or ()
    return {
        path: module
        for path, module in inner.named_modules()
        if type(module) is nn.Linear
        and ".lora_" not in path
        and should_convert_module(path.replace(".base_layer", ""), kept)
    }


def prepare(model: nn.Module, scheme: str) -> None:
    """Round weights, and inputs where the scheme says so, in every forward from now on.

    Args:
        model: What ``check_model`` accepted, perhaps with LoRA since.
        scheme: What ``check_scheme`` gave.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    inner, reached = base_model(model), set(_reached(model).values())
    config = QATConfig(torchao_config(scheme), step=QATStep.PREPARE)
    quantize_(inner, config, filter_fn=lambda module, _: module in reached)
    for module in inner.modules():
        if is_lora(module) and hasattr(module.base_layer, "weight_fake_quantizer"):
            module.__dict__["forward"] = types.MethodType(_forward, module)
    object.__setattr__(inner, _ATTRIBUTE, scheme)
    log.info(f"{len(reached)} linear layers are trained as {scheme}: {SCHEMES[scheme][0]}")


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward of a LoRA layer: ``x [..., in_features]`` times the merged weight, both rounded."""
    base = self.base_layer
    weight = base.weight
    if not self.disable_adapters and not self.merged:
        with torch.autocast(x.device.type, enabled=False):  # as the merge computes
            total = weight.float()
            for name in self.active_adapters:
                if name in self.lora_A:
                    A, B = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
                    total = total + (B @ A) * self.scaling[name]
            weight = total.to(weight.dtype)
    if base.activation_fake_quantizer is not None:
        x = base.activation_fake_quantizer(x)
    return F.linear(x, base.weight_fake_quantizer(weight), base.bias)


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Nothing is rounded inside: the model computes what its merged weights give."""
    rounding: list[Any] = [
        module
        for module in model.modules()
        if type(module).__module__.startswith("torchao.") and getattr(module, "enabled", False)
    ]
    for quantizer in rounding:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in rounding:
            quantizer.enabled = True

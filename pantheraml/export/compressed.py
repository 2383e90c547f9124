"""Weights in the formats of compressed-tensors, which vLLM serves: each is rounded to nearest as it is written.

Formats: https://github.com/vllm-project/compressed-tensors. The package names the schemes and packs the tensors; what
is done here is to find the weights and their scales, one weight at a time. Schemes that need a look at data (static
scales of activations) are not written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.safetensors_io import TensorSpec
from ..device import require
from ..errors import UnsupportedError
from .layout import CheckpointLayout
from .methods import COMPRESSED
from .parameters import stacked_experts

# Relative RMS deviation of the logits that rounding the weights may cause, by their bits: errors of a weight of about
# 0.01 (int8), 0.03 (fp8) and 0.1 (4 bits) add up over layers. What a wrong model shows is 1.0 and more.
_LOGIT_BUDGETS = {8: 0.3, 4: 0.8}


class Compression:
    """Compresses the weights of a model's linear layers on their way to the disk.

    Args:
        base: The transformers model, with or without adapters in its modules.
        layout: How its parameters are named on disk.
        method: One of ``methods.COMPRESSED``.

    Attributes:
        names: Names on disk of the weights that are compressed.

    Raises:
        MissingDependencyError: the package compressed-tensors is not installed.
        UnsupportedError: the model has experts, or nothing that could be compressed.
    """

    def __init__(self, base: PreTrainedModel, layout: CheckpointLayout, method: str) -> None:
        require("compressed_tensors", what=f"save_method={method!r}")
        refuse_experts(base)
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import preset_name_to_scheme

        self._method = method
        self._scheme: Any = preset_name_to_scheme(COMPRESSED[method], ["Linear"])
        self._scheme.format = infer_module_format(nn.Linear, self._scheme)
        linears, ignored = _linears(base)
        specs = {group.inputs[0]: group.outputs[0] for group in layout.groups if group.renamed}
        groups = [spec for name in linears if (spec := specs.get(f"{name}.weight")) is not None]
        fitting = [spec for spec in groups if self._fits(spec)]
        if not fitting:
            raise UnsupportedError(
                f"{type(base).__name__} has no linear layer that {method!r} can hold",
                where="argument save_method",
                hint="use 'merged_16bit'",
            )
        self.names = {spec.name for spec in fitting}
        self._ignored = sorted({*ignored, *(s.name.removesuffix(".weight") for s in groups if not self._fits(s))})
        self._specs: dict[tuple[tuple[int, ...], torch.dtype], list[TensorSpec]] = {}

    @property
    def logit_budget(self) -> float:
        """Largest relative RMS deviation of the logits that is right."""
        return _LOGIT_BUDGETS[8 if self._scheme.weights.num_bits >= 8 else 4]

    def _fits(self, spec: TensorSpec) -> bool:
        """Whether rows divide into the scheme's groups, and pack into its words."""
        args = self._scheme.weights
        unit = args.group_size or 1
        if args.num_bits < 8 or _text(self._scheme.format) == "pack-quantized":
            unit = max(unit, 32 // args.num_bits)
        return len(spec.shape) == 2 and spec.shape[1] % unit == 0

    def specs(self, dense: TensorSpec) -> list[TensorSpec]:
        """What a tensor becomes on disk; itself when it is not compressed."""
        if dense.name not in self.names:
            return [dense]
        key = (dense.shape, dense.dtype)
        if key not in self._specs:
            made = self._compress(torch.zeros(dense.shape, dtype=dense.dtype))
            self._specs[key] = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in made.items()]
        prefix = dense.name.removesuffix("weight")
        return [TensorSpec(prefix + spec.name, spec.shape, spec.dtype) for spec in self._specs[key]]

    def tensors(self, name: str, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compress one weight [out, in], where it is."""
        prefix = name.removesuffix("weight")
        return {prefix + key: tensor.contiguous() for key, tensor in self._compress(dense).items()}

    def _compress(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization.utils import calculate_qparams

        args = self._scheme.weights
        low, high = _extremes(dense.float(), args)
        scale, zero_point = calculate_qparams(low, high, args)
        # Scales that are no powers of two are stored in the model's dtype, and weights are divided by what is stored.
        scale = scale if args.scale_dtype is not None else scale.to(dense.dtype)
        compressor: Any = BaseCompressor.get_value_from_registry(_text(self._scheme.format))
        return compressor.compress(
            {"weight": dense, "weight_scale": scale, "weight_zero_point": zero_point}, self._scheme
        )

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says of it, as ``quantization_config``."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        config = QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=_text(self._scheme.format),
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=self._ignored,
        )
        return {**config.model_dump(mode="json", exclude_none=True), "quant_method": "compressed-tensors"}


def refuse_experts(base: PreTrainedModel) -> None:
    """Refuse mixtures of experts, of which these formats would leave the largest part as it is.

    Raises:
        UnsupportedError: there are experts.
    """
    experts = stacked_experts(base)
    if experts:
        raise UnsupportedError(
            "experts are not written in this format",
            where=next(iter(experts)),
            why=f"they would stay in 16 bit: {sum(experts.values()):,} weights",
            hint="use save_method='merged_16bit', or save_pretrained_gguf",
        )


def _linears(base: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Stock names of the decoder's linear layers, and of those that stay as they are."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    linears, ignored = [], []
    for path, module in base.named_modules():
        if not isinstance(module, nn.Linear) or "lora_" in path:
            continue
        name = path.replace(".base_layer", "")
        if id(module) in inside and module is not head:
            linears.append(name)
        else:
            ignored.append(name)
    return linears, ignored


def _extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of what shares a scale."""
    strategy = _text(args.strategy)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(-1), groups.amax(-1)
    rows, columns = args.block_structure
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def _text(member: Any) -> str:
    """The name of a setting, which the package holds as a text or as a member of an enumeration."""
    return str(getattr(member, "value", member))

"""Which tensors a GGUF file holds, and how each is made from those of a transformers folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from ...checkpoint.safetensors_io import SafetensorsFolder
from .families import Family, unsupported
from .metadata import key_value_heads, rope_tensors

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.masked_bias)$")  # of old checkpoints; not weights


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: GGUF name.
        shape: Rows first, as in torch.
        exact: Whether it stays in 32-bit floats: vectors, norms, biases and routers, as llama.cpp has it.
        make: Reads and computes it; fp32.
    """

    name: str
    shape: tuple[int, ...]
    exact: bool
    make: Callable[[], np.ndarray]

    @property
    def head(self) -> bool:
        """Whether it is the output head or the embeddings that may double as one."""
        return self.name in ("output.weight", "token_embd.weight")

    @property
    def experts(self) -> bool:
        """Whether it holds the weights of all experts of a layer."""
        return self.name.endswith("_exps.weight")


def _rope_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the halves of each head's rows: row i of the first half, row i of the second, and so on."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rope_rows_q(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    return _rope_rows(tensor, config.num_attention_heads)


def _rope_rows_k(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    return _rope_rows(tensor, key_value_heads(config))


def _plus_one(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    del config
    return tensor + 1.0


def _in_by_out(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    del config
    return tensor.transpose(-1, -2)


def _half(tensor: torch.Tensor, start: int) -> torch.Tensor:
    """Every second column, and columns as rows where these are weights of experts [expert, in, out]."""
    half = tensor[..., start::2]
    return half.transpose(-1, -2) if half.ndim == 3 else half


def _gates(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    del config
    return _half(tensor, 0)


def _ups(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    del config
    return _half(tensor, 1)


TRANSFORMS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "rope_rows_q": _rope_rows_q,
    "rope_rows_k": _rope_rows_k,
    "plus_one": _plus_one,
    "in_by_out": _in_by_out,
    "gates": _gates,
    "ups": _ups,
}


def pieces_of(name: str, family: Family) -> list[tuple[str, str | None]]:
    """What a tensor becomes: names that the package maps, each with the name of its transform or None."""
    for pattern, pieces in family.pieces:
        if re.search(pattern, name):
            return [(re.sub(pattern, end, name), transform) for end, transform in pieces]
    return [(name, next((kind for pattern, kind in family.transforms if re.search(pattern, name)), None))]


def name_map(config: Any, family: Family) -> gguf.TensorNameMap:
    """The package's names for the tensors of an architecture."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def _read(folder: SafetensorsFolder, name: str) -> torch.Tensor:
    return folder.read(name).float()


def plan(folder: SafetensorsFolder, config: Any, family: Family) -> list[PlannedTensor]:
    """Return the tensors of the file, in the order in which they are written.

    Args:
        folder: The merged model.
        config: Its config.
        family: Its row.

    Raises:
        UnsupportedError: a tensor has no place in the architecture.
    """
    names = name_map(config, family)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    planned = [
        PlannedTensor(name, values.shape, True, lambda values=values: values)
        for name, values in rope_tensors(config).items()
    ]
    stacks: dict[str, list[str]] = {}
    for source in folder.names():
        if _BUFFERS.search(source) or (tied and source == "lm_head.weight"):
            continue
        for name, transform in pieces_of(source, family):
            if transform == "stack_experts":
                stacks.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(source)
            else:
                planned.append(_single(folder, source, target_name(names, name, config), transform, config))
    for stacked, sources in stacks.items():
        planned.append(_stack(folder, target_name(names, stacked, config), sources))
    return sorted(planned, key=_order)


def target_name(names: gguf.TensorNameMap, source: str, config: Any) -> str:
    """The GGUF name of a tensor.

    Raises:
        UnsupportedError: the architecture has no place for it.
    """
    target = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if target is None:
        why = "it is trained apart from the input embeddings" if source == "lm_head.weight" else None
        raise unsupported(
            f"{config.model_type} models have no place for {source!r} in a GGUF file", where=source, why=why
        )
    return target


def _single(folder: SafetensorsFolder, source: str, target: str, transform: str | None, config: Any) -> PlannedTensor:
    def transformed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if transform is None else TRANSFORMS[transform](tensor, config)

    def make() -> np.ndarray:
        return transformed(_read(folder, source)).contiguous().numpy()

    shape = tuple(transformed(torch.empty(folder.spec(source).shape, device="meta")).shape)
    exact = len(shape) < 2 or target.endswith(("_norm.weight", "ffn_gate_inp.weight", ".bias"))
    return PlannedTensor(target, shape, exact, make)


def _stack(folder: SafetensorsFolder, target: str, sources: list[str]) -> PlannedTensor:
    ordered = sorted(sources, key=lambda name: int(re.findall(r"experts\.(\d+)\.", name)[0]))
    shape = (len(ordered), *folder.spec(ordered[0]).shape)

    def make() -> np.ndarray:
        return torch.stack([_read(folder, name) for name in ordered]).numpy()

    return PlannedTensor(target, shape, False, make)


def _order(tensor: PlannedTensor) -> tuple[int, int, str]:
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    return (1, int(block.group(1)), tensor.name) if block else (0, 0, tensor.name)

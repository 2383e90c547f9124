"""Writing one GGUF file, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .families import Family
from .metadata import hyper_parameters
from .tensors import PlannedTensor
from .tokenizer import GGUFTokenizer
from .types import FileType

_Q = gguf.GGMLQuantizationType
TENSOR_TYPES = {
    name: _Q[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")
}
_FEW_BITS = (_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1)
_FILE_TYPE_NAMES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
_FILE_TYPES = {name: gguf.LlamaFileType[_FILE_TYPE_NAMES.get(name, f"MOSTLY_{name.upper()}")] for name in TENSOR_TYPES}
_F16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a file holds.

    Attributes:
        path: Where it is.
        types: Number of tensors by type.
        kept: Tensors that did not get the file's type, with the reason.
        nbytes: Size of the tensors.
    """

    path: Path
    types: dict[str, int]
    kept: dict[str, str]
    nbytes: int


def tensor_type(tensor: PlannedTensor, wanted: FileType) -> tuple[Any, str | None]:
    """Return the type a tensor gets in a file, and why it is not the file's (None where that is as it should be)."""
    due = TENSOR_TYPES[wanted.name]
    if tensor.exact:
        return _Q.F32, None
    if due == _Q.MXFP4 and not tensor.experts:
        return _fitting(tensor, _Q.Q8_0)
    if tensor.head and due in _FEW_BITS:
        # Errors in the embeddings and the head reach every token; llama.cpp spends more bits on them as well.
        return _fitting(tensor, _Q.Q8_0)
    return _fitting(tensor, due)


def _fitting(tensor: PlannedTensor, due: Any) -> tuple[Any, str | None]:
    block = gguf.GGML_QUANT_SIZES[due][0]
    if tensor.shape[-1] % block == 0:
        return due, None
    return _Q.F16, f"rows of {tensor.shape[-1]} are not made of blocks of {block}"


def size_of(tensor: PlannedTensor, kind: Any) -> int:
    """Bytes of a tensor in a type."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(tensor.shape)) // block * width


def planned_bytes(tensors: list[PlannedTensor], wanted: FileType) -> int:
    """Bytes of a file's tensors."""
    return sum(size_of(tensor, tensor_type(tensor, wanted)[0]) for tensor in tensors)


def bytes_at_least(weights: int, wanted: FileType) -> int:
    """Bytes of a file with so many weights, of which some may get a larger type."""
    block, width = gguf.GGML_QUANT_SIZES[TENSOR_TYPES[wanted.name]]
    return weights // block * width


def write_file(
    path: Path,
    tensors: list[PlannedTensor],
    wanted: FileType,
    arch: str,
    metadata: Callable[[gguf.GGUFWriter], None],
) -> WrittenFile:
    """Write a file. Holds one tensor at a time, in 32-bit floats and in its type.

    Args:
        path: File to write.
        tensors: What ``tensors.plan`` gave.
        wanted: One of the types that are written here.
        arch: GGUF architecture.
        metadata: Adds the keys; that of the file's type is there.
    """
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_file_type(_FILE_TYPES[wanted.name])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        metadata(writer)
        types: dict[str, Any] = {}
        kept: dict[str, str] = {}
        for tensor in tensors:
            kind, reason = tensor_type(tensor, wanted)
            if reason is not None:
                kept[tensor.name] = reason
            if kind == _Q.F16 and np.abs(tensor.make()).max(initial=0.0) > _F16_MAX:
                kind, kept[tensor.name] = _Q.F32, "its largest value is none of a 16-bit float"
            types[tensor.name] = kind
            _declare(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(gguf.quantize(tensor.make(), types[tensor.name]))
        writer.flush()
    finally:
        writer.close()
    nbytes = sum(size_of(tensor, types[tensor.name]) for tensor in tensors)
    return WrittenFile(path, dict(Counter(kind.name for kind in types.values())), kept, nbytes)


def _declare(writer: gguf.GGUFWriter, tensor: PlannedTensor, kind: Any) -> None:
    """Announce a tensor; the package takes the shape in bytes when the elements are bytes."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    floats = {_Q.F32: np.dtype(np.float32), _Q.F16: np.dtype(np.float16)}.get(kind)
    shape = tensor.shape if floats is not None else (*tensor.shape[:-1], tensor.shape[-1] // block * width)
    writer.add_tensor_info(tensor.name, shape, floats or np.dtype(np.uint8), size_of(tensor, kind), raw_dtype=kind)


def model_metadata(
    config: Any, family: Family, tokenizer: GGUFTokenizer, *, name: str
) -> Callable[[gguf.GGUFWriter], None]:
    """Return what adds a model's settings and tokenizer to a file.

    Args:
        config: The model's config.
        family: Its row.
        tokenizer: Its tokenizer.
        name: Name of the model, for people.
    """

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        for key, (kind, value) in hyper_parameters(config, family).items():
            getattr(writer, f"add_{kind}")(key, value)
        tokenizer.write(writer)

    return add

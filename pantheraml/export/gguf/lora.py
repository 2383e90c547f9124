"""An adapter alone as a GGUF file, which llama.cpp applies to a base model's file when it loads (``--lora``)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from ... import log
from ...checkpoint.atomic import atomic_directory
from ...checkpoint.disk import disk_errors, human, require_free
from ...errors import CheckpointError, ConflictError, UnsupportedError
from ...models.record import record_of
from ..dense import pending
from ..parameters import unwrapped
from .check import check_tensors, relative_error
from .families import Family, family_of
from .tensors import TRANSFORMS, PlannedTensor, name_map, pieces_of, target_name
from .types import FileType
from .writer import tensor_type, write_file

_ROOM = 10**6  # bytes for metadata
_ON_ROWS = (None, "rope_rows_q", "rope_rows_k")  # transforms that move rows only, so that they apply to B alone
_MERGE = "merge the adapter: save_pretrained_gguf(folder, tokenizer) writes the whole model"


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What was written.

    Attributes:
        directory: Folder of the files.
        files: The files, in the order of the types asked for.
        modelfile: None: Ollama wants the base model's name as well, which is not known here.
        types: Their types.
        modules: Number of adapted modules.
        seconds: Wall time.
    """

    directory: Path
    files: tuple[Path, ...]
    modelfile: Path | None
    types: tuple[str, ...]
    modules: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two factors of one weight, as llama.cpp takes them, and the update that they have to give.

    Attributes:
        name: GGUF name of the adapted weight.
        embedding: Whether it is the embeddings.
        update: Makes the update as PEFT computes it, in the order of the file's rows; fp32.
        tensors: ``lora_a`` [rank, in] and ``lora_b`` [out, rank]; for embeddings [tokens, rank] and [width, rank].
    """

    name: str
    embedding: bool
    update: Callable[[], torch.Tensor]
    tensors: tuple[PlannedTensor, PlannedTensor]


def export_lora(
    model: Any,
    directory: Path,
    wanted: tuple[FileType, ...],
    *,
    name: str,
    verify: bool = True,
    finish: Callable[[Path], None] | None = None,
) -> LoraReport:
    """Write the active adapters of a model as GGUF files, ``<name>.<TYPE>-LoRA.gguf``.

    The update of every module is ``alpha / rank * B @ A``; what PEFT's scaling has beyond that (rank-stabilised
    scaling, alphas of single modules, several adapters) goes into ``B``.

    Args:
        model: A PEFT model; it is not changed.
        directory: Folder for the files; other files in it stay.
        wanted: Types, each one of ``types.ADAPTER_TYPES``.
        name: Stem of the file names.
        verify: Read the files back, and compare the updates that they give with those that PEFT computes.
        finish: Called with the folder before it gets its name.

    Raises:
        ConflictError: the model has no adapter, or it is disabled or merged already.
        UnsupportedError: the adapter is more than LoRA on linear layers and embeddings, or the family is not written.
        CheckpointError: nothing was written under a final name; the message says why.
    """
    start = time.monotonic()
    base = unwrapped(model)
    family = family_of(base.config)
    alpha, pairs = _plan(model, base, family)
    tensors = [tensor for pair in pairs for tensor in pair.tensors]
    needed = sum(4 * math.prod(tensor.shape) for tensor in tensors) * len(wanted) + _ROOM
    record = record_of(model)
    origin = record.base if record is not None else str(base.name_or_path or "")
    files: list[Path] = []
    with (
        disk_errors(directory, needed, what="the adapter"),
        atomic_directory(directory, overwrite=True, keep=lambda entry: True) as temporary,
    ):
        require_free(temporary, needed, what="the adapter")
        for entry in wanted:
            path = temporary / f"{name}.{entry.name.upper()}-LoRA.gguf"
            chosen = [tensor if _survives(tensor, entry) else replace(tensor, exact=True) for tensor in tensors]
            write_file(path, chosen, entry, family.arch, lambda writer: _write_metadata(writer, name, alpha, origin))
            if verify:
                _check(path, pairs, alpha, entry)
            files.append(directory / path.name)
        if finish is not None:
            finish(temporary)
    report = LoraReport(
        directory, tuple(files), None, tuple(e.name for e in wanted), len(pairs), time.monotonic() - start
    )
    state = "updates read back and compared" if verify else "not verified"
    for path in report.files:
        log.info(f"saved {path}: {human(path.stat().st_size)}, adapters of {len(pairs)} modules, {state}")
    return report


def _survives(tensor: PlannedTensor, wanted: FileType) -> bool:
    """Whether the type can hold a tensor: updates of a short training may be below what scales in f16 can state."""
    kind, _ = tensor_type(tensor, wanted)
    values = tensor.make()
    return relative_error(gguf.dequantize(gguf.quantize(values, kind), kind), values) <= wanted.budget


def _write_metadata(writer: gguf.GGUFWriter, name: str, alpha: float, origin: str) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if origin and not Path(origin).expanduser().is_dir():
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, origin)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{origin}")


def _plan(model: Any, base: Any, family: Family) -> tuple[float, list[_Pair]]:
    layers = _lora_layers(base)
    settings = [_settings(model, base)[name] for name in pending(layers[0][1])]
    trained = [entry.bias for entry in settings if entry.bias != "none"]
    if trained:
        raise UnsupportedError(f"biases were trained along (bias={trained[0]!r})", where="argument model", hint=_MERGE)
    alpha = float(settings[0].lora_alpha) or 1.0
    names = name_map(base.config, family)
    pairs = []
    for path, layer in layers:
        (source, transform), *more = pieces_of(f"{path}.weight", family)
        if more or transform not in _ON_ROWS:
            raise UnsupportedError(
                "llama.cpp holds this weight in another form than an update of it can have", where=path, hint=_MERGE
            )
        pairs.append(_pair(layer, target_name(names, source, base.config), transform, base.config, alpha))
    return alpha, sorted(pairs, key=lambda pair: pair.name)


def _settings(model: Any, base: Any) -> dict[str, Any]:
    return getattr(base, "peft_config", None) or model.peft_config


def _lora_layers(base: Any) -> list[tuple[str, Any]]:
    """The adapted modules by stock name; raises for every kind of change that such a file cannot hold."""
    layers: list[tuple[str, Any]] = []
    for path, module in base.named_modules():
        problem = _problem(path, module, base.config)
        if problem:
            raise UnsupportedError("this adapter cannot be a GGUF file", where=path, why=problem, hint=_MERGE)
        if not isinstance(module, LoraLayer):
            continue
        if module.disable_adapters or module.merged_adapters:
            raise ConflictError(
                "the adapters are disabled, or merged into the weights already",
                where=path,
                hint="call model.enable_adapters(), or model.unmerge_adapter()",
            )
        if pending(module):
            layers.append((path, module))
    if not layers:
        raise ConflictError(
            "there is no adapter to save",
            where="argument model",
            hint="add one with FastLanguageModel.get_peft_model",
        )
    return layers


def _problem(path: str, module: Any, config: Any) -> str | None:
    if isinstance(module, ModulesToSaveWrapper) and set(module.active_adapters) & set(module.modules_to_save):
        return "the module was trained as a whole (modules_to_save)"
    if isinstance(module, TrainableTokensWrapper):
        return "single tokens were trained (trainable_token_indices)"
    if not isinstance(module, BaseTunerLayer) or not pending(module):
        return None
    if not isinstance(module, LoraLayer):
        return f"{type(module).__name__} is no LoRA"
    if getattr(module, "parameter_name", None) is not None:
        return "it adapts experts (target_parameters)"
    if any(name in getattr(module, "lora_variant", {}) for name in pending(module)):
        return "it is a variant of LoRA (DoRA, for example)"
    if any(getattr(module, "lora_bias", {}).get(name) for name in pending(module)):
        return "it trains a bias (lora_bias)"
    tied = getattr(config, "tie_word_embeddings", False)
    if tied and path.endswith(("embed_tokens", "lm_head")):
        return "input embeddings and output head are one weight in the file, and it is adapted in one place"
    return None


def _pair(layer: Any, name: str, transform: str | None, config: Any, alpha: float) -> _Pair:
    adapters = pending(layer)
    embedding = all(adapter in layer.lora_embedding_A for adapter in adapters)
    ranks = {adapter: int(layer.r[adapter]) for adapter in adapters}
    rank = sum(ranks.values())

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if transform is None else TRANSFORMS[transform](tensor, config)

    def factor(adapter: str) -> float:
        return float(layer.scaling[adapter]) * rank / alpha

    def first() -> np.ndarray:
        if embedding:
            return _numpy(torch.cat([_dense(layer.lora_embedding_A[a]).T for a in adapters], dim=1))
        return _numpy(torch.cat([_dense(layer.lora_A[a].weight) for a in adapters]))

    def second() -> np.ndarray:
        held = [layer.lora_embedding_B[a] if embedding else layer.lora_B[a].weight for a in adapters]
        scaled = [_dense(tensor) * factor(a) for a, tensor in zip(adapters, held, strict=True)]
        return _numpy(rows(torch.cat(scaled, dim=1)))

    def update() -> torch.Tensor:
        with torch.no_grad():
            total = sum(layer.get_delta_weight(adapter).float().cpu() for adapter in adapters)
        assert isinstance(total, torch.Tensor)
        return rows(total)

    if embedding:
        tokens, width = layer.get_base_layer().weight.shape
        shapes = ((int(tokens), rank), (int(width), rank))
    else:
        shapes = ((rank, int(layer.in_features)), (int(layer.out_features), rank))
    return _Pair(
        name,
        embedding,
        update,
        (
            PlannedTensor(f"{name}.lora_a", shapes[0], False, first),
            PlannedTensor(f"{name}.lora_b", shapes[1], False, second),
        ),
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    values = tensor.contiguous().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError("an adapter holds NaN or infinite values", hint="training may have diverged")
    return values


def _check(path: Path, pairs: list[_Pair], alpha: float, wanted: FileType) -> None:
    """Read a file back: every tensor, the settings, and the update of every module against PEFT's."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError("the written file cannot be read", where=path.name, why=str(error)) from error
    check_tensors(reader, {tensor.name: tensor for pair in pairs for tensor in pair.tensors}, path)
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    read = float(field.contents()) if field is not None else math.nan
    if not math.isclose(read, alpha, rel_tol=1e-6):
        raise CheckpointError("a setting read back is not the adapter's", where=path.name, why=f"alpha {read}")
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for pair in pairs:
        a, b = (torch.from_numpy(np.array(found[tensor.name])) for tensor in pair.tensors)
        product = read / b.shape[1] * (a @ b.T if pair.embedding else b @ a)
        expected = pair.update()
        error = float((product - expected).norm() / expected.norm().clamp_min(1e-20))
        # Two factors, each within the budget of its type; fp32 sums besides.
        budget = 2 * wanted.budget + 1e-5
        if float(expected.norm()) > 0 and not error <= budget:
            raise CheckpointError(
                "the update in the file is not what the adapter computes",
                where=f"{path.name}: {pair.name}",
                why=f"relative error {error:.3g}; {budget:.3g} is allowed for {wanted.name}",
            )

"""Writing a fine-tuned model as a plain transformers folder, verified before it appears under its name."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .. import env, log
from ..checkpoint.atomic import atomic_directory
from ..checkpoint.disk import disk_errors, parse_size, require_free
from ..checkpoint.safetensors_io import TensorSpec, Written, checksum, write_sharded
from ..errors import CheckpointError, ConfigError, ConflictError
from ..models.record import ModelRecord, record_of
from ..parallel.fsdp import is_sharded, whole
from .adapter import save_adapter
from .base import BaseUnavailableError, DenseWeights, check_adapters, open_base
from .compressed import Compression
from .files import SMALL_FILES, all_but, write_config, write_tokenizer
from .layout import CheckpointLayout, Group
from .methods import BNB_4BIT, COMPRESSED, TORCHAO, check_save_method
from .parameters import MergedParameters, Parameter, adapter_modules, is_quantized, unwrapped
from .report import MergeReport
from .requantized import check_torchao_config, quantization_config, save_requantized
from .verify import Verification, verify_merged

MergeOnto = Literal["auto", "base", "dequantized"]
_MERGED_FILES = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*")


def save_merged(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    save_method: str | None = "merged_16bit",
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    dtype: torch.dtype | None = None,
    merge_onto: MergeOnto = "auto",
    is_main_process: bool = True,
    overwrite: bool = True,
    finish: Callable[[Path], None] | None = None,
    announce: bool = True,
    torchao_config: Any = None,
) -> MergeReport | None:
    """Write the trained model so that plain transformers (or PEFT, for ``"lora"``) loads it.

    The merge computes in fp32, one module at a time, and writes every tensor as soon as it is ready: beyond the model
    itself it holds a few copies of the largest weight. A model that was quantised while it loaded is merged onto its
    original 16-bit weights when they can be had, since the adapter on them is closer to what 16-bit training would have
    given, and they are what servers expect. The folder appears under its name only when it is complete and verified.

    Args:
        model: A model with or without PEFT adapters; the active adapters are merged. It is not changed. One that is
            sharded over ranks is gathered in host memory of rank 0, and every rank has to call this.
        directory: Folder to write. Other files of an existing folder stay; old weight files are replaced.
        tokenizer: Tokenizer or processor to write along, padding on the left.
        save_method: ``"merged_16bit"`` (None means it), ``"lora"`` (the adapter alone, for PEFT), or one of the
            quantised formats in ``methods``.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.
        verify: Reload what was written and compare it with ``model``.
        dtype: Dtype to write; None means the dtype the model was loaded in.
        merge_onto: For a quantised model: ``"base"`` (the original weights, or an error), ``"dequantized"`` (those in
            memory), or ``"auto"`` (the original weights if they can be had, else the others, with a warning).
        is_main_process: False on ranks that are not to write; ranks above 0 of a launcher never write.
        overwrite: Whether an existing folder may be replaced.
        finish: Called with the folder before it gets its name, to add files to it (a model card).
        announce: Tell in one line what was saved; False where the folder is a step of another export.
        torchao_config: A configuration of torchao by which the merged weights are quantised; in place of
            ``save_method``.

    Returns:
        The report; None on ranks that do not write.

    Raises:
        ConfigError: an option has no such value.
        UnsupportedError: this method, adapter or placement cannot be merged.
        CheckpointError: a module would have been left out, a weight is not finite, the disk is full, or the written
            folder does not hold the trained model. Nothing is left under the final name.
    """
    if is_sharded(model):
        with whole(model, trained_only=save_method == "lora") as here:
            return (
                save_merged(
                    model,
                    directory,
                    tokenizer,
                    save_method=save_method,
                    max_shard_size=max_shard_size,
                    verify=verify,
                    dtype=dtype,
                    merge_onto=merge_onto,
                    is_main_process=is_main_process,
                    overwrite=overwrite,
                    finish=finish,
                    announce=announce,
                    torchao_config=torchao_config,
                )
                if here
                else None
            )
    method = check_save_method(save_method)
    shard_size = parse_size(max_shard_size)
    if merge_onto not in ("auto", "base", "dequantized"):
        raise ConfigError(
            f"unknown value {merge_onto!r}", where="argument merge_onto", hint="use 'auto', 'base' or 'dequantized'"
        )
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"cannot write {dtype}", where="argument dtype", hint="use bfloat16, float16 or float32")
    if not is_main_process or env.rank() != 0:
        return None
    if tokenizer is None:
        log.warning("no tokenizer was given, so the saved folder has none; pass tokenizer= to make it complete")
    if method != "lora" and (Path(directory) / "adapter_config.json").exists():
        raise ConflictError(
            "the folder holds an adapter, which loaders would load in place of the merged model",
            where=str(directory),
            hint="write the merged model to another folder",
        )
    if method == "lora":
        report = save_adapter(model, directory, tokenizer, overwrite=overwrite, finish=finish)
    elif torchao_config is not None or method == BNB_4BIT or method in TORCHAO:
        if torchao_config is not None:
            check_torchao_config(torchao_config)
            method = "torchao"
        merge = _Merge(model, dtype, merge_onto)
        report = save_requantized(
            lambda folder: merge.write(folder, None, shard_size, None, verify=verify, overwrite=True),
            merge.nbytes,
            model,
            merge.base,
            Path(directory),
            tokenizer,
            quantization_config(method, merge.base, merge.dtype, torchao_config),
            method=method,
            replaced=_MERGED_FILES,
            shard_size=shard_size,
            verify=verify,
            overwrite=overwrite,
            finish=finish,
        )
    else:
        merge = _Merge(model, dtype, merge_onto, method)
        report = merge.write(Path(directory), tokenizer, shard_size, finish, verify=verify, overwrite=overwrite)
    if announce:
        log.info(report.summary())
    return report


def merged_size(model: Any) -> tuple[int, int]:
    """Number and bytes of the weights that ``save_merged`` writes; nothing is computed."""
    base = unwrapped(model)
    entries = MergedParameters(base, _dtype_of(base, record_of(model)), DenseWeights()).entries.values()
    specs = {entry.identity: entry.spec for entry in entries}.values()
    return sum(spec.nbytes // spec.dtype.itemsize for spec in specs), sum(spec.nbytes for spec in specs)


class _Merge:
    """One merged save: what goes into it, decided before anything is written."""

    def __init__(
        self, model: Any, dtype: torch.dtype | None, merge_onto: MergeOnto, method: str = "merged_16bit"
    ) -> None:
        self.model = model
        self.method = method
        self.base: PreTrainedModel = unwrapped(model)
        self.record = record_of(model)
        self.dtype = dtype or _dtype_of(self.base, self.record)
        self._dense = DenseWeights()
        entries = MergedParameters(self.base, self.dtype, self._dense).entries
        ignored = set(self.base._keys_to_ignore_on_save or ())
        self.tied, self.untied = _tied(self.base, entries)
        self.entries = {n: e for n, e in entries.items() if n not in self.tied and n not in ignored}
        self.dropped_layers = {layer for name in self.tied for layer in entries[name].layers}
        self.layout = CheckpointLayout(self.base, [entry.spec for entry in self.entries.values()])
        self.compression = Compression(self.base, self.layout, method) if method in COMPRESSED else None
        self.onto = self._choose_onto(merge_onto)

    def _choose_onto(self, merge_onto: MergeOnto) -> str:
        if not is_quantized(self.base):
            if merge_onto != "auto":
                raise ConfigError(
                    "the model is not quantised, so there is nothing to choose",
                    where="argument merge_onto",
                    hint="leave it at 'auto'",
                )
            return "memory"
        if merge_onto == "dequantized":
            return "dequantized"
        try:
            check_adapters(self.model)
            folder = open_base(
                self.record.base if self.record is not None else str(self.base.name_or_path or ""),
                revision=self.record.revision if self.record is not None else None,
                token=self.record.token if self.record is not None else None,
                load_kwargs=self.record.load_kwargs if self.record is not None else {},
            )
            self._dense.use(folder, self.entries.values(), self.layout)
        except BaseUnavailableError as error:
            if merge_onto == "base":
                raise
            log.warning(
                f"merging onto the dequantised weights, which are a little coarser than the original ones: {error.what}"
            )
            return "dequantized"
        return str(folder.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of the unquantised weights."""
        return sum(spec.nbytes for group in self.layout.groups for spec in group.outputs)

    def write(
        self,
        directory: Path,
        tokenizer: Any,
        shard_size: int,
        finish: Callable[[Path], None] | None,
        *,
        verify: bool,
        overwrite: bool,
    ) -> MergeReport:
        start = time.monotonic()
        compression = self.compression
        dense = [spec for group in self.layout.groups for spec in group.outputs]
        specs = dense if compression is None else [spec for entry in dense for spec in compression.specs(entry)]
        nbytes = sum(spec.nbytes for spec in specs)
        needed = nbytes + (SMALL_FILES if nbytes > SMALL_FILES else nbytes)
        verification = None
        with (
            disk_errors(directory, needed, what="the merged model"),
            atomic_directory(directory, overwrite=overwrite, keep=all_but(*_MERGED_FILES)) as temporary,
        ):
            require_free(temporary, needed, what="the merged model")
            producer = _Producer(self.layout, self.entries, compression)
            with _core_to_spare():
                written = write_sharded(temporary, specs, producer, max_shard_size=shard_size, checksums=verify)
            merged = self._check_counts(producer)
            quantization = compression.config() if compression is not None else None
            write_config(self.base, temporary, dtype=self.dtype, untied=self.untied, quantization=quantization)
            if tokenizer is not None:
                write_tokenizer(tokenizer, temporary)
            if finish is not None:
                finish(temporary)
            if verify:
                verification = self._verify(temporary, written, producer)
        return MergeReport(
            directory,
            self.method,
            merged,
            self.onto,
            self.dtype,
            written.files,
            written.nbytes,
            self.untied,
            verification,
            time.monotonic() - start,
        )

    def _check_counts(self, producer: _Producer) -> int:
        expected = adapter_modules(self.base)
        merged = producer.layers | self.dropped_layers
        missing = sorted(expected - merged)
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(expected)} adapter modules were not merged",
                where=", ".join(missing[:5]),
                why="their weights are not among those that the model saves",
                hint="use save_method='lora', and report the architecture",
            )
        return len(expected)

    def _verify(self, directory: Path, written: Written, producer: _Producer) -> Verification:
        compression = self.compression
        compressed = compression.names if compression is not None else set()
        as_written = {name: disk for name, disk in producer.renamed.items() if disk not in compressed}
        return verify_merged(
            directory,
            self.model,
            self.base,
            checksums=written.checksums,
            in_memory=producer.checksums | {name: written.checksums[disk] for name, disk in as_written.items()},
            nbytes=self.nbytes,
            dtype=self.dtype,
            changed_base=self._dense.folder is not None,
            rounding=compression.logit_budget if compression is not None else None,
        )


class _Producer:
    """Gives the writer one tensor after the other, in pieces where it can, and notes the adapter modules that went in.

    Attributes:
        layers: Names of the adapter modules merged so far.
        checksums: CRC-32 by name in memory, of parameters that are converted on their way to the disk.
        renamed: Names on disk by names in memory, of parameters that are written as they are.
    """

    def __init__(
        self, layout: CheckpointLayout, entries: dict[str, Parameter], compression: Compression | None = None
    ) -> None:
        self._layout = layout
        self._entries = entries
        self._compression = compression
        self._group_of: dict[str, Group] = {}
        for group in layout.groups:
            for dense in group.outputs:
                written = [dense] if compression is None else compression.specs(dense)
                self._group_of |= dict.fromkeys((spec.name for spec in written), group)
        self._held: dict[str, torch.Tensor] = {}
        self.layers: set[str] = set()
        self.checksums: dict[str, int] = {}
        self.renamed: dict[str, str] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor | Iterable[torch.Tensor]:
        if spec.name in self._held:
            return self._held.pop(spec.name)
        group = self._group_of[spec.name]
        compression = self._compression
        entries = {name: self._entries[name] for name in group.inputs}
        self.layers.update(*(entry.layers for entry in entries.values()))
        if group.renamed:
            (name,) = group.inputs
            self.renamed[name] = group.outputs[0].name
            if compression is None or self.renamed[name] not in compression.names:
                return entries[name].pieces()
        inputs = {name: entry.value() for name, entry in entries.items()}
        if not group.renamed:
            self.checksums |= {name: checksum(tensor) for name, tensor in inputs.items()}
        for name, tensor in self._layout.convert(group, inputs).items():
            if compression is not None and name in compression.names:
                self._held |= compression.tensors(name, tensor)
            else:
                self._held[name] = tensor
        return self._held.pop(spec.name)


@contextlib.contextmanager
def _core_to_spare() -> Iterator[None]:
    """Compute with a thread less: else each short step would wait for the thread whose core the writer is using."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _dtype_of(base: PreTrainedModel, record: ModelRecord | None) -> torch.dtype:
    """The dtype that the model was loaded in: the record's, else that of most weights."""
    if record is not None:
        return record.dtype
    counts: Counter[torch.dtype] = Counter()
    for parameter in base.parameters():
        state = getattr(parameter, "quant_state", None)
        dtype = parameter.dtype if state is None else state.dtype
        if dtype.is_floating_point:
            counts[dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _tied(base: PreTrainedModel, entries: dict[str, Parameter]) -> tuple[set[str], bool]:
    """Names that loading ties to others and that need not be written, and whether a tie must be given up.

    A tie holds when both names end up with equal values. When training moved one of the two alone, both are written and
    the config says so.
    """
    ties = {
        target: source
        for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items()
        if target in entries and source in entries
    }
    for target, source in ties.items():
        first, second = entries[target], entries[source]
        if first.identity == second.identity:
            continue
        if first.spec.shape != second.spec.shape or checksum(first.value()) != checksum(second.value()):
            log.warning(f"{target} and {source} differ after training, so they are saved apart (no longer tied)")
            return set(), True
    return set(ties), False

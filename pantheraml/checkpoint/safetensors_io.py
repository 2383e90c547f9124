"""Safetensors folders, read and written one tensor at a time.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the raw tensors without
holes). The writer knows every shape before it starts, so that it writes the header first and then never holds more than
the tensor, or a few pieces of tensors, on the way to the disk and the next; the reader trusts neither the index nor the
shards.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LARGEST_INDEX = 100 * 10**6  # bytes; the safetensors library sets the same limit for a header
_ALIGNMENT = 8
# Bytes handed to the disk at a time. From 2 MB on, Linux gives a write's part of the page cache in pages of 2 MB; on a
# virtual machine that had given such pages back to its host, writing in this way took five times as long.
_WRITE = 1 << 18
AHEAD = 3  # pieces that may wait for the disk, as long as they are small: with one, either thread waits for the other
_WAITING = 1 << 23  # bytes that may wait; a larger piece waits alone


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is there.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in row-major order."""
    return zlib.crc32(_bytes(tensor))


# --------------------------------------------------------------------------------------------------------------- write


Producer = Callable[[TensorSpec], torch.Tensor | Iterable[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Written:
    """What ``write_sharded`` wrote.

    Attributes:
        files: Names of the files, index included.
        nbytes: Bytes of tensor data.
        checksums: CRC-32 of each tensor by its name in the files; none where they were not asked for.
    """

    files: tuple[str, ...]
    nbytes: int
    checksums: dict[str, int]


def plan_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Split ``specs``, in their order, into shards of at most ``max_bytes``; a larger tensor has its own shard."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _aligned(specs: Sequence[TensorSpec]) -> bool:
    """Whether every tensor starts at a multiple of its item size; wide dtypes first always do."""
    offset = 0
    for spec in specs:
        if offset % spec.dtype.itemsize:
            return False
        offset += spec.nbytes
    return True


def _write_shard(path: Path, specs: Sequence[TensorSpec], produce: Producer, checksums: dict[str, int] | None) -> None:
    ordered = specs if _aligned(specs) else sorted(specs, key=lambda spec: -spec.dtype.itemsize)

    # While pieces are written, the next is produced. Leaving the pool waits for the writes, so the file closes last.
    with open(path, "wb") as file, ThreadPoolExecutor(1, "safetensors") as pool:

        def write(data: memoryview) -> None:
            with data:  # lets go of the tensor here, and not when the pool drops its arguments
                for start in range(0, len(data), _WRITE):
                    file.write(data[start : start + _WRITE])

        file.write(_header(ordered, {"format": "pt"}))
        waiting: deque[tuple[int, Future[None]]] = deque()
        for spec in ordered:
            for piece in _pieces(spec, produce(spec)):
                data = _bytes(piece)
                size = len(data)
                if checksums is not None:
                    checksums[spec.name] = zlib.crc32(data, checksums.get(spec.name, 0))
                while waiting and (len(waiting) == AHEAD or sum(held for held, _ in waiting) + size > _WAITING):
                    waiting.popleft()[1].result()
                waiting.append((size, pool.submit(write, data)))
                del piece, data
        for _, writing in waiting:
            writing.result()


def _pieces(spec: TensorSpec, made: torch.Tensor | Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield what was produced for ``spec``, and refuse what is not as it was announced."""
    left = torch.Size(spec.shape).numel()
    whole = isinstance(made, torch.Tensor)
    for piece in (made,) if whole else made:
        left -= piece.numel()
        if piece.dtype != spec.dtype or left < 0 or (whole and tuple(piece.shape) != spec.shape):
            raise _not_due(spec, f"it is {tuple(piece.shape)} {piece.dtype}")
        yield piece
    if left:
        raise _not_due(spec, f"{left} of its numbers are missing")


def _not_due(spec: TensorSpec, why: str) -> CheckpointError:
    return CheckpointError(f"a tensor of {spec.shape} {spec.dtype} was due", where=spec.name, why=why)


def write_sharded(
    directory: Path,
    specs: Sequence[TensorSpec],
    produce: Producer,
    *,
    max_shard_size: int,
    stem: str = "model",
    checksums: bool = True,
) -> Written:
    """Write tensors as ``<stem>.safetensors``, or as numbered shards with an index when they exceed one shard.

    Args:
        directory: Existing folder to write into.
        specs: Names, shapes and dtypes, in the order in which they fill the shards.
        produce: Called once for each spec, shard by shard (where alignment asks for it, wide dtypes first). It gives
            the tensor, on any device, or pieces that make it up in row-major order; each is written while further ones
            are asked for, and must not be changed until ``AHEAD`` were.
        max_shard_size: Bytes.
        stem: Start of the file names.
        checksums: Compute a checksum of each tensor, to compare it with what is read back.

    Returns:
        The files, sizes and checksums.

    Raises:
        CheckpointError: a name comes twice, a dtype has no safetensors name, or a tensor is not what its spec said.
        OSError: the disk's own errors.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(f"two tensors have one name: {', '.join(twice[:5])}", where=str(directory))
    for spec in specs:
        if spec.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"safetensors has no dtype {spec.dtype}", where=spec.name)

    shards = plan_shards(specs, max_shard_size)
    count = len(shards)
    files: list[str] = []
    sums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        _write_shard(directory / name, shard, produce, sums if checksums else None)
        weight_map |= {spec.name: name for spec in shard}
        files.append(name)
    total = sum(spec.nbytes for spec in specs)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        name = f"{stem}.safetensors.index.json"
        with open(directory / name, "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        files.append(name)
    return Written(tuple(files), total, sums)


# ---------------------------------------------------------------------------------------------------------------- read


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _inside(folder: Path, name: str, *, index: Path) -> Path:
    """Return the shard that an index entry names, refusing whatever is not a plain file of the folder.

    In the hub's cache the files of a snapshot are links into the ``blobs`` folder beside it; those are allowed.
    """
    if (
        not name.endswith(".safetensors")
        or "\0" in name
        or "\\" in name
        or ":" in name
        or PurePosixPath(name).name != name
    ):
        raise CheckpointError(f"the index names {name!r}, which is no file of its folder", where=str(index))
    path = folder / name
    resolved = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(folder))]
    snapshots = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    allowed += [Path(os.path.realpath(parent.parent / "blobs")) for parent in snapshots]
    if not any(resolved.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{name} is a link to a file outside its folder", where=str(index))
    if not resolved.is_file():
        raise CheckpointError(f"the shard {name} is missing", where=str(index))
    return path


class SafetensorsFolder:
    """The tensors of a folder that holds ``<stem>.safetensors`` or shards with an index, read one by one.

    Only what the index names counts: stray shards of an earlier save are ignored. Opening reads the index; the shards'
    headers are read when they are needed.

    Args:
        folder: The folder.
        stem: Start of the file names.

    Raises:
        CheckpointError: there is no such file, the index is broken or points outside the folder, a shard is missing or
            malformed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, stem: str = "model") -> None:
        self.folder = Path(folder)
        self._handle: tuple[Path, Any] | None = None
        self._files: dict[str, Path] = {}
        index = self.folder / f"{stem}.safetensors.index.json"
        single = self.folder / f"{stem}.safetensors"
        if index.is_file():
            weight_map = self._read_index(index)
            paths = {name: _inside(self.folder, name, index=index) for name in dict.fromkeys(weight_map.values())}
            self._files = {tensor: paths[name] for tensor, name in weight_map.items()}
            for path in paths.values():
                missing = {t for t, p in self._files.items() if p == path} - set(self._open(path).keys())
                if missing:
                    raise CheckpointError(
                        f"the index promises {sorted(missing)[0]!r} in {path.name}, and it is not there",
                        where=str(index),
                    )
        elif single.is_file():
            path = _inside(self.folder, single.name, index=single)
            self._files = dict.fromkeys(self._open(path).keys(), path)
        else:
            raise CheckpointError(f"no {single.name} and no {index.name}", where=str(self.folder))

    @staticmethod
    def _read_index(index: Path) -> dict[str, Any]:
        if index.stat().st_size > _LARGEST_INDEX:
            raise CheckpointError("the index is larger than an index can be", where=str(index))
        try:
            content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError("the index cannot be read", where=str(index), why=str(error)) from error
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("the index has no weight_map", where=str(index))
        for name in weight_map.values():
            if not isinstance(name, str):
                raise CheckpointError(f"the index names {name!r}, which is no file of its folder", where=str(index))
        return weight_map

    def _open(self, path: Path) -> Any:
        if self._handle is None or self._handle[0] != path:
            self._handle = None
            try:
                self._handle = (path, safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError, ValueError, OverflowError) as error:
                raise CheckpointError("the file is no safetensors file", where=str(path), why=str(error)) from error
        return self._handle[1]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def names(self) -> list[str]:
        """Names of all tensors, shard by shard."""
        return sorted(self._files, key=lambda name: (self._files[name].name, name))

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, from the header alone.

        Raises:
            CheckpointError: no such tensor, or a dtype that is not supported.
        """
        if name not in self._files:
            raise CheckpointError(f"there is no tensor {name!r}", where=str(self.folder))
        path = self._files[name]
        entry = self._open(path).get_slice(name)
        dtype = _DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise CheckpointError(f"the tensor {name!r} has the dtype {entry.get_dtype()}", where=str(path))
        return TensorSpec(name, tuple(entry.get_shape()), dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU.

        Raises:
            CheckpointError: no such tensor, or its file is damaged.
        """
        if name not in self._files:
            raise CheckpointError(f"there is no tensor {name!r}", where=str(self.folder))
        path = self._files[name]
        try:
            return self._open(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name!r}", where=str(path), why=str(error)) from error

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` shard by shard; a tensor may be dropped before the next is read."""
        for name in self.names():
            yield name, self.read(name)

    def close(self) -> None:
        """Let go of the open shard."""
        self._handle = None

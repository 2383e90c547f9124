"""Safetensors written as a stream, and read without trusting them."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pantheraml.checkpoint import safetensors_io
from pantheraml.checkpoint.safetensors_io import (
    DTYPE_NAMES,
    SafetensorsFolder,
    TensorSpec,
    checksum,
    plan_shards,
    write_sharded,
)
from pantheraml.errors import CheckpointError


def make(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


def specs_of(tensors):
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(directory, tensors, **kwargs):
    kwargs = {"max_shard_size": 10**9, **kwargs}
    return write_sharded(directory, specs_of(tensors), lambda spec: tensors[spec.name], **kwargs)


TENSORS = {f"t.{str(dtype).removeprefix('torch.')}": make((3, 5), dtype) for dtype in DTYPE_NAMES}
TENSORS |= {"scalar": make((), torch.float32), "empty": make((0, 4), torch.bfloat16), "é\n": make((7,), torch.float16)}


@pytest.mark.parametrize("max_shard_size", [1, 40, 10**9], ids=["one-each", "several", "one-file"])
def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path, max_shard_size):
    written = write(tmp_path, TENSORS, max_shard_size=max_shard_size)
    loaded = {}
    for name in written.files:
        if name.endswith(".safetensors"):
            loaded |= load_file(tmp_path / name)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert checksum(loaded[name]) == checksum(tensor) == written.checksums[name]
        assert loaded[name].shape == tensor.shape
    folder = SafetensorsFolder(tmp_path)
    assert {name: checksum(tensor) for name, tensor in folder} == written.checksums
    assert folder.spec("t.bfloat16") == TensorSpec("t.bfloat16", (3, 5), torch.bfloat16)


def test_noncontiguous_tensors_are_written_in_row_major_order(tmp_path):
    tensor = make((4, 6), torch.float32).T
    write(tmp_path, {"a": tensor})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)


@given(
    sizes=st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=30),
    limit=st.integers(min_value=1, max_value=100),
)
@settings(max_examples=60, deadline=None)
def test_shards_keep_order_and_limit(sizes, limit):
    specs = [TensorSpec(str(i), (size,), torch.uint8) for i, size in enumerate(sizes)]
    shards = plan_shards(specs, limit)
    assert [spec for shard in shards for spec in shard] == specs
    for shard in shards:
        assert len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    size, count = safetensors_io._WAITING, 16
    specs = [TensorSpec(f"t{i}", (size,), torch.uint8) for i in range(count)]
    tracemalloc.start()
    try:
        write_sharded(
            tmp_path,
            specs,
            lambda spec: torch.from_numpy(np.full(size, 7, dtype=np.uint8)),  # tracemalloc sees numpy's memory
            max_shard_size=4 * size,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_tensor_that_is_not_what_was_announced(tmp_path):
    with pytest.raises(CheckpointError, match="was due"):
        write_sharded(tmp_path, [TensorSpec("a", (2,), torch.float32)], lambda s: torch.ones(3), max_shard_size=100)


def test_pieces_make_up_a_tensor_and_may_be_overwritten_later(tmp_path, monkeypatch):
    tensor = make((50, 7), torch.float32)
    buffers = torch.empty(safetensors_io.AHEAD + 1, 4, 7)
    monkeypatch.setattr(safetensors_io, "_WRITE", 16)  # a slow disk

    def pieces(spec):
        for turn, start in enumerate(range(0, 50, 4)):
            rows = tensor[start : start + 4]
            yield buffers[turn % len(buffers)][: len(rows)].copy_(rows)

    written = write_sharded(tmp_path, specs_of({"a": tensor}), pieces, max_shard_size=10**9)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)
    assert written.checksums == {"a": checksum(tensor)}


@pytest.mark.parametrize(
    "pieces",
    [[torch.ones(2)], [torch.ones(2), torch.ones(2)], [torch.ones(3, dtype=torch.float16)]],
    ids=["too-few", "too-many", "dtype"],
)
def test_pieces_that_are_not_what_was_announced(tmp_path, pieces):
    with pytest.raises(CheckpointError, match="was due"):
        write_sharded(tmp_path, [TensorSpec("a", (3,), torch.float32)], lambda s: pieces, max_shard_size=100)


def test_two_tensors_of_one_name(tmp_path):
    spec = TensorSpec("a", (2,), torch.float32)
    with pytest.raises(CheckpointError, match="one name: a"):
        write_sharded(tmp_path, [spec, spec], lambda s: torch.ones(2), max_shard_size=100)


# ---------------------------------------------------------------------------------------------------- hostile folders


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    )


@pytest.mark.parametrize(
    "entry",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "a\0.safetensors",
        "x.bin",
        "",
        ".safetensors/..",
        7,
        None,
        ["x.safetensors"],
    ],
    ids=repr,
)
def test_index_entries_outside_the_folder_are_refused(tmp_path, entry):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    index(folder, {"a": entry})
    with pytest.raises(CheckpointError, match="no file of its folder"):
        SafetensorsFolder(folder)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "x.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index(folder, {"a": "x.safetensors"})
    with pytest.raises(CheckpointError, match="outside its folder"):
        SafetensorsFolder(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "x.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="outside its folder"):
        SafetensorsFolder(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert torch.equal(SafetensorsFolder(snapshot).read("a"), torch.ones(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors"}}', "is missing"),
        ('{"weight_map": {"b": "real.safetensors"}}', "not there"),
    ],
)
def test_broken_indices(tmp_path, content, message):
    save_file({"a": torch.ones(1)}, tmp_path / "real.safetensors")
    index(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_stray_shards_are_ignored(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    folder = SafetensorsFolder(tmp_path)
    assert folder.names() == ["a"]
    assert torch.equal(folder.read("a"), torch.ones(1))


def header(entries, *, data=b"\0" * 16, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MALFORMED = {
    "empty": b"",
    "short": b"\1\2",
    "oversize-header": header({}, length=2**62),
    "header-past-end": header({"a": F32}, length=10**6),
    "non-utf8": header(b"\xff\xfe{}"),
    "no-json": header(b"{{{{"),
    "overlap": header({"a": F32, "b": F32}, data=b"\0" * 8),
    "hole": header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, data=b"\0" * 20),
    "wrong-size": header({"a": {**F32, "dtype": "F64"}}, data=b"\0" * 8),
    "overflow": header({"a": {**F32, "shape": [2**40, 2**40]}}),
    "negative": header({"a": {**F32, "data_offsets": [-8, 0]}}),
    "past-end": header({"a": F32}, data=b"\0" * 4),
    "unknown-dtype": header({"a": {**F32, "dtype": "F17"}}, data=b"\0" * 8),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        SafetensorsFolder(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no model"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="no model"):
        SafetensorsFolder(tmp_path)


def test_an_absent_tensor_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        SafetensorsFolder(tmp_path).read("b")
    assert "a" in SafetensorsFolder(tmp_path)

"""Directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest

from pantheraml.checkpoint import atomic, disk
from pantheraml.checkpoint.atomic import atomic_directory, clean_leftovers
from pantheraml.errors import CheckpointError, ConfigError


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_directory_appears_only_at_the_end_with_the_umasks_mode(tmp_path):
    final = tmp_path / "deep" / "model"
    old = os.umask(0o027)
    try:
        with atomic_directory(final) as temporary:
            (temporary / "a").write_text("new")
            assert not final.exists()
            assert temporary.parent == final.parent
            assert temporary.name.startswith(".tmp-model-")
    finally:
        os.umask(old)
    assert entries(final.parent) == ["model"]
    assert (final / "a").read_text() == "new"
    assert stat.S_IMODE(final.stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_and_the_previous_directory_untouched(tmp_path, error):
    final = tmp_path / "model"
    final.mkdir()
    (final / "a").write_text("old")

    def fail(folder):
        (folder / "a").write_text("new")
        raise error

    with pytest.raises(error), atomic_directory(final) as temporary:
        fail(temporary)
    assert entries(tmp_path) == ["model"]
    assert (final / "a").read_text() == "old"


def test_replacing_swaps_whole_directories(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    (final / "stale").write_text("old")
    with atomic_directory(final) as temporary:
        (temporary / "a").write_text("new")
    assert entries(tmp_path) == ["model"]
    assert entries(final) == ["a"]


def test_keep_takes_over_what_the_new_directory_does_not_have(tmp_path):
    final = tmp_path / "model"
    (final / "logs").mkdir(parents=True)
    (final / "logs" / "run.txt").write_text("log")
    (final / "notes").write_text("mine")
    (final / "weights").write_text("old")
    (final / "stale").write_text("old")
    (final / "link").symlink_to("notes")
    with atomic_directory(final, keep=lambda name: name != "stale") as temporary:
        (temporary / "weights").write_text("new")
    assert entries(final) == ["link", "logs", "notes", "weights"]
    assert (final / "weights").read_text() == "new"
    assert (final / "notes").read_text() == "mine"
    assert (final / "logs" / "run.txt").read_text() == "log"
    assert (final / "link").is_symlink()


def test_overwrite_false_refuses_before_anything_is_made(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(final, overwrite=False):
        pytest.fail("the block must not run")
    assert entries(tmp_path) == ["model"]


def test_overwrite_false_also_refuses_what_appeared_meanwhile(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(final, overwrite=False):
        (final / "other").mkdir(parents=True)
    assert entries(final) == ["other"]
    assert entries(tmp_path) == ["model"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="in the way"), atomic_directory(tmp_path / "model"):
        pytest.fail("the block must not run")
    with pytest.raises(CheckpointError, match="cannot make"), atomic_directory(tmp_path / "model" / "below"):
        pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "a file"


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path):
        with pytest.raises(CheckpointError, match="working directory"), atomic_directory(target):
            pytest.fail("the block must not run")


def test_a_symbolic_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "real") == ["a"]


@pytest.mark.parametrize("name", ["x" * 300, "a b", "日本" * 50], ids=["too-long", "space", "multibyte"])
def test_awkward_names(tmp_path, name):
    if len(name.encode()) > 255:
        with pytest.raises((CheckpointError, OSError)), atomic_directory(tmp_path / name):
            pytest.fail("the block must not run")
        assert entries(tmp_path) == []
        return
    with atomic_directory(tmp_path / name) as temporary:
        (temporary / "a").write_text("new")
    assert entries(tmp_path) == [name]


def test_a_failing_rename_puts_the_previous_directory_back(tmp_path, monkeypatch):
    final = tmp_path / "model"
    final.mkdir()
    (final / "a").write_text("old")
    real = os.rename
    calls = []

    def rename(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "injected")
        real(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(CheckpointError, match="into place"), atomic_directory(final) as temporary:
        (temporary / "a").write_text("new")
    assert entries(tmp_path) == ["model"]
    assert (final / "a").read_text() == "old"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(tmp_path, kind, pid, token="0a1b2c3d"):
    path = tmp_path / f".{kind}-model-{atomic._host()}-{pid}-{token}"
    path.mkdir()
    (path / "a").write_text(kind)
    return path


def test_leftovers_of_dead_runs_go_and_others_stay(tmp_path):
    dead = dead_pid()
    gone = leftover(tmp_path, "tmp", dead)
    running = leftover(tmp_path, "tmp", os.getpid())
    other_host = tmp_path / f".tmp-model-ffffffff-{dead}-0a1b2c3d"
    other_host.mkdir()
    other_name = tmp_path / f".tmp-model2-{atomic._host()}-{dead}-0a1b2c3d"
    other_name.mkdir()
    with atomic_directory(tmp_path / "model"):
        pass
    assert not gone.exists()
    assert running.exists()
    assert other_host.exists()
    assert other_name.exists()


def test_a_swap_that_died_half_way_is_undone(tmp_path):
    leftover(tmp_path, "old", dead_pid())
    clean_leftovers(tmp_path / "model")
    assert entries(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_files_and_directories_are_flushed_before_the_rename(tmp_path, monkeypatch):
    order = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        atomic.os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1]
    )
    monkeypatch.setattr(atomic.os, "rename", lambda *paths: (order.append("rename"), real_rename(*paths))[1])
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("x")
    at = order.index("rename")
    assert [os.path.basename(path) for path in order[:at]][:2] == ["a", "sub"]
    assert order[at + 1 :] == [str(tmp_path)]


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 << 29), ("10", 10), (7, 7), ("2 kb", 2000)],
)
def test_sizes(text, size):
    assert disk.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", 0, -5, True, "5XB", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="no size"):
        disk.parse_size(text)


def test_too_little_space_names_both_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1)
    with pytest.raises(CheckpointError, match=r"\(1000 bytes\) are needed and .*\(1 bytes\) are free"):
        disk.require_free(tmp_path, 1000, what="a model")


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert disk.free_bytes(tmp_path / "a" / "b") > 0

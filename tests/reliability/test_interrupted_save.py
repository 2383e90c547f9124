"""Whatever interrupts a save, the final name holds the previous model or nothing."""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import pantheraml
from pantheraml.checkpoint import atomic, disk
from pantheraml.errors import CheckpointError
from pantheraml.export.merge import save_merged


@pytest.fixture(scope="module")
def model():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return get_peft_model(make_tiny("llama", **small), LoraConfig(r=2, target_modules=["q_proj"]))


class Faults:
    """Counts the operations on the disk that a save makes, and fails (or calls ``at``) at a chosen one.

    Covered: opening for writing and every write of Python code, fsync, mkdir, rename.
    """

    def __init__(self, monkeypatch):
        self.count = 0
        self.fail_at = None
        self.error = None
        real_open = builtins.open

        def opened(file, mode="r", *args, **kwargs):
            handle = real_open(file, mode, *args, **kwargs)
            if "w" not in mode or ".tmp-" not in str(file):
                return handle
            self.step()
            return _Writes(handle, self)

        monkeypatch.setattr(builtins, "open", opened)
        for name in ("fsync", "mkdir", "rename"):
            monkeypatch.setattr(atomic.os, name, self._stepping(name, getattr(os, name)))

    def _stepping(self, name, function):
        def stepped(*args, **kwargs):
            # Making a folder that is there already may fail without harm.
            if name != "mkdir" or (".tmp-" in str(args[0]) and not os.path.exists(args[0])):
                self.step()
            return function(*args, **kwargs)

        return stepped

    def step(self):
        self.count += 1
        if self.count == self.fail_at:
            raise self.error


class _Writes:
    def __init__(self, handle, faults):
        self._handle = handle
        self._faults = faults

    def write(self, data):
        self._faults.step()
        return self._handle.write(data)

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._handle.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["disk-full", "interrupt"])
@pytest.mark.parametrize("previous", [True, False], ids=["over-an-old-model", "new"])
def test_a_fault_at_any_operation_leaves_the_old_model_or_nothing(tmp_path, model, error, previous):
    final = tmp_path / "here" / "model"
    final.parent.mkdir()
    if previous:
        save_merged(model, final, verify=False)
    before = contents(final) if previous else None
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    outcomes = []
    while "new" not in outcomes:
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch)
            faults.fail_at, faults.error = len(outcomes) + 1, error
            try:
                save_merged(model, final, max_shard_size="8KB", verify=False)
            except expected:
                now = contents(final) if final.exists() else None
                outcomes.append("unchanged" if now == before else "new")
            else:
                pytest.fail(f"operation {len(outcomes) + 1} failed, and the save claims success")
        expected_names = ["model"] if final.exists() else []
        assert [path.name for path in final.parent.iterdir()] == expected_names, f"operation {len(outcomes)}"
    assert len(outcomes) > 25
    # The last operation flushes the parent folder: by then the new model is there, complete.
    assert outcomes == ["unchanged"] * (len(outcomes) - 1) + ["new"]
    AutoModelForCausalLM.from_pretrained(final)


def test_a_full_disk_names_needed_and_free_bytes(tmp_path, model):
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        faults.fail_at, faults.error = 8, OSError(errno.ENOSPC, "full")
        with pytest.raises(
            CheckpointError, match=r"became full.*\n.*\n.*bytes\) are needed and .*bytes\) are free now"
        ):
            save_merged(model, tmp_path / "model", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, model, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1)
    with pytest.raises(CheckpointError, match=r"not enough disk space.*\n.*\n.*\(1 bytes\) are free"):
        save_merged(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


KILLED = textwrap.dedent(
    """
    import json, os, shutil, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[3:]
    from conftest import make_tiny
    from transformers import AutoModelForCausalLM
    from pantheraml.checkpoint import atomic
    from pantheraml.export.merge import save_merged
    model = make_tiny("llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_key_value_heads=4)
    real_fsync, real_rename, steps = os.fsync, os.rename, [0]
    def step(real):
        def stepped(*args):
            steps[0] += 1
            if str(steps[0]) == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        return stepped
    def fork_and_die(at):
        child = os.fork()
        if child == 0:
            sys.argv[2] = str(at)
            steps[0] = 0
            save_merged(model, sys.argv[1], max_shard_size="8KB", verify=False)
            os._exit(0)
        return os.waitpid(child, 0)[1]
    atomic.os.fsync, atomic.os.rename = step(real_fsync), step(real_rename)
    final = sys.argv[1]
    def kill_at_every_step(check):
        for at in range(1, 100):
            status = fork_and_die(at)
            names = sorted(os.listdir(os.path.dirname(final)))
            report.append((status, "model" in names, len(names)))
            check()
            if status == 0:
                return
    report = []
    def start_anew():
        if os.path.exists(final):
            shutil.rmtree(final)
    kill_at_every_step(start_anew)
    new, report = report, []
    save_merged(model, final, verify=False)
    def put_back():
        if not os.path.exists(final):
            atomic.clean_leftovers(Path(final))
        AutoModelForCausalLM.from_pretrained(final)
    kill_at_every_step(put_back)
    print(json.dumps([new, report]))
    """
)


def test_a_killed_process_leaves_no_half_model_and_its_remains_are_cleaned(tmp_path):
    """One process loads everything, and forks a child for each point at which a save is killed."""
    folder = tmp_path / "models"
    folder.mkdir()
    paths = [str(Path(__file__).parent.parent), str(Path(pantheraml.__file__).parent.parent)]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder / "model"), "0", *paths],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    new, replacing = json.loads(result.stdout.strip().splitlines()[-1])
    for report in (new, replacing):
        assert len(report) > 8
        assert {status for status, _, _ in report[:-1]} == {signal.SIGKILL}
        assert report[-1] == [0, True, 1]
        assert all(count <= 2 for _, _, count in report), "each run removes what the one before it left"
    # The last kill hits the flush of the parent folder, after the rename.
    assert [there for _, there, _ in new[:-1]] == [False] * (len(new) - 2) + [True]
    # While one model replaces another, the name is absent between two renames, and the next run puts the old one back.
    assert [there for _, there, _ in replacing].count(False) == 1
    assert [path.name for path in folder.iterdir()] == ["model"]

"""The step that is noted for the TPU compiler is the one that a run repeats."""

from __future__ import annotations

import collections
import contextlib
import re

import pytest

from pantheraml import xla_runtime
from pantheraml.training import tpu_estimate

COUNTERS = 3  # Of the guard against steps that are not finite; constants in a run's first step.


def fourth_step(trainer):
    """Run three steps and return the program of the next."""
    programs, sync = [], xla_runtime.sync

    def note(*, wait=False):
        if trainer.state.global_step == 4:
            programs.append(xla_runtime.pending_program())
            raise tpu_estimate._NotedError
        sync(wait=wait)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(tpu_estimate._NotedError):
        patch.setattr(xla_runtime, "sync", note)
        trainer.train()
    sync(wait=True)
    return programs[0]


@pytest.mark.parametrize("rank", [8, None], ids=["lora", "full"])
def test_the_noted_step_is_the_one_that_a_run_repeats(rank, tiny_llama_dir, tmp_path, monkeypatch):
    _jax = pytest.importorskip("jax._src.lib", reason="jax reads programs, and is not installed")._jax
    request = {
        "model": str(tiny_llama_dir),
        "mesh": (xla_runtime.device_count(), 1),
        "length": 128,
        "rows": 1,
        "r": rank,
        "checkpointing": True,
    }

    def traced(name):
        tpu_estimate._trace(request | {"program": str(tmp_path / name)})
        text = _jax.XlaComputation((tmp_path / name).read_bytes()).as_hlo_text()
        return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text)), text.count("sharding={devices")

    noted, divided = traced("noted.hlo")
    xla_runtime.sync(wait=True)
    monkeypatch.setattr(tpu_estimate, "_make_states", lambda *args: None)
    monkeypatch.setattr(tpu_estimate, "_note_step", fourth_step)
    run, divided_in_run = traced("fourth.hlo")
    assert noted["dot"] == run["dot"] > 0
    assert divided == divided_in_run
    assert (divided > 0) == (xla_runtime.device_count() > 1)
    assert 0 <= run["parameter"] - noted["parameter"] <= COUNTERS
    assert sum(noted.values()) == pytest.approx(sum(run.values()), rel=0.01)

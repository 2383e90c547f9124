"""Starting several ranks for a test, on a CPU or on GPUs, and reading what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from pantheraml.device import get_device

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PANTHERAML_DEVICE": "cpu",
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "PYTHONWARNINGS": "ignore",
}
DEVICES = [pytest.param("cpu", id="gloo"), pytest.param("gpu", id="nccl", marks=pytest.mark.gpu)]
_BACKENDS = {"cpu": "gloo", "gpu": "nccl"}
# Of losses and weights in fp32. On a GPU the products of two batch sizes may run through kernels of other tile sizes.
_TOLERANCES = {"cpu": 1e-5, "gpu": 1e-4}


@dataclass
class Launched:
    """What the ranks of one launch found.

    Attributes:
        device: ``"cpu"`` or ``"gpu"``.
        facts: For each rank what it wrote into ``rankN.json``.
        weights: For each rank the tensors of ``rankN.safetensors``, named ``RUN/parameter``.
        folder: Of the launch's output.
        told: What the ranks wrote to standard error.
    """

    device: str
    facts: list[dict[str, Any]]
    weights: list[dict[str, torch.Tensor]]
    folder: Path
    told: str

    @property
    def backend(self) -> str:
        """Of the process group."""
        return _BACKENDS[self.device]

    def need(self, run: str) -> None:
        """Skip a test of a run that a launch on GPUs leaves out because it would add nothing to the CPU's."""
        if self.device == "gpu" and run not in self.facts[0]:
            pytest.skip(f"{run}: run on CPUs alone, or with what more GPUs wrote")

    @property
    def tolerance(self) -> float:
        """Largest difference from one process, which the tests train on this host's GPU if it has one."""
        return _TOLERANCES["gpu" if get_device().is_gpu else self.device]


def torchrun(
    *words: Any, ranks: int = 2, device: str = "cpu", timeout: float = 600, flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *flags]
    environment = {k: v for k, v in ENVIRONMENT.items() if device == "cpu" or k != "PANTHERAML_DEVICE"}
    return subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def launch_once(script: str, ranks: int, device: str, factory: pytest.TempPathFactory, *words: Any) -> Launched:
    """The results of a script of this folder, which is run once for all tests and all workers of pytest-xdist."""
    if device == "gpu" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and this host has {torch.cuda.device_count()}")
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"{Path(script).stem}-{ranks}-{device}"
    told, failed = folder / "stderr.txt", folder / "failed.txt"
    with FileLock(f"{folder}.lock"):
        # A launch that failed would fail again for every test that waits for it.
        assert not failed.exists(), failed.read_text()
        if not told.exists():
            folder.mkdir(exist_ok=True)
            done = torchrun(HERE / script, folder, *words, ranks=ranks, device=device)
            if done.returncode:
                failed.write_text(done.stderr[-4000:])
            assert done.returncode == 0, done.stderr[-4000:]
            told.write_text(done.stderr)
    return Launched(
        device,
        [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)],
        [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)],
        folder,
        told.read_text(),
    )


def of(weights: dict[str, torch.Tensor], run: str) -> dict[str, torch.Tensor]:
    """The weights of one run."""
    return {name.removeprefix(f"{run}/"): value for name, value in weights.items() if name.startswith(f"{run}/")}

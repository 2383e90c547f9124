"""These tests run on torch_xla's CPU backend, in an environment of their own: ``make test-xla``."""

from __future__ import annotations

import importlib.util
import os

import pytest

# Programs run for seconds and are compiled for as long: the CPU's code need not be good.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Threads of XLA's pool. With as many as devices, those that wait in a collective keep others from reaching it.
os.environ.setdefault("NPROC", "32")

if importlib.util.find_spec("torch_xla") is None:
    REASON = "torch_xla is not installed (make test-xla makes an environment that has it)"
elif not os.environ.get("PJRT_DEVICE"):
    REASON = "PJRT_DEVICE is not set (PJRT_DEVICE=CPU runs these tests on torch_xla's CPU backend)"
else:
    REASON = None

collect_ignore_glob = ["test_*.py"] if REASON else []


@pytest.fixture(scope="session", autouse=True)
def _devices():
    """Autograd counts its devices at the first backward of the process."""
    from pantheraml import xla_runtime

    xla_runtime.start()


@pytest.fixture(autouse=True)
def mesh():
    """Weights of tiny models are divided too."""
    from pantheraml import MultiTPUConfig, cleanup_multi_tpu, setup_multi_tpu, xla_runtime

    setup_multi_tpu(MultiTPUConfig(min_shard_elements=1024))
    yield
    cleanup_multi_tpu()
    xla_runtime.sync()

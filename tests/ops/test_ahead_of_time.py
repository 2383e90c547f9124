"""Every registered kernel variant compiles for chips that are not here, within their shared memory.

The compiler runs in a child process, because kernels are interpreted in this one where no GPU is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.kernels import _variants

SCRIPT = Path(__file__).with_name("compile_variants.py")
CHIPS = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}


@pytest.mark.slow
@pytest.mark.parametrize("module", _variants.MODULES)
def test_variants_compile_for_every_chip(module, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[2])}
    child = subprocess.run(
        [sys.executable, str(SCRIPT), module], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert child.stdout, child.stderr[-4000:]
    report = json.loads(child.stdout)
    assert not report["failures"], "\n".join(report["failures"])
    # The modules that multiply on fp8 units and those of grouped products need not have a form for the oldest chips.
    assert CHIPS >= set(report["compiled"]) >= {"sm_90", "gfx942"} or not list(_variants.collect([module]))
    # What costs such kernels a quarter of their time or more: angles that pass through shared memory, behind barriers,
    # and packed weights loaded byte by byte (of nested scales each is a byte of its own).
    for name in report["shared"]:
        if "rotary" in name and "trained" not in name:
            assert report["shared"][name] == 0, f"{name} exchanges through shared memory"
        if name.startswith("nf4_dequantize"):
            assert report["single_bytes"][name] <= 1, f"{name} loads single bytes"


def test_variant_names_are_unique_and_complete():
    variants = list(_variants.collect())
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    for module in _variants.MODULES[:5]:
        assert any(name.startswith(module) for name in names), f"{module} registers no variant"
    for variant in variants:
        assert not ("bf16" in variant.arguments.values() or "*bf16" in variant.arguments.values()) or (
            variant.minimum is None or variant.minimum >= 80
        ), f"{variant.name}: bfloat16 needs Ampere"

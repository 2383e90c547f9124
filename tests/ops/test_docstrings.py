"""A reader finds what an op computes, of which shapes, in which precision and how repeatably in its docstring."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

from pantheraml import kernels

FILES = (
    "layer_norm", "rotary", "qk_norm_rotary", "glu", "cross_entropy", "linear_cross_entropy", "lora", "routing",
    "grouped_gemm", "experts", "fp8_linear", "rms_norm", "fp8", "nf4_product",
)  # fmt: skip
OPS = {
    name: getattr(kernels, name)
    for name, module in kernels._EXPORTS.items()
    if module in FILES and inspect.isfunction(getattr(kernels, name))
}
# Moves numbers only.
WITHOUT_SUMS = {"route", "fp8_transpose"}


@pytest.mark.parametrize("name", OPS)
def test_an_ops_docstring_says(name):
    own, module = inspect.getdoc(OPS[name]) or "", sys.modules[OPS[name].__module__].__doc__ or ""
    text = f"{own}\n{module}"
    assert "Args:" in own or "Arguments as in" in own
    assert "Returns:" in own
    assert re.search(r"\[[^\]]+\]", own), "no shapes"
    assert re.search(r"``[^`]*[=@*/][^`]*``|::\n", text), "no formula"
    assert name in WITHOUT_SUMS or "float32" in text, "no precision of sums"
    assert re.search(r"[Dd]eterministic|same bits|fixed order|writer", text), "not how repeatable it is"

"""The kernel benchmark calls every op rightly: at tiny sizes on the CPU, where nothing is timed."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels"
NAMES = sorted(path.stem for path in HERE.glob("*.py"))


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules, which live outside any package."""
    sys.path.insert(0, str(HERE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        gc.unfreeze()
        sys.path.remove(str(HERE))
        for name in NAMES:
            sys.modules.pop(name, None)


def test_ours_and_eager_agree_on_every_op_and_the_report_names_each(bench):
    records = []
    for case in bench.cases.all_cases(bench.cases.OPS, tiny=True):
        names = bench.worker.names_of("native", case)
        assert names[:2] == ["ours", "eager"]
        results = bench.timing.measure(case.workload, names, torch.device("cpu"), milliseconds=None)
        absent = {name for name in results if "ModuleNotFoundError" in results[name].get("error", "")}
        failed = {name: result["error"] for name, result in results.items() if "error" in result}
        assert not failed.keys() - absent, f"{case.label}: {failed}"
        assert not absent & {"ours", "eager", *bench.workload.YARDSTICKS}
        results["ours"] |= {"forward_ms": 0.5, "backward_ms": 0.5}
        results["eager"] |= {"forward_ms": 1.0}
        records.append(bench.run.empty_record(case) | {"results": results})
    about = {"gpu": "none", "versions": {}, "copy_bytes_per_second": {}, "date": "", "python": "", "dtype": ""}
    about |= {"seconds": 1.0, "command": "", "groups": {}, "bandwidth": 1.0, "budget": 1.0, "left_out": ["more"]}
    text = bench.report.markdown(records, about | {"ops": list(bench.cases.OPS)})
    assert all(f"| {op} | tiny |" in text for op in bench.cases.OPS)
    assert "2.00 eager" in text
    assert "Left out when 1 s were over: more." in text


def test_every_case_is_listed_once_with_one_length_first(bench):
    cases = bench.cases.all_cases(bench.cases.OPS)
    assert len({(case.op, case.model, case.tokens) for case in cases}) == len(cases)
    first = cases[: len(bench.cases.OPS)]
    assert {case.op for case in first} == set(bench.cases.OPS)
    assert {(case.model, case.tokens) for case in first} == {("Llama-3.1-8B", 8192)}
    order = bench.run.steps(cases, ["native", "unsloth", "torch.compile"])
    assert sorted(n for n, groups in order if "native" in groups) == list(range(len(cases)))


def test_the_benchmark_of_the_optimizer_times_both(bench, capsys, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Exceptions for the weights of an optimizer hold for those at the same places in every later one.
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)
    bench.adamw_8bit.main(["--layers", "1", "--scale", "16", "--rank", "0", "--dtypes", "float32", "--tiles", "2x4"])
    rows = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines() if "float32" in line]
    ours = ["update", "update 2x4", "update together", "update together 2x4", "step"]
    assert rows == [["update", "bitsandbytes"], ["step", "bitsandbytes"], *([name, "ours"] for name in ours)]


@pytest.mark.parametrize("group", ["native", "torch.compile"])
def test_a_process_of_contenders_gets_ready(bench, group):
    worker = bench.run.Worker(group, ["rms_norm"], dry_run=True)
    try:
        assert worker.answer(120) == {"ready": True}
    finally:
        worker.stop()

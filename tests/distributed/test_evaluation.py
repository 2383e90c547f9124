"""Two ranks and four evaluate what one process does: each row once, each token alike, whatever the size of a batch."""

from __future__ import annotations

import pytest
import torch
from evaluation_worker import FIGURES, RUNS, evaluated
from launching import launch_once, of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SAME = {"rel": 1e-6, "abs": 0.0}


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def launched(request, tmp_path_factory):
    """What the ranks found."""
    return launch_once("evaluation_worker.py", request.param, "cpu", tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, each run once; without outputs in batches of another size."""
    known: dict[str, tuple] = {}

    def of_one(name: str) -> tuple:
        if name not in known:
            options = {key: value for key, value in RUNS[name].items() if key != "fsdp"}
            if not options.get("outputs"):
                options["rows"] = 5
            known[name] = evaluated(tmp_path_factory.mktemp("alone"), **options)
        return known[name]

    return of_one


@pytest.mark.parametrize("run", RUNS)
def test_ranks_evaluate_what_one_process_evaluates(run, launched, alone):
    expected, _ = alone(run)
    for facts in launched.facts:
        found = facts[run]
        assert found["joined"] == expected["joined"] == bool(RUNS[run].get("padding_free", False))
        assert found["first"]["eval_loss"] == pytest.approx(expected["first"]["eval_loss"], **SAME)
        for name in FIGURES:
            assert found["logged"][name] == pytest.approx(expected["logged"][name], **SAME)


@pytest.mark.parametrize("run", [name for name, options in RUNS.items() if options.get("outputs")])
def test_ranks_predict_and_measure_what_one_process_does(run, launched, alone):
    expected, outputs = alone(run)
    for facts, tensors in zip(launched.facts, launched.weights, strict=True):
        found = facts[run]
        for prefix, result in (("eval", "first"), ("test", "predicted")):
            for name in ("loss", "rows", "tokens", "right", "logits", "order"):
                key = f"{prefix}_{name}"
                assert found[result][key] == pytest.approx(expected[result][key], **SAME), key
        assert found["first"]["eval_rows"] == RUNS[run]["count"]
        assert found["logged again"] == found["logged"]
        predicted = of(tensors, run)
        assert torch.equal(predicted["labels"], outputs["labels"])
        torch.testing.assert_close(predicted["logits"], outputs["logits"], rtol=1e-5, atol=1e-6)


def test_a_token_counts_the_same_in_a_batch_of_any_size(alone, tmp_path):
    expected, _ = alone("copied 11")
    for rows in (1, 3):
        found, _ = evaluated(tmp_path / str(rows), 11, rows=rows, padding_free=False)
        assert found["first"]["eval_loss"] == pytest.approx(expected["first"]["eval_loss"], **SAME)
        assert found["logged"] == pytest.approx(expected["logged"], **SAME)

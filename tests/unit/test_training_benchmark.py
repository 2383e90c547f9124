"""The report of training steps: what it compares, and which calls it shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "training"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cases
    import report

    return cases, report


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import scaling

    return scaling


def line(row: str, tokens: float, *, call: str = "first", losses=(10.0, 8.0), peak: float = 10.0, **more) -> dict:
    return {
        "call": call,
        "device": "a card",
        "dry_run": False,
        "versions": {"torch": "2"},
        "command": "run.py",
        "case": "8b-lora",
        "row": row,
        "repeat": 0,
        "tokens_per_second": tokens,
        "step_ms": [100.0, 90.0, 120.0],
        "peak_gib": peak,
        "reserved_gib": peak,
        "steps": [{"loss": loss, "grad_norm": 1.0} for loss in losses],
        "import_s": 10.0,
        "load_s": 5.0,
        "first_step_s": 1.0,
        "construct_s": 0.1,
    } | more


def row_of(page: str, name: str) -> list[str]:
    return next([cell.strip() for cell in text.split("|")[1:-1]] for text in page.splitlines() if f"| {name} |" in text)


def test_factor_bar_and_loss_difference(modules):
    _, report = modules
    page = report.render(
        [
            line("pantheraml/default", 1500, losses=(10.0, 8.04)),
            line("pantheraml/recompute", 1100, peak=10.1),
            line("unsloth/default", 1000),
            line("hf/default", 500, losses=(10.0, 8.0)),
        ]
    )
    ours = row_of(page, "pantheraml/default")
    assert ours[2] == "1.50"
    assert ours[3] == "1.45 met, aim 1.65 missed"
    assert ours[6] == "5.0e-03"
    assert ours[8] == "1 of 2"
    assert row_of(page, "pantheraml/recompute")[3] == "1.12 missed, aim 1.2 missed; peak 1 x missed"


def test_a_failed_peer_is_replaced_and_shown(modules):
    _, report = modules
    failed = {key: value for key, value in line("unsloth/default", 1).items() if key != "steps"} | {
        "error": "no | memory"
    }
    page = report.render([line("pantheraml/default", 1500), failed, line("liger/default", 1000)])
    assert "x liger/default" in page
    assert row_of(page, "unsloth/default")[1] == "failed: no / memory"


def test_only_rows_of_one_call_are_compared_and_a_fuller_later_call_replaces(modules):
    _, report = modules
    lines = [line("pantheraml/default", 1, call="a"), line("hf/default", 1, call="b")]
    assert [c[0]["call"] for c in report.calls_of(lines, "8b-lora")] == ["a", "b"]
    lines += [line("hf/default", 2, call="c"), line("pantheraml/default", 2, call="c")]
    assert [c[0]["call"] for c in report.calls_of(lines, "8b-lora")] == ["c"]


def test_losses_are_compared_with_another_call_where_the_own_has_no_reference(modules):
    _, report = modules
    lines = [
        line("hf/default", 1, call="a", losses=(10.0, 8.0)),
        line("pantheraml/default", 1, call="b", losses=(10.0, 8.04)),
        line("hf/default", 1, call="c", losses=()),
    ]
    ours = row_of(report.render(lines), "pantheraml/default")
    assert ours[6] == "5.0e-03"
    assert "largest difference from hf/default of a" in report.render(lines)


def test_losses_of_runs_of_another_length_are_not_compared(modules):
    """Their data are shuffled in another order."""
    _, report = modules
    lines = [
        line("hf/default", 1, call="a", losses=(10.0, 8.0, 7.0)),
        line("pantheraml/default", 1, call="b", losses=(10.0, 8.04)),
    ]
    page = report.render(lines)
    assert row_of(page, "pantheraml/default")[6] == ""
    assert "largest difference from -" in page


def test_start_up_counts_from_the_faster_plain_process(modules):
    _, report = modules
    lines = [
        line("hf/default", 1, case="start-up", load_s=9.0),
        line("hf/default", 1, case="start-up", load_s=5.0, repeat=1),
        line("pantheraml/default", 1, case="start-up", load_s=9.5),
    ]
    page = report.render(lines)
    assert row_of(page, "pantheraml/default")[6] == "+4.5, missed"


def test_selection_by_contender_and_variant(modules):
    cases, _ = modules
    chosen = cases.select("8b-lora", "hf,pantheraml/fp8")["8b-lora"]
    assert [row.name for row in chosen.rows] == ["hf/default", "pantheraml/fp8"]
    with pytest.raises(ValueError, match="nothing-like-it"):
        cases.select("nothing-like-it", "all")


def test_lines_of_several_files_make_one_report(modules, tmp_path):
    _, report = modules
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, row in zip(files, ("hf/default", "pantheraml/default")):
        file.write_text(json.dumps(line(row, 1)) + "\n")
    assert [entry["row"] for entry in report.read(files)] == ["hf/default", "pantheraml/default"]


def test_dry_run_keeps_the_options(modules):
    cases, _ = modules
    tiny = cases.CASES["8b-qlora-32k"].tiny()
    assert tiny.shape == "tiny"
    assert tiny.rows == cases.CASES["8b-qlora-32k"].rows
    assert dataclasses.replace(tiny, shape="llama-3.1-8b").mode == "qlora"


def scaled(row: str, ranks: int, tokens: float, **more) -> dict:
    return line(row, tokens, **({"ranks": ranks, "length": 2048, "batch": 4, "weights": {"float32": 7}} | more))


def test_scaling_is_of_the_same_contender_and_the_factor_of_the_same_number_of_gpus(scaling):
    page = scaling.render(
        [
            scaled("pantheraml/default", 1, 1000),
            scaled("pantheraml/default", 2, 960),
            scaled("unsloth/default", 1, 700),
            scaled("unsloth/default", 2, 600),
        ]
    )
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in page.splitlines() if text.startswith("| ")]
    ours = next(row for row in rows if row[:2] == ["pantheraml/default", "2"])
    assert ours[3] == "96.0%"
    assert ours[4] == "1.60 unsloth/default"
    assert ours[5] == "scaling 0.97 missed; x 1.4 met"


def test_sharded_rows_are_compared_with_a_peer_that_ran_and_by_memory(scaling):
    failed = {"error": "out of | memory", "ranks": 2}
    lines = [
        scaled("pantheraml/default", 2, 1000, case="8b-full-fsdp", peak=30.0),
        scaled("liger/default", 2, 1, case="8b-full-fsdp") | failed,
        scaled("liger/bf16", 2, 800, case="8b-full-fsdp", peak=40.0),
    ]
    page = scaling.render(lines)
    assert "1.25 liger/bf16 | x 1.2 met; peak lower" in page
    assert "failed: out of / memory" in page


def test_the_most_important_rows_come_first_and_only_what_the_host_has(scaling):
    case = scaling.CASES["8b-lora"]
    rows = [(ranks, contender.name) for ranks, contender in scaling.rows_of(case, 2, {"all"})]
    assert rows == [(1, "pantheraml"), (2, "pantheraml"), (1, "unsloth"), (2, "unsloth"), (1, "liger"), (2, "liger")]


def test_one_layer_on_disk_is_read_as_every_layer(modules, tmp_path):
    import shapes
    from safetensors import safe_open

    path = shapes.write("tiny", tmp_path, repeated=True, layers=3)
    assert shapes.write("tiny", tmp_path, repeated=True, layers=3) == path
    file = next(path.glob("*.safetensors"))
    with safe_open(str(file), framework="pt") as stored, shapes.RepeatedLayer(str(file), framework="pt") as repeated:
        first = [name for name in stored.keys() if ".layers.0." in name]  # noqa: SIM118
        assert first
        assert set(repeated.keys()) == set(stored.keys()) | {
            name.replace(".layers.0.", f".layers.{index}.") for name in first for index in (1, 2)
        }
        last = repeated.get_slice(first[0].replace(".layers.0.", ".layers.2."))[...]
        assert last.equal(stored.get_tensor(first[0]))


def test_loading_in_shards_is_told_with_what_a_rank_held(scaling):
    loaded = {"load_s": 61.2, "load_peak_gib": 12.3, "construct_peak_gib": 13.1, "load_host_gib": 2.5, "layers": None}
    page = scaling.render([scaled("pantheraml/default", 4, 900, case="70b-qlora-fsdp", **loaded)])
    assert (
        "loaded by 4 ranks in 61 s; a rank held at most 12.30 GiB of its GPU, 13.10 GiB until it trained, "
        "2.5 GiB of host memory besides file pages" in page
    )


def test_gaps_of_work_that_overlaps(modules):
    import profile_step
    from profile_step import Gap, Interval

    work = [Interval("b", 5, 9), Interval("a", 0, 4), Interval("inside", 1, 2), Interval("c", 8, 10)]
    busy, gaps = profile_step.gaps_of(work)
    assert busy == 9
    assert gaps == [Gap(1, "a", "b")]
    lines = profile_step.report([*work, Interval("a", 30, 32)], 2)
    assert lines[0] == "2 launches, busy 0.01 ms a step"
    assert lines[2].strip() == "20 us after c before a"
    assert any(line.endswith(" in 1 x a") for line in lines)

"""Progress: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from pantheraml.training.metrics import MetricsWriter
from pantheraml.training.progress import TrainingProgress, banner, duration, figures_of, parameter_counts

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def play(folder, console=None, steps=3, logs=None):
    """Run the callbacks as a trainer of ``steps`` steps would; returns the metrics writer."""
    watch = SimpleNamespace(trained_tokens=0)
    metrics = MetricsWriter(watch)
    progress = TrainingProgress(metrics, console)
    args = SimpleNamespace(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, world_size=1
    )
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=steps, num_train_epochs=1)
    callbacks = [metrics, progress]

    def event(name, **kwargs):
        for callback in callbacks:
            getattr(callback, name)(args, state, None, **kwargs)

    event("on_train_begin", model=nn.Linear(2, 2), train_dataloader=None)
    for step in range(1, steps + 1):
        state.global_step = step
        watch.trained_tokens += 100
        event("on_step_end")
        event("on_log", logs=logs or {"loss": 4.0 / step, "learning_rate": 1e-4, "grad_norm": torch.tensor(1.0)})
    event("on_log", logs={"eval_loss": 0.5})
    event("on_log", logs={"train_runtime": 1.0, "train_loss": 2.0})
    event("on_train_end")
    return metrics


def test_plain_lines_when_piped(tmp_path, capsys):
    play(tmp_path)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert not CONTROL.search(captured.err.replace("\n", ""))
    assert "batch 2 x accumulation 4 x 1 devices = 8 a step" in captured.err
    steps = [line for line in lines if re.search(r"step \d/3 \| loss", line)]
    assert len(steps) == 3
    assert re.search(
        r"step 2/3 \| loss 2\.0000 \| lr 1\.00e-04 \| [\d,]+ tokens/s \| [\d.]+ GiB \| \d+:\d\d left", steps[1]
    )
    assert "evaluation loss 0.5000" in captured.err


def test_a_bar_on_a_terminal(tmp_path, capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    play(tmp_path, console)
    assert "3/3" in screen.getvalue()
    assert "loss 1.3333" in screen.getvalue()
    assert "| loss" not in capsys.readouterr().err
    assert screen.getvalue().endswith("\x1b[?25h"), "the cursor is given back"


def test_markup_is_printed_as_it_is(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    play(tmp_path, console, logs={"loss": 1.0, "note": "[/] [link=x] \x1b[31m"})
    assert "3/3" in screen.getvalue()


def test_one_json_object_for_each_logged_step(tmp_path):
    metrics = play(tmp_path, logs={"loss": float("nan"), "grad_norm": float("inf"), "note": "[/]\n\x1b[31m"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["step"] for line in parsed] == [1, 2, 3, 3]
    assert parsed[0]["loss"] == "NaN"
    assert parsed[0]["grad_norm"] == "Infinity"
    assert parsed[2]["tokens"] == 300
    assert parsed[3]["eval_loss"] == 0.5
    assert len(metrics.entries) == 4


def test_a_new_run_starts_a_new_file(tmp_path):
    play(tmp_path, steps=5)
    play(tmp_path, steps=2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    metrics = MetricsWriter(SimpleNamespace(trained_tokens=0))
    progress = TrainingProgress(metrics)
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=3, num_train_epochs=1)
    args = SimpleNamespace(output_dir=str(tmp_path))
    for callback in (metrics, progress):
        callback.on_train_begin(args, state, None)
        callback.on_log(args, state, None, logs={"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-3, "0:00")], ids=str
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_figures_of_a_loss_that_is_not_finite():
    entry = {"loss": float("nan"), "lr": 0.0, "tokens_per_second": 1234.5, "memory_gib": 1.25}
    assert figures_of(entry, 61) == "loss nan | lr 0.00e+00 | 1,234 tokens/s | 1.2 GiB | 1:01 left"


def test_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert parameter_counts(model) == (16, 16)
    quantised = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    quantised.quant_state = SimpleNamespace(shape=torch.Size([4, 4]))
    model.register_parameter("packed", quantised)
    assert parameter_counts(model) == (16, 32)


def test_the_banner_says_what_is_trained():
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=3, world_size=4)
    state = SimpleNamespace(num_train_epochs=2, max_steps=1000)
    loader = SimpleNamespace(dataset=list(range(12345)))
    text = banner(args, state, nn.Linear(2, 2), loader)
    for words in (
        "12,345 examples",
        "2 epochs",
        "1,000 steps",
        "= 24 a step",
        "6 of 6 parameters are trained (100.00%)",
    ):
        assert words in text
    state.num_train_epochs = 2**63 - 1
    stream = banner(args, state, nn.Linear(2, 2), SimpleNamespace(dataset=iter(())))
    assert stream.startswith("training on a stream of examples, 1,000 steps")

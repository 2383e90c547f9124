"""Progress: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from rich.console import Console
from torch import nn

from pantheraml.device import get_device
from pantheraml.training.metrics import MetricsWriter
from pantheraml.training.progress import TrainingProgress, banner, duration, figures_of, parameter_counts
from pantheraml.training.utilisation import ceiling, flops_per_token, peak_of

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


def test_figures_of_several_ranks():
    entry = {"loss": 1.0, "tokens_per_second": 3000.0, "mfu": 0.4123, "memory_gib": 10.04, "ranks": 2}
    told = figures_of(entry | {"memory_gib_of_ranks": [10.04, 12.0]}, 0)
    assert told == "loss 1.0000 | 3,000 tokens/s (1,500 a rank) | 41.2% MFU | 10.0 to 12.0 GiB a rank | 0:00 left"
    assert "| 10.0 GiB |" in figures_of(entry | {"memory_gib_of_ranks": [10.04, 10.01]}, 0)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("a processor", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name, teraflops):
    device = dataclasses.replace(get_device(), name=name)
    assert peak_of(device) == (None if teraflops is None else teraflops * 1e12)


def test_operations_of_a_token_are_those_of_the_weights_it_is_multiplied_with():
    model = make_tiny("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=384)
    head = 384 * 64
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert flops_per_token(model) == 6 * (head + layers)
    model.requires_grad_(False)
    assert flops_per_token(model) == 4 * (head + layers)
    tied = make_tiny("llama", tie_word_embeddings=True)
    assert flops_per_token(tied) == 6 * (head + layers)
    experts = make_tiny(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, num_hidden_layers=1
    )
    attention, router = 64 * 64 * 2 + 64 * 32 * 2, 64 * 4
    assert flops_per_token(experts) == 6 * (head + attention + router + 2 * 3 * 64 * 32)


def test_the_ceiling_is_known_for_products_of_16_bits():
    model, device = make_tiny("llama"), dataclasses.replace(get_device(), name="NVIDIA L4")
    assert ceiling(model, SimpleNamespace(bf16=True, fp16=False), device) == 121e12 / flops_per_token(model)
    assert ceiling(model, SimpleNamespace(bf16=False, fp16=False), device) is None
    assert ceiling(model, SimpleNamespace(bf16=True, fp16=False), get_device()) is None


def test_a_sharded_4_bit_weight_counts_the_numbers_that_it_stands_for():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    vars(layer)["quant_state"] = SimpleNamespace(shape=torch.Size([4, 4]))
    assert parameter_counts(layer) == (0, 16)

"""Two processes train what one process trains: on one CPU, connected by Gloo, or on two GPUs, connected by NCCL."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from launching import DEVICES, ENVIRONMENT, HERE, ROOT, launch_once, of, torchrun
from runs import ROWS, losses_of, train, trained_weights
from safetensors.torch import load_file

import pantheraml
from pantheraml.cli import main
from pantheraml.errors import RankError

# Adam would blow rounding errors of tiny gradients up to whole steps.
ALL_WEIGHTS = {"max_steps": 3, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}

# The first test waits for the launch.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=DEVICES)
def launched(request, tmp_path_factory):
    """What the scenarios of ``worker.py`` found on each rank."""
    return launch_once("worker.py", 2, request.param, tmp_path_factory)


def test_names_of_the_facade_under_a_launch(launched):
    for rank, facts in enumerate(launched.facts):
        found = facts["helpers"]
        assert not found["joined before"]
        assert found["joined"]
        assert found["backend"] == launched.backend
        assert (found["rank"], found["local rank"], found["world size"]) == (rank, rank, 2)
        assert found["main"] == (rank == 0)
        assert found["broadcast"] == {"from": 1}
        assert (found["mean"], found["sum"]) == (1.5, 3.0)
        assert found["refused"] == ["ConfigError", "ConflictError", "ConflictError", "ConflictError"]
        assert found["sampled"] == [rank, rank + 2, rank + 4]
        assert found["wrapped"]
        assert found["wrapped twice"]


SHARED = [
    pytest.param("accumulation 1", {}, id="lora 2x4"),
    pytest.param("accumulation 2", {"accumulation": 2, "checkpointing": True}, id="lora 2x2x2, checkpointing"),
    pytest.param(
        "full",
        {
            "lora": False,
            "kind": "PantheraMLTrainer",
            "options": ALL_WEIGHTS,
        },
        id="all weights",
    ),
]


@pytest.mark.parametrize(("run", "options"), SHARED)
def test_two_ranks_train_what_one_process_trains(run, options, launched, tmp_path):
    facts, weights = launched.facts, launched.weights
    # Checkpointing changes no number, so the single process does without.
    alone, seen = train(tmp_path, ranks=1, **{k: v for k, v in options.items() if k != "checkpointing"})
    wanted = trained_weights(alone.model)
    evaluated = alone.evaluate()["eval_loss"]
    found = of(weights[0], run)
    assert found.keys() == wanted.keys()
    tolerance = launched.tolerance
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for rank in facts:
        assert rank[run]["losses"] == pytest.approx(losses_of(alone), abs=tolerance)
        assert rank[run]["eval"] == pytest.approx(evaluated, abs=tolerance)
        assert rank[run]["wrapped once"]
        assert not rank[run]["find unused"]
    for epoch, rows in enumerate(seen.epochs):
        assert sorted(rank_row for rank in facts for rank_row in rank[run]["epochs"][epoch]) == sorted(rows)


@pytest.mark.parametrize("run", ["accumulation 1", "accumulation 2", "full", "distributed"])
def test_ranks_stay_bitwise_equal(run, launched):
    first, second = (of(weights, run) for weights in launched.weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("run", ["accumulation 1", "accumulation 2"])
def test_each_epoch_sees_every_row_once_in_another_order(run, launched):
    ranks = [facts[run]["epochs"] for facts in launched.facts]
    for epoch in range(2):
        assert sorted(ranks[0][epoch] + ranks[1][epoch]) == list(range(ROWS))
    assert ranks[0][0] != ranks[0][1]
    assert launched.facts[0][run]["steps"] == 6


def test_one_log_one_checkpoint_and_the_config_of_the_distributed_trainer(launched):
    facts, folder, told = launched.facts, launched.folder, launched.told
    out = folder / "distributed"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (out / "checkpoint-2" / "adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (folder / "accumulation 1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert told.count("training on 17 examples, 2 epochs, 6 steps") == 5, "once for each of the runs, not for each rank"
    assert told.count("batch 4 x accumulation 1 x 2 devices = 8 a step") >= 1
    assert told.count("learning rate 0.01 x 2 processes") == 1
    assert told.count("memory in GiB") == 1
    for rank in facts:
        assert rank["distributed"]["find unused"]
        assert rank["distributed"]["memory"].keys() == {f"{launched.device}_0", f"{launched.device}_1"}
        assert all(row["max_allocated"] > 0 for row in rank["distributed"]["memory"].values())
    assert facts[0]["distributed"]["losses"][0] == facts[0]["accumulation 1"]["losses"][0]
    assert facts[0]["distributed"]["losses"][1] != facts[0]["accumulation 1"]["losses"][1], "twice the learning rate"


def test_a_resumed_launch_ends_where_an_uninterrupted_one_does(launched):
    facts, weights = launched.facts, launched.weights
    for rank in range(2):
        # The checkpoint was made after two of the three steps of an epoch: what is left is the idle batch of rank 1.
        done, wanted = facts[rank]["resumed"], facts[rank]["uninterrupted"]
        assert done["losses"] == pytest.approx(wanted["losses"], abs=1e-6)
        assert done["epochs"][1] == wanted["epochs"][1]
        found, expected = of(weights[rank], "resumed"), of(weights[rank], "uninterrupted")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loss_that_is_nan_on_one_rank_stops_both_before_the_step(launched):
    for rank, facts in enumerate(launched.facts):
        told = "the loss is not finite on rank 1 in step 2" if rank == 0 else "the loss is nan in step 2"
        assert told in facts["nonfinite"]["raised"]
        assert (", rows " in facts["nonfinite"]["raised"]) == (rank == 1)
        assert facts["nonfinite"]["weights kept"]


def test_preparing_for_longer_than_the_timeout_is_no_failure(launched):
    launched.need("slow tokenising")
    for facts in launched.facts:
        assert facts["slow tokenising"]["steps"] == 1
        assert facts["slow tokenising"]["waited"] > 2.2


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", r"rank 1 of 2 failed in step 3 of 6: LookupError: the fault of rank one"),
        ("hang", r"rank 0 of 2 failed in step 3 of 6: \w+: .*(?i:timed? ?out)"),
    ],
)
def test_a_rank_that_raises_or_hangs_ends_the_launch_and_is_named_with_its_step(how, told, tmp_path):
    start = time.monotonic()
    done = torchrun(HERE / "failing_worker.py", tmp_path, how)
    assert done.returncode != 0
    assert time.monotonic() - start < 120
    assert re.search(told, done.stderr)
    assert "step 2/6" in done.stderr
    assert "step 3/6" not in done.stderr


def test_sigterm_to_one_rank_checkpoints_on_all_and_a_restart_goes_on_from_there(launched, tmp_path):
    done = torchrun(
        HERE / "failing_worker.py", tmp_path, "terminate", flags=["--max-restarts=1"], device=launched.device
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stopped by SIGTERM after step 3" in done.stderr
    assert "exitcode: 143" in done.stderr
    assert f"restart 1 of the launch: going on from {tmp_path / 'checkpoint-3'}" in done.stderr
    for rank in range(2):
        found, wanted = load_file(tmp_path / f"rank{rank}.safetensors"), of(launched.weights[rank], "uninterrupted")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_runs_that_are_killed_go_on_from_the_last_whole_checkpoint(launched, tmp_path):
    if launched.device == "gpu":
        pytest.skip("four starts; what is written and read again is the same on CPUs")
    words, flags = (HERE / "killed_worker.py", tmp_path), ["--max-restarts=1"]
    killed = torchrun(*words, flags=flags, device=launched.device)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert (tmp_path / "sharded" / "checkpoint-4" / "optimizer_0").is_dir()
    done = torchrun(*words, flags=flags, device=launched.device)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count(f"{tmp_path / 'sharded' / 'checkpoint-4'} was not written to its end") == 1
    assert done.stderr.count(f"restart 1 of the launch: going on from {tmp_path / 'copied' / 'checkpoint-2'}") == 1
    for rank in range(2):
        runs = ("resumed", "undisturbed", "copied")
        resumed, undisturbed, copied = (load_file(tmp_path / f"{run}-{rank}.safetensors") for run in runs)
        wanted = of(launched.weights[rank], "uninterrupted")
        assert resumed.keys() == undisturbed.keys()
        assert copied.keys() == wanted.keys()
        assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
        assert all(torch.equal(copied[name], wanted[name]) for name in wanted)


def _sums(factor: int) -> dict:
    """What each rank of ``launch`` runs; travels by value."""
    from pantheraml.parallel import process_group

    with process_group.distributed_context():
        return {"total": process_group.all_reduce_scalar(factor * (process_group.get_rank() + 1), average=False)}


def _fault(where: str) -> None:
    raise LookupError(f"nothing in {where}")


def test_a_function_is_launched_and_gives_the_result_of_rank_0(monkeypatch):
    for name in ("PANTHERAML_DEVICE", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    factor = 10
    # As a notebook's, it cannot be imported by the ranks.
    found = pantheraml.launch(lambda shift: _sums(factor) | {"shift": shift}, 2, 5)
    assert found == {"total": 30.0, "shift": 5}
    with pytest.raises(RankError, match=r"rank \d: LookupError: nothing in it"):
        pantheraml.launch(_fault, 2, "it")
    assert pantheraml.launch(_sums, 1, 3) == {"total": 3.0}


@pytest.mark.parametrize(
    ("more", "batch", "told"),
    [
        ([], 2, "batch 2 x accumulation 1 x 2 devices = 4 a step"),
        (
            ["--strategy", "fsdp", "--context_parallel", "2", "--save_model"],
            4,
            "batch 4 x accumulation 1 x 1 groups of 2 devices = 4 a step",
        ),
    ],
    ids=["copies", "divided"],
)
def test_the_command_line_launches_itself_trains_qlora_as_one_process_does_and_saves_once(
    more, batch, told, tiny_llama_dir, tmp_path
):
    rows = [{"text": f"number {i} is followed by {i + 1}"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    shared = ["--model_name", tiny_llama_dir, "--dataset", tmp_path / "rows.jsonl", "--json", "--load_in_4bit"]
    shared += ["--max_steps", "2", "--r", "4", "--warmup_steps", "0", "--gradient_accumulation_steps", "1"]
    shared += ["--optim", "sgd", "--learning_rate", "1"]
    flags = [*shared, "--output_dir", out, "--per_device_train_batch_size", batch, "--gpus", "2", *more]
    flags += ["--save_path", tmp_path / "merged"] if more else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "pantheraml-cli.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout)
    assert record["steps"] == 2
    assert record["saved"]["adapter"] == str(out)
    assert (out / "adapter_model.safetensors").is_file()
    assert done.stderr.count(told) == 1
    assert "UserWarning" not in done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file() == bool(more)
    assert done.stderr.count("Trained 2 steps") == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    flags = [*shared, "--output_dir", tmp_path / "alone", "--per_device_train_batch_size", "4"]
    assert main(list(map(str, flags))) == 0
    wanted = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert any(weight.abs().max() > 1e-3 for name, weight in wanted.items() if "lora_B" in name)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("flags", [[], ["--advanced"]], ids=["simple", "advanced"])
def test_the_example_runs_in_one_process(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["multi_gpu_training.py", "--steps", "1", *flags])
    runpy.run_path(str(ROOT / "examples" / "multi_gpu_training.py"), run_name="__main__")
    assert (tmp_path / "multi-gpu" / "adapter" / "adapter_model.safetensors").is_file()
    assert ("memory in GiB" in capsys.readouterr().err) == bool(flags)

"""Loaded in shards, a model is that which is loaded whole and sharded after, and no rank ever holds it."""

from __future__ import annotations

import json

import pytest
import torch
from launching import DEVICES, launch_once, of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WAYS = ["lora", "full", "nf4"]
KINDS = [
    *WAYS,
    "tied",
    "nf4 already",
    "bf16",
    "odd",
    "embeddings",
    "new tokens",
    "experts",
    "experts trained",
    "windows",
    "soft caps",
    "sinks",
]

# The first test waits for both launches.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=DEVICES)
def two(request, tmp_path_factory):
    """What two ranks found."""
    return launch_once("loading_worker.py", 2, request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=DEVICES)
def four(request, tmp_path_factory):
    """What four ranks found."""
    return launch_once("loading_worker.py", 4, request.param, tmp_path_factory)


# Products may round in another way where a weight lies elsewhere in memory.
ROUNDING = {"cpu": 1e-6, "gpu": 1e-4}


def same(found, due, launched, *, trained) -> None:
    """The same numbers: frozen weights and buffers to the last bit."""
    assert found.keys() == due.keys()
    for name, weight in due.items():
        assert found[name].dtype == weight.dtype, name
        if name in trained:
            atol = ROUNDING[launched.device] if weight.dtype is torch.float32 else 1e-2
            torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)
        else:
            assert torch.equal(found[name], weight), name


def check(launched, run: str, due: str) -> None:
    for rank, facts in enumerate(launched.facts):
        trained = facts[due]["trained"]
        same(of(launched.weights[rank], run), of(launched.weights[rank], due), launched, trained=trained)
        for figure in ("losses", "eval"):
            assert facts[run][figure] == pytest.approx(facts[due][figure], abs=10 * ROUNDING[launched.device])
        for fact in ("trained", "attention", "adapted"):
            assert facts[run][fact] == facts[due][fact]
        assert facts[run]["padding-free"] == facts[due]["padding-free"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_the_same_weights_whichever_way_they_are_loaded(kind, two):
    two.need(kind)
    for facts in two.facts:
        assert facts[kind]["in parts"]
        assert not facts[f"{kind}, whole"]["in parts"]
        assert facts[kind]["sharded"]
    check(two, kind, f"{kind}, whole")


@pytest.mark.parametrize("kind", WAYS)
def test_four_ranks_train_the_same_weights_whichever_way_they_are_loaded(kind, four):
    check(four, kind, f"{kind}, whole")


def test_copies_of_shards_train_the_same_weights(four):
    for rank, facts in enumerate(four.facts):
        assert facts["hybrid"]["losses"] == pytest.approx(facts["lora"]["losses"], abs=four.tolerance)
        hybrid, lora = (of(four.weights[rank], run) for run in ("hybrid", "lora"))
        assert all(torch.allclose(hybrid[name], lora[name], rtol=0, atol=four.tolerance) for name in lora)


@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_a_rank_holds_its_share_and_a_layer_at_most(kind, four):
    if four.device != "cpu":
        pytest.skip("counts the tensors of the process, wherever they are")
    for facts in four.facts:
        found = facts[f"bytes, {kind}"]
        # Every rank has the scales of 4-bit weights, as the trainer's shards do. What is read at a time is one layer.
        share = (found["whole"] - found["scales"]) / 4 + found["scales"]
        slack = 0.02 * found["whole"]  # buffers, and rows that do not divide
        assert found["kept"] <= share + slack
        assert found["sharded"] <= share + slack
        assert found["most while loading"] <= share + found["largest read"] + slack
        assert found["most while sharding"] <= share + 2 * found["largest read"] + slack
        assert found["largest read"] <= found["read"] / 6  # eight layers, embedding and head
        assert found["most while loading"] < 0.75 * found["whole"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(kind, two):
    for rank, facts in enumerate(two.facts):
        trained = facts[kind]["trained"]
        same(of(two.weights[rank], f"{kind}, resumed"), of(two.weights[rank], kind), two, trained=trained)
        assert facts[f"{kind}, resumed"]["losses"] == pytest.approx(facts[kind]["losses"], abs=two.tolerance)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_saved_model_has_the_trained_weights(kind, two):
    weights = of(two.weights[0], kind)
    saved = dict(AutoModelForCausalLM.from_pretrained(two.folder / f"{kind} merged").named_parameters())
    for name, weight in saved.items():
        if kind == "full":
            due = weights[name]
        else:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            due = weights.get(f"{layer}.weight", weights.get(f"{layer}.base_layer.weight"))
            a, b = (weights.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
            due = due if a is None else due + 4 * b @ a
        torch.testing.assert_close(weight, due, rtol=0, atol=1e-5)
    untrained = dict(AutoModelForCausalLM.from_pretrained(two.folder / "full untrained").named_parameters())
    stored = dict(AutoModelForCausalLM.from_pretrained(two.folder / "models" / "full").named_parameters())
    assert all(torch.equal(untrained[name], stored[name]) for name in stored)


def test_an_adapter_is_written_for_llama_cpp(two):
    assert list((two.folder / "lora ggml").glob("*.gguf"))


def test_a_saved_adapter_goes_on_a_base_in_shards(two):
    for rank, facts in enumerate(two.facts):
        assert facts["adapter loaded"]["in parts"]
        found, due = of(two.weights[rank], "adapter loaded"), of(two.weights[rank], "lora")
        assert found
        assert all(torch.equal(found[name].cpu(), due[name]) for name in found)


def test_documents_are_measured_apart_before_they_are_packed(two):
    two.need("packed")
    for facts in two.facts:
        assert facts["packed"]["sharded"]
        assert len(facts["packed"]["losses"]) == 3


def test_a_sharded_trainer_does_not_tell_later_ones_to_shard(two):
    for facts in two.facts:
        assert facts["lora"]["environment"] == []


def test_layers_that_return_views_are_no_news(two):
    assert "view tensor" not in two.told


def test_embedding_and_head_of_new_tokens_are_saved_with_the_adapter(two):
    two.need("new tokens")
    weights = of(two.weights[0], "new tokens")
    saved = load_file(two.folder / "new tokens by trainer" / "adapter_model.safetensors")
    named = {name.replace("modules_to_save.weight", "modules_to_save.default.weight"): x for name, x in saved.items()}
    full = [name for name in named if name in weights and name.endswith("modules_to_save.default.weight")]
    assert len(full) == 2
    assert all(torch.equal(named[name], weights[name]) for name in full)


def test_the_log_tells_speed_and_memory_of_every_rank(two):
    lines = (two.folder / "runs" / "lora" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-2])  # the last one is of the evaluation
    assert last["ranks"] == 2
    assert len(last["memory_gib_of_ranks"]) == 2
    assert min(last["memory_gib_of_ranks"]) > 0
    assert "a rank)" in two.told


def test_packed_weights_count_the_numbers_that_they_stand_for(two):
    for facts in two.facts:
        assert facts["nf4"]["parameters"] == facts["lora"]["parameters"]


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        ("generate", "in shards, one on each rank, and cannot run before a trainer"),
        ("forward", "in shards, one on each rank, and cannot run before a trainer"),
        ("dora", "use_dora=True reads the base's weights"),
        ("pissa", "init_lora_weights='pissa' reads the base's weights"),
        ("device_map", "device_map='auto' contradict each other"),
        ("a word", "multi_gpu_config must be a MultiGPUConfig, got str"),
        ("8 bits", "load_in_8bit does not work with strategy='fsdp'"),
        ("pickles", "use_safetensors=False does not work with strategy='fsdp'"),
        ("copies", "strategy='ddp', and the model was loaded in shards"),
    ],
)
def test_what_a_model_in_shards_cannot_do_is_said(attempt, told, two):
    two.need("refused")
    for facts in two.facts:
        assert told in facts["refused"][attempt]

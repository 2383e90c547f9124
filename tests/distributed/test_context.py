"""Sequences divided over two ranks, and over four in groups of two and as one: all train what one process trains."""

from __future__ import annotations

import pytest
import torch
from context_worker import OF_FOUR, OF_GPUS, REFUSED, SCENARIOS, trained
from launching import DEVICES, launch_once, of
from runs import losses_of, trained_weights

LAYERS = 2
# The first test waits for the launches.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
EACH = [
    pytest.param((*device.values, ranks), marks=device.marks, id=f"{device.id}-{ranks}")
    for device in DEVICES
    for ranks in (2, 4)
]
# Their layers do not run as one node.
NO_NODE = ("experts", "balanced experts", "balanced experts, padded", "sinks")


@pytest.fixture(scope="module", params=DEVICES)
def two(request, tmp_path_factory):
    """What two ranks found."""
    return launch_once("context_worker.py", 2, request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=DEVICES)
def four(request, tmp_path_factory):
    """What four ranks found."""
    return launch_once("context_worker.py", 4, request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=EACH)
def each(request, tmp_path_factory):
    """What the ranks of one launch found."""
    device, ranks = request.param
    return launch_once("context_worker.py", ranks, device, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the same global batch, trained once for each scenario."""
    known: dict[str, tuple] = {}

    def of_one(name: str) -> tuple:
        if name not in known:
            trainer = trained(name, tmp_path_factory.mktemp("alone"))
            evaluated = trainer.evaluate()["eval_loss"]
            tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
            known[name] = losses_of(trainer), trained_weights(trainer.model), evaluated, tokens
        return known[name]

    return of_one


def compare(launched, run: str, expected: tuple) -> None:
    losses, weights, evaluated, _ = expected
    for rank, facts in enumerate(launched.facts):
        found = of(launched.weights[rank], run)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                found[name], weight, rtol=0, atol=launched.tolerance, msg=lambda m, n=name: n + m
            )
        assert facts[run]["losses"] == pytest.approx(losses, abs=launched.tolerance)
        assert facts[run]["eval"] == pytest.approx(evaluated, abs=launched.tolerance)
    first, *others = (of(weights, run) for weights in launched.weights)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_that_share_sequences_train_what_one_process_trains(name, two, alone):
    two.need(f"{name} by 2")
    compare(two, f"{name} by 2", alone(name))


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in OF_FOUR.items() for name in names])
def test_four_ranks_in_groups_train_what_one_process_trains(size, name, four, alone):
    compare(four, f"{name} by {size}", alone(name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OF_GPUS)
def test_long_sequences_in_half_precision_train_as_on_one_gpu(name, alone, tmp_path_factory):
    two = launch_once("context_worker.py", 2, "gpu", tmp_path_factory)
    losses, _, evaluated, _ = alone(name)
    for facts in two.facts:
        found = facts[f"{name} by 2"]
        # Sums of another order; a step that went wrong moves the losses by tenths.
        assert found["losses"] == pytest.approx(losses, abs=0.02)
        assert found["eval"] == pytest.approx(evaluated, abs=0.02)
        assert found["node"] > 0
        assert found["longest"] <= 8 * 4000 // 2


def test_layers_run_as_one_node_on_no_more_than_a_share_of_the_tokens(each):
    # 17 rows of up to 40 tokens, of which at most 8 are joined into one.
    for facts in each.facts:
        for run, found in facts.items():
            name, _, size = run.rpartition(" by ")
            if name not in SCENARIOS:
                continue
            assert (found["node"] > 0) == (name not in NO_NODE), run
            assert found["longest"] <= 8 * 40 // int(size), run


def test_ranks_that_left_their_group_meet_again(each):
    assert [facts["rejoined"] for facts in each.facts] == {2: [1] * 2, 4: [6] * 4}[len(each.facts)]


def test_padding_is_no_token(two, alone):
    two.need("padded, accumulated by 2")
    for facts in two.facts:
        assert facts["padded, accumulated by 2"]["tokens"] == alone("padded, accumulated")[-1]


def test_a_resumed_run_goes_on_where_it_stopped(two):
    two.need("resumed")
    for facts in two.facts:
        assert facts["resumed"] == pytest.approx(facts["lora by 2"]["losses"][:8], abs=two.tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(name, two):
    two.need("refused")
    for facts in two.facts:
        told = facts["refused"][name]
        assert told is not None
        assert REFUSED[name][1] in told
        assert "context_parallel" in told

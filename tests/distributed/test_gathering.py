"""Two ranks with sharded weights keep them from forward to backward as far as both have room; no number changes."""

from __future__ import annotations

import pytest
import torch
from launching import launch_once, of

LAYERS, STEPS = 4, 12
# Forward and backward of each layer, the embedding, and the rest.
RESHARDED = 2 * LAYERS + 2

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks found."""
    return launch_once("gathering_worker.py", 2, "cpu", tmp_path_factory)


@pytest.mark.parametrize("run", ["kept", "fullest", "unused", "ran out", "recomputed"])
def test_keeping_weights_changes_no_number(run, two):
    for weights in two.weights:
        expected, found = of(weights, "resharded"), of(weights, run)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_kept_weights_are_gathered_once_a_step_after_the_first_which_measures(two):
    for facts in two.facts:
        assert facts["resharded"]["gathers"] == [RESHARDED] * STEPS
        found = facts["kept"]
        assert found["kept"] == [[False] * LAYERS] + [[True] * LAYERS] * (STEPS - 1)
        # After an evaluation the outermost unit's weights are there.
        once = RESHARDED - LAYERS
        assert found["gathers"] == [RESHARDED, *(once - (step in (4, 8)) for step in range(1, STEPS))]
    assert two.facts[0]["kept"]["reported"]


def test_layers_that_are_recomputed_are_gathered_no_more_often(two):
    for facts in two.facts:
        assert facts["recomputed"]["gathers"] == [RESHARDED] * STEPS


def test_ranks_keep_what_the_fullest_has_room_for_from_the_last_layer(two):
    first, second = (facts["fullest"] for facts in two.facts)
    assert first == second
    assert max(map(sum, first["kept"])) == 2
    assert all(kept == sorted(kept) for kept in first["kept"])


def test_an_evaluation_leaves_no_layer_gathered(two):
    assert [facts["kept"]["left"] for facts in two.facts] == [[0, 0, 0]] * 2


def test_a_rank_that_runs_out_of_memory_lets_all_gather_again(two):
    for facts in two.facts:
        kept = [sum(step) for step in facts["ran out"]["kept"]]
        lost = kept.index(0, 1)
        assert lost > STEPS // 2
        assert kept == [0, *[LAYERS] * (lost - 1), *[0] * (STEPS - lost)]


def test_two_ranks_sum_gradients_of_bfloat16_as_they_are(two):
    wide, narrow = (of(two.weights[0], f"narrow{how}") for how in (", summed in float32", ""))
    assert all(torch.equal(narrow[name], weight) for name, weight in wide.items())

"""The activation plan: what it keeps for a given memory, and that it never changes a number."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny

from pantheraml.errors import ConfigError, UnsupportedError
from pantheraml.models import host_memory
from pantheraml.models.activations import (
    ActivationPlan,
    Memory,
    mode_of,
    set_activation_plan,
)
from pantheraml.models.adapt import adapt
from pantheraml.models.allotment import allot, upgrades
from pantheraml.models.layers.costs import Cost
from pantheraml.models.layers.levels import Host, Keep, Level
from pantheraml.parallel import context

_PEAKS = ("peak", "reserved")
IDS = torch.arange(3, 27).view(2, 12)
HOST, INPUT, ATTENTION, RESIDUAL, ALL = Level(Keep.INPUT, Host.RESULTS), *(Level(keep) for keep in Keep)
COSTS = {
    HOST: Cost(0, 10.5, 10),
    INPUT: Cost(10, 10.0),
    ATTENTION: Cost(20, 9.0),
    RESIDUAL: Cost(40, 6.0),
    ALL: Cost(100, 0.0),
}
ON_DEVICE = {level: cost for level, cost in COSTS.items() if not level.host}


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fused", [False, True], ids=["stock layers", "layers as nodes"])
@pytest.mark.parametrize("value", ["auto", "unsloth", True, "offload", False], ids=str)
def test_every_mode_gives_the_same_gradients_bit_for_bit(value, fused):
    model = make_tiny("llama", num_hidden_layers=4)
    if fused:
        adapt(model)
    expected = gradients(copy.deepcopy(model))
    set_activation_plan(model, value)
    for _step in range(3):
        for name, grad in gradients(model).items():
            assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("fused", [False, True], ids=["stock layers", "layers as nodes"])
@pytest.mark.parametrize("value", ["auto", True, "offload", False], ids=str)
def test_a_copy_of_a_model_trains_by_its_own_plan(value, fused):
    """As a reference model of a preference trainer, or the best model so far that somebody keeps."""
    model = make_tiny("llama", num_hidden_layers=4)
    if fused:
        adapt(model)
    plan = set_activation_plan(model, value)
    expected = gradients(model)
    copied = copy.deepcopy(model)
    assert copied.activation_plan is not plan
    assert copied.activation_plan.mode == plan.mode
    assert all(layer._gradient_checkpointing_func.__self__ is copied.activation_plan for layer in copied.model.layers)
    model.zero_grad()
    for name, grad in gradients(copied).items():
        assert torch.equal(grad, expected[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(set(map(id, copied.activation_plan._layers)) & set(map(id, copied.model.layers))) == 4


class Allocator:
    """Stands in for the device: a layer that keeps its activations holds ``keep`` bytes a token until backward."""

    def __init__(self, *, capacity: int, base: int, recompute_peak: int):
        self.capacity, self.base, self.recompute_peak = capacity, base, recompute_peak
        self.kept = 0
        self.peak = self.reserved = base

    def __call__(self, _device) -> Memory:
        return Memory(self.base + self.kept, self.peak, self.capacity - self.base - self.kept, self.reserved)


class RecordingPlan(ActivationPlan):
    """Notes which layers were recomputed instead of recomputing them."""

    def _recompute(self, level, function, *args):
        return args[0]


class Layer(torch.nn.Module):
    """Calls back when it runs, the way of newer (``forward`` first) or older (``__call__``) transformers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def body(self, hidden, ran):
        ran(self, hidden)
        return hidden

    def bound(self, ran, *, older):
        if older:
            return functools.partial(self.body, ran=ran)
        return functools.partial(lambda layer, hidden: layer.body(hidden, ran), self)


def drive(plan, layers, allocator, *, tokens, keep, older=False):
    """One simulated step; returns, layer by layer, whether it was kept."""
    hidden = torch.zeros(1, tokens, 4, requires_grad=True)
    kept = []

    def ran(layer, h):
        kept.append(layer)
        allocator.kept += keep * tokens + h.numel() * h.element_size()

    for layer in layers:
        plan.run(layer.bound(ran, older=older), hidden)
    allocator.peak = max(allocator.peak, allocator.recompute_peak)
    # The first step's peak is stated, its kept layer included.
    allocator.reserved = allocator.recompute_peak + (allocator.kept if len(kept) > 1 else 0)
    allocator.kept = 0
    return [layer in kept for layer in layers]


@pytest.mark.parametrize("older", [False, True], ids=["layer bound first", "call of the layer bound"])
def test_layers_that_are_no_nodes_are_kept_from_the_last_as_far_as_they_fit(older):
    layers = [Layer() for _ in range(8)]
    step = functools.partial(drive, older=older)
    allocator = Allocator(capacity=10_000, base=1_000, recompute_peak=2_000)
    plan = RecordingPlan(layers, "auto", fraction=0.9, memory=allocator)
    assert step(plan, layers, allocator, tokens=10, keep=150) == [False] * 7 + [True]
    # limit 1,000 + 0.9 * 9,000 = 9,100; 0.94 * (9,100 - 2,000) = 6,674, of which half is tried: 2 layers of 1,500
    assert step(plan, layers, allocator, tokens=10, keep=150) == [False] * 6 + [True] * 2
    # They took 1,660 each: 6,674 / 1.107 / 1,500 = 4 layers.
    assert step(plan, layers, allocator, tokens=10, keep=150) == [False] * 4 + [True] * 4
    # half the tokens cost half, so all eight fit
    assert step(plan, layers, allocator, tokens=5, keep=150) == [True] * 8
    # more tokens than measured: measure again before keeping anything
    assert step(plan, layers, allocator, tokens=20, keep=150) == [False] * 7 + [True]


def test_ranks_that_share_sequences_keep_what_the_fullest_can():
    capacities, tokens = (10_000, 7_000), 10
    allocators = [Allocator(capacity=capacity, base=1_000, recompute_peak=2_000) for capacity in capacities]
    layers = [[Layer() for _ in range(8)] for _ in capacities]
    plans = [
        RecordingPlan(own, "auto", fraction=0.9, memory=memory) for own, memory in zip(layers, allocators, strict=True)
    ]
    kept: list[list[list[bool]]] = [[], []]
    for _ in range(3):
        readings = [allocator(None) for allocator in allocators]

        def agree(numbers, *, least=False, readings=readings):
            if len(numbers) == 3:
                return [max(r.allocated for r in readings), *(max(getattr(r, n) for r in readings) for n in _PEAKS)]
            return [min(r.free for r in readings)] if least else numbers

        group = SimpleNamespace(size=2, agree=agree)
        for rank, plan in enumerate(plans):
            with context.dividing(group, context.Division((2 * tokens,), 1, 2 * tokens)):  # type: ignore[arg-type]
                kept[rank].append(drive(plan, layers[rank], allocators[rank], tokens=tokens, keep=150))
    fullest = Allocator(capacity=min(capacities), base=1_000, recompute_peak=2_000)
    alone = RecordingPlan(layers[1], "auto", fraction=0.9, memory=fullest)
    assert kept[0] == kept[1]
    assert kept[1] == [drive(alone, layers[1], fullest, tokens=tokens, keep=150) for _ in range(3)]
    assert sum(kept[0][-1]) > 1


def test_levels_that_save_less_a_byte_than_a_higher_one_are_passed_over():
    # 0.05 s a byte from host to input, then 0.1, 0.15 and 0.1: the two in the middle make one step of 0.133.
    assert upgrades(COSTS) == [(RESIDUAL, 40, 4.5), (ALL, 60, 6.0)]
    assert upgrades(ON_DEVICE)[0] == (RESIDUAL, 30, 4.0)
    assert upgrades({INPUT: Cost(0, 1.0)}) == []


@pytest.mark.parametrize(
    ("budget", "levels"),
    [
        (25, [INPUT] * 3),
        (59, [INPUT] * 3),
        (60, [INPUT, INPUT, RESIDUAL]),
        (120, [RESIDUAL] * 3),
        (185, [RESIDUAL, RESIDUAL, ALL]),
        (300, [ALL] * 3),
    ],
)
def test_memory_is_spent_where_a_byte_saves_the_most_time(budget, levels):
    assert allot([ON_DEVICE] * 3, budget) == levels


def nodes_plan(allocator, layers, *, table=ON_DEVICE, **options):
    def costs(_layer, tokens, _length):
        times = tokens / 10
        return {level: Cost(int(c.bytes * times), c.seconds, int(c.host_bytes * times)) for level, c in table.items()}

    return ActivationPlan(layers, "auto", memory=allocator, costs=costs, **options)


def ask(plan, layers, *, tokens):
    hidden = torch.zeros(1, tokens, 1, dtype=torch.uint8)
    # On a CPU there is nothing to move to.
    asked = [plan.keep(layer, hidden) for layer in layers]
    assert asked == [(level._replace(host=Host.NOTHING), None) for level in plan.levels]
    return plan.levels[:]


def test_nodes_are_planned_from_their_costs_and_the_measured_peak():
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, fraction=0.9)
    assert ask(plan, layers, tokens=10) == [INPUT] * 4
    assert "measuring" in plan.describe()
    allocator.peak = 500
    # limit 100 + 810 = 910, of which 0.94 * 410 = 385 are left. Half is tried: four times 30, then once 60.
    assert ask(plan, layers, tokens=10) == [RESIDUAL] * 3 + [ALL]
    assert "measuring" in plan.describe()
    allocator.reserved = 500 + 180
    # It took what it should: four times 30, then four times 60.
    assert ask(plan, layers, tokens=10) == [ALL] * 4
    allocator.peak = 700
    assert ask(plan, layers, tokens=10) == [ALL] * 4
    # A larger batch starts over; its measured peak leaves 0.94 * (910 - 700) = 197 for levels that cost twice.
    assert ask(plan, layers, tokens=20) == [INPUT] * 4
    assert ask(plan, layers, tokens=20) == [INPUT, INPUT, INPUT, RESIDUAL]
    allocator.reserved = 700 + 60
    assert ask(plan, layers, tokens=20) == [INPUT, RESIDUAL, RESIDUAL, RESIDUAL]
    assert plan.describe() == (
        "activations of 4 layers at 20 tokens: 3 kept but for the MLP's inner part, 1 recomputed"
    )


def test_what_the_allocator_loses_between_blocks_is_not_spent():
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, fraction=0.9)
    ask(plan, layers, tokens=10)
    allocator.peak, allocator.reserved = 500, 800
    # 0.94 * (910 - 800) = 103 instead of 385; half is tried.
    assert ask(plan, layers, tokens=10) == [INPUT] * 3 + [RESIDUAL]
    allocator.reserved = 800 + 30
    assert ask(plan, layers, tokens=10) == [INPUT] + [RESIDUAL] * 3


def test_what_the_trial_takes_beyond_its_costs_is_expected_of_the_rest():
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, fraction=0.9)
    ask(plan, layers, tokens=10)
    allocator.peak = 500
    assert ask(plan, layers, tokens=10) == [RESIDUAL] * 3 + [ALL]
    # 180 bytes took 360, so that the 385 that are left are enough for 192.
    allocator.reserved = 500 + 360
    for _step in range(2):
        assert ask(plan, layers, tokens=10) == [RESIDUAL] * 3 + [ALL]
        assert "measuring" not in plan.describe()
    # What needs less than half of the memory is kept without a trial.
    plan = nodes_plan(Allocator(capacity=1_000, base=100, recompute_peak=100), layers, fraction=0.9)
    ask(plan, layers, tokens=10)
    assert ask(plan, layers, tokens=10) == [ALL] * 4


def test_what_a_full_step_leaves_is_spent_too():
    layers = [Layer() for _ in range(8)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, fraction=0.9)
    ask(plan, layers, tokens=10)
    # 0.94 * (910 - 800): half is tried, and takes nothing beyond what was reserved.
    allocator.peak, allocator.reserved = 500, 800
    assert ask(plan, layers, tokens=10) == [INPUT] * 7 + [RESIDUAL]
    # 30 + 103, then 120 + 103, then 210 + 103, which is the last time.
    assert ask(plan, layers, tokens=10) == [INPUT] * 4 + [RESIDUAL] * 4
    assert "measuring" not in plan.describe()
    assert ask(plan, layers, tokens=10) == [INPUT] + [RESIDUAL] * 7
    # Something else was held at the end of this one: no more is kept, nor asked about.
    allocator.reserved = 905
    assert ask(plan, layers, tokens=10) == [INPUT] + [RESIDUAL] * 7
    allocator.reserved = 600
    assert ask(plan, layers, tokens=10) == [INPUT] + [RESIDUAL] * 7
    # A smaller batch has room for more.
    assert ask(plan, layers, tokens=5) == plan.levels != [INPUT] + [RESIDUAL] * 7


def test_inputs_that_do_not_fit_wait_in_host_memory():
    layers = [Layer() for _ in range(4)]
    plan = nodes_plan(Allocator(capacity=1_290, base=0, recompute_peak=0), layers, table=COSTS, fraction=1.0)
    # 2.5 times 500 of a whole layer are set aside; of the rest, 40, the inputs of 50 bytes each take none.
    assert ask(plan, layers, tokens=50) == [HOST] * 4
    plan = nodes_plan(Allocator(capacity=1_350, base=0, recompute_peak=0), layers, table=COSTS, fraction=1.0)
    assert ask(plan, layers, tokens=50) == [HOST, HOST, INPUT, INPUT]


HOST_ATTENTION, HOST_ALL = Level(Keep.ATTENTION, Host.RESULTS), Level(Keep.ALL, Host.RESULTS)
BOTH = COSTS | {HOST_ATTENTION: Cost(0, 9.5, 20), HOST_ALL: Cost(70, 0.5, 20)}


@pytest.mark.parametrize(
    ("host", "levels"),
    [
        # 0.94 * (910 - 540) and the inputs' 40 are 387, of which three layers' 20 are on their way: 327.
        # What the last layer holds is never fetched in time.
        (80, [HOST_ALL, HOST_ALL, HOST_ALL, ALL]),
        (79, [RESIDUAL, ALL, ALL, ALL]),
    ],
)
def test_the_host_is_used_where_that_keeps_more_and_has_room(host, levels):
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, table=BOTH, fraction=0.9, host_memory=lambda: host)
    assert ask(plan, layers, tokens=10) == [INPUT] * 4
    allocator.peak = 540
    ask(plan, layers, tokens=10)
    # The trial takes what it should.
    allocator.reserved = 540 + plan._groups[torch.device("cpu")].measured.trying[0]
    assert ask(plan, layers, tokens=10) == levels


class Gathering:
    """Stands in for sharded layers of 30 bytes each, and for what another rank says, by how many numbers it is."""

    def __init__(self, seconds: float, others: dict[int, list[int]] | None = None):
        self.seconds, self.others = seconds, others or {}
        self.kept: list[object] = []

    def bytes_of(self, _layer):
        return 30

    def seconds_of(self, _layer):
        return self.seconds

    def keep(self, layer, kept):
        if kept != (layer in self.kept):
            (self.kept.append if kept else self.kept.remove)(layer)

    def agree(self, numbers, *, least=False):
        pairs = zip(numbers, self.others.get(len(numbers), numbers), strict=True)
        return [(min if least else max)(pair) for pair in pairs]


# Of layers kept but for the MLP's inner part a byte saves 4 / 30 s, of that part 6 / 60 s. Of weights, which are
# gathered while nothing else runs and so are waited for, it saves 1.4 / 30 of the time that gathering takes.
@pytest.mark.parametrize(
    ("seconds", "levels", "kept"),
    [
        (4.0, [INPUT, INPUT, RESIDUAL, RESIDUAL], [True] * 4),
        (2.5, [RESIDUAL] * 4, [False, False, True, True]),
        (1.0, [RESIDUAL] * 3 + [ALL], [False] * 4),
    ],
)
def test_gathered_weights_are_kept_where_a_byte_saves_the_most_time(seconds, levels, kept):
    layers, gathering = [Layer() for _ in range(4)], Gathering(seconds)
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers, fraction=0.9, gathering=gathering)
    assert ask(plan, layers, tokens=10) == [INPUT] * 4
    assert not gathering.kept
    allocator.peak = 500
    # Half of 0.94 * 410 is tried: 192.
    assert ask(plan, layers, tokens=10) == levels
    assert plan.gathered == kept
    assert [layer in gathering.kept for layer in layers] == kept
    allocator.reserved = 500 + 180
    ask(plan, layers, tokens=10)
    assert ("kept for the backward" in plan.describe()) == any(plan.gathered)
    # A larger batch is measured without them.
    assert ask(plan, layers, tokens=20) == [INPUT] * 4
    assert not gathering.kept


def test_weights_that_are_gathered_beside_the_arithmetic_are_hardly_waited_for():
    wide = Layer()
    wide.weight = torch.nn.Parameter(torch.empty(10**6, device="meta"))
    plan = nodes_plan(None, [wide], gathering=Gathering(1e-6))
    felt, kept = plan._of_weights(wide, 4096).values()
    assert (felt.bytes, felt.seconds) == (0, pytest.approx(0.4e-6))
    assert (kept.bytes, kept.seconds) == (30, 0.0)
    assert plan._of_weights(wide, 1)[False].seconds == pytest.approx(1.4e-6, rel=1e-2)


@pytest.mark.parametrize(
    "others",
    [
        # Tokens, length of a row, whether there was no memory, or none of the host's. Free memory. What is held.
        pytest.param({1: [400]}, id="less is free"),
        pytest.param({3: [100, 750, 750]}, id="more is held"),
        pytest.param({4: [14, 14, False, False]}, id="a larger batch"),
        pytest.param({4: [10, 10, True, False]}, id="no memory"),
    ],
)
def test_a_sharded_model_is_planned_as_its_fullest_rank_needs(others):
    layers = [Layer() for _ in range(4)]

    def planned(others):
        gathering = Gathering(4.0, others)
        allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
        plan = nodes_plan(allocator, layers, fraction=0.9, gathering=gathering)
        ask(plan, layers, tokens=10)
        allocator.peak = 500
        return sum(level.keep for level in ask(plan, layers, tokens=10)) + 10 * len(gathering.kept)

    assert planned(others) < planned({})


def test_the_first_layer_begins_a_forward_once_however_often_it_asks():
    layers, calls = [Layer() for _ in range(4)], []

    class Counting(Gathering):
        def agree(self, numbers, *, least=False):
            calls.append(len(numbers))
            return super().agree(numbers, least=least)

    plan = nodes_plan(Allocator(capacity=1_000, base=100, recompute_peak=500), layers, gathering=Counting(1.0))
    hidden = torch.zeros(1, 10, 1, dtype=torch.uint8)
    for _again in range(2):
        plan.keep(layers[0], hidden)
    assert calls.count(4) == 1
    plan.keep(layers[0], hidden.clone())
    assert calls.count(4) == 2


@pytest.mark.parametrize(
    ("host", "level", "told"),
    [
        (80, HOST_ATTENTION, "3 recomputed around inputs and attention's results held in host memory, 1 recomputed"),
        (79, HOST, "1 recomputed, 3 recomputed from inputs held in host memory"),
    ],
)
def test_offloading_moves_what_saves_time_and_has_room(host, level, told):
    plan = ActivationPlan([Layer() for _ in range(4)], "offload", costs=lambda *_: BOTH, host_memory=lambda: host)
    assert plan.describe() == "activations of all 4 layers are recomputed from inputs held in host memory"
    # Nothing could fetch what the last layer needs before it is needed.
    expected = [level, level, level, level._replace(host=False)]
    assert plan._offload(10, 10) == expected
    plan.levels[:] = expected
    assert plan.describe().startswith("activations of 4 layers: ")
    for part in told.split(", "):
        assert part in plan.describe()


def test_a_host_without_pinned_memory_is_told_and_left_alone(monkeypatch, caplog):
    def refuse(_tensors):
        raise host_memory.PinningError("out of memory")

    monkeypatch.setattr(host_memory, "_Held", refuse)
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=540)
    plan = nodes_plan(allocator, layers, table=BOTH, fraction=0.9, host_memory=lambda: 1_000)
    ask(plan, layers, tokens=10)
    allocator.peak = 540
    assert any(level.host for level in ask(plan, layers, tokens=10))
    x = torch.ones(3)
    (back,) = plan._stash.put([x])()
    assert torch.equal(back, x)
    assert "out of memory" in caplog.text
    allocator.reserved = 560
    assert not any(level.host for level in ask(plan, layers, tokens=10))
    asked = ActivationPlan(layers, "offload")
    with pytest.raises(UnsupportedError, match="pinned memory: out of memory"):
        asked._stash.put([x])


def test_after_an_allocation_failed_nothing_more_is_kept():
    layers = [Layer() for _ in range(4)]
    allocator = Allocator(capacity=1_000, base=100, recompute_peak=500)
    plan = nodes_plan(allocator, layers)
    ask(plan, layers, tokens=10)
    ask(plan, layers, tokens=10)
    assert ask(plan, layers, tokens=10) == [ALL] * 4
    plan.shrink()
    assert ask(plan, layers, tokens=10) == [INPUT] * 4


def test_evaluation_is_untouched():
    model = make_tiny("llama")
    plan = set_activation_plan(model, True)
    with torch.no_grad():
        model.train()
        assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)
    assert "recomputed" in plan.describe()


def test_unknown_modes_fractions_and_models_are_refused():
    with pytest.raises(ConfigError, match="sometimes"):
        mode_of("sometimes")
    with pytest.raises(ConfigError, match="fraction"):
        set_activation_plan(make_tiny("llama"), "auto", activation_memory_fraction=1.5)
    with pytest.raises(UnsupportedError, match="Linear"):
        set_activation_plan(torch.nn.Linear(2, 2), True)


@pytest.mark.gpu
@pytest.mark.parametrize("value", ["auto", True, "offload"], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["stock layers", "layers as nodes"])
def test_a_gpu_gets_the_same_gradients_in_every_mode(value, fused):
    model = make_tiny("llama", num_hidden_layers=6, hidden_size=512, intermediate_size=1024).cuda()
    if fused:
        adapt(model)
    ids = torch.randint(3, 300, (4, 512), device="cuda")

    def run(m):
        m.train()
        m.zero_grad()
        m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in m.named_parameters()}

    expected = run(copy.deepcopy(model))
    plan = set_activation_plan(model, value)
    for _step in range(3):
        for name, grad in run(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())
    assert plan.kept == (6 if value == "auto" else 0)

"""Tensors that wait in host memory: what is held when, and that nothing is lost on the way."""

import weakref

import pytest
import torch

from pantheraml.models import host_memory
from pantheraml.models.host_memory import HostStash


class Held:
    """Stands in for the copies: notes what is asked of it."""

    def __init__(self, tensors):
        self.tensors, self.calls = tensors, []

    def let_go(self):
        self.calls.append("let go")

    def start(self):
        self.calls.append("start")

    def finish(self):
        self.calls.append("finish")
        return self.tensors


@pytest.fixture
def made(monkeypatch):
    made = []

    def make(tensors):
        made.append(Held(tensors))
        return made[-1]

    monkeypatch.setattr(host_memory, "_Held", make)
    return made


def refuse(reason):
    raise AssertionError(reason)


def test_what_a_layer_put_is_let_go_when_the_layer_after_the_next_begins(made):
    stash = HostStash(refuse)
    for _layer in range(3):
        stash.advance()
        stash.put([torch.ones(1)])
        stash.put([torch.ones(1)])
    assert [held.calls for held in made] == [["let go"]] * 2 + [[]] * 4


def test_a_fetch_starts_the_one_before_it_and_lets_everything_go(made):
    stash = HostStash(refuse)
    fetches = []
    for index in range(3):
        stash.advance()
        fetches.append(stash.put([torch.full((1,), index)]))
    assert int(fetches[2]()[0]) == 2
    assert made[2].calls == ["let go", "finish"]
    assert made[1].calls == ["let go", "start"]
    assert made[0].calls == ["let go"]
    # A second backward over a graph that was kept.
    assert int(fetches[2]()[0]) == 2
    assert int(fetches[1]()[0]) == 1
    assert made[0].calls == ["let go", "start"]


def test_a_graph_that_was_given_up_is_neither_kept_nor_fetched(made):
    stash = HostStash(refuse)
    stash.put([torch.ones(1)])
    stash.advance()
    stash.advance()
    given_up = weakref.ref(made.pop())
    assert given_up() is None
    stash.put([torch.ones(1)])()
    assert made[0].calls == ["let go", "finish"]
    assert stash._held == []


class Stream:
    """Stands in for a stream of a device: notes who waits for what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        event = f"copy {sum(': copy' in entry for entry in self.log)}"
        self.log.append(f"{self.name}: {event}")
        return event

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_memory_is_used_again_only_after_the_copy_that_reads_or_writes_it(monkeypatch):
    log = []
    owner, side = Stream("owner", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: owner)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(host_memory, "_side_stream", lambda device: side)
    monkeypatch.setattr(host_memory, "_pinned", torch.empty_like)
    # Five numbers in pieces of two.
    monkeypatch.setattr(host_memory, "_PIECE_BYTES", 8)
    stash, there = HostStash(refuse), ["side waits for owner", "side: copy 0"]
    stash.advance()
    first = stash.put([torch.arange(5.0), torch.arange(6.0).view(2, 3).t()])
    stash.advance()
    assert log == there
    second = stash.put([torch.ones(5)])
    stash.advance()
    assert log == [*there, "side waits for owner", "side: copy 1", "owner waits for copy 0"]
    log.clear()
    (ones,) = second()
    assert torch.equal(ones, torch.ones(5))
    # What was put last goes first; the one before it comes meanwhile.
    assert log[:4] == ["owner waits for copy 1", "side waits for owner", "side: copy 0", "owner waits for copy 0"]
    assert log[4:] == ["side waits for owner", "side: copy 1"]
    log.clear()
    numbers, transposed = first()
    assert torch.equal(numbers, torch.arange(5.0))
    assert torch.equal(transposed, torch.arange(6.0).view(2, 3).t())
    assert log == ["owner waits for copy 1"]
    log.clear()
    first()
    assert log == ["side waits for owner", "side: copy 0", "owner waits for copy 0"]
    log.clear()
    given_up = stash.put([torch.ones(5)])
    stash.put([torch.ones(5)])()
    log.clear()
    del given_up
    assert log == ["owner waits for copy 3"]


MIB = 2**20


@pytest.mark.gpu
def test_a_host_that_runs_ahead_reserves_no_more_than_is_held():
    stash = HostStash(refuse)
    size, layers = 32 * MIB, 16
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    fetches, wrong = [], torch.zeros((), dtype=torch.int64, device="cuda")
    for index in range(layers):
        stash.advance()
        # The device is far behind.
        torch.cuda._sleep(20_000_000)
        fetches.append(stash.put([torch.full((size,), index, dtype=torch.uint8, device="cuda")]))
    while fetches:
        torch.cuda._sleep(20_000_000)
        (back,) = fetches.pop()()
        wrong += (back - len(fetches)).max()
        del back
    assert int(wrong) == 0
    assert torch.cuda.max_memory_reserved() - before <= 6 * size


@pytest.mark.gpu
def test_memory_of_a_graph_that_was_given_up_on_its_way_back_is_not_written_to():
    stash = HostStash(refuse)
    size = 256 * MIB
    stash.advance()
    first = stash.put([torch.ones(size, dtype=torch.uint8, device="cuda")])
    stash.advance()
    second = stash.put([torch.ones(MIB, dtype=torch.uint8, device="cuda")])
    second()
    # The first is on its way back now.
    del first
    mine = torch.zeros(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    assert int(mine.max()) == 0

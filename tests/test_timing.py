"""The one timer: rounds, their order, what is timed of a call, and what is left alone."""

from __future__ import annotations

import random
import time

import pytest
import torch

from meprop import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a test moves it; a list, so that tests can."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    return now


def test_each_side_is_called_once_a_round_and_the_order_changes():
    calls = []
    spent = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 0.0, least=9)
    assert {name: len(seconds) for name, seconds in spent.items()} == dict.fromkeys("abc", 9)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 10  # the first is not timed
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2


@pytest.mark.parametrize(
    ("seconds", "most", "rounds"),
    [(0.0, None, 3), (100.0, None, 10), (100.0, 7, 7), (0.0, 7, 3), (100.0, 2, 3)],
)
def test_rounds_end_with_the_time_and_stay_within_their_bounds(clock, seconds, most, rounds):
    def ten_seconds():
        clock[0] += 10

    assert len(timing.interleaved({"a": ten_seconds}, seconds, least=3, most=most)["a"]) == rounds


def test_the_call_is_timed_with_its_waiting_and_without_the_freeing(clock):
    """On a GPU a call returns before its work is done, and what was there before is no part of it."""
    pending = []

    class Result:
        def __del__(self):
            clock[0] += 1000

    def run():
        clock[0] += 2
        pending.append(5)
        return Result()

    def synchronize():
        clock[0] += sum(pending)
        pending.clear()

    spent = timing.interleaved({"a": run, "b": run}, 0.0, least=4, synchronize=synchronize)
    assert spent == {"a": [7.0] * 4, "b": [7.0] * 4}


def test_a_slow_first_call_is_not_timed(clock):
    delays = iter([50, 1, 1, 1])
    spent = timing.interleaved({"a": lambda: clock.__setitem__(0, clock[0] + next(delays))}, 0.0, least=3)
    assert spent == {"a": [1, 1, 1]}


def test_random_states_are_left_alone_and_runs_are_alike():
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    orders = [[], []]
    for order in orders:
        timing.interleaved({name: lambda name=name, order=order: order.append(name) for name in "abc"}, 0.0, least=5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert orders[0] == orders[1]


def test_what_takes_longer_is_measured_to_take_longer():
    spent = timing.interleaved({"short": lambda: None, "long": lambda: time.sleep(0.005)}, 0.0, least=5)
    assert min(spent["long"]) >= 0.005 > min(spent["short"])

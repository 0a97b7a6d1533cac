"""Timing by events: how calls are grouped, which copies they take, and what a time is of."""

from __future__ import annotations

import pytest

from bench.fake import FakeEvent
from meprop.bench import events


class Device:
    """Work that is queued, and takes so many seconds of the device's clock."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def event(self):
        return FakeEvent(lambda: self.now)

    def side(self, name, seconds, copies=1):
        """Calls on so many copies, which note who they are."""
        return [lambda copy=copy: self._call(name, copy, seconds) for copy in range(copies)]

    def _call(self, name, copy, seconds):
        self.now += seconds
        self.calls.append((name, copy))


def test_a_time_is_that_of_one_call():
    device = Device()
    sides = {"slow": device.side("slow", 0.25), "fast": device.side("fast", 2.0**-12)}
    times = events.interleaved(sides, 0.0, device.event)
    assert times["slow"].p20 == times["slow"].p50 == 0.25
    assert times["fast"].p20 == times["fast"].p50 == 2.0**-12


@pytest.mark.parametrize(("seconds", "together"), [(1.0, 1), (1e-3, 1), (4e-4, 3), (9e-5, 12), (1e-6, 64), (0.0, 64)])
def test_calls_of_less_than_a_millisecond_are_timed_together(seconds, together):
    device = Device()
    times = events.interleaved({"a": device.side("a", seconds)}, 0.0, device.event)
    assert times["a"].calls == 9 * together
    assert len(device.calls) == 1 + 3 + 9 * together  # the first call, those that are counted by, and 9 rounds


def test_calls_take_the_copies_in_turns():
    device = Device()
    events.interleaved({"a": device.side("a", 1.0, 3), "b": device.side("b", 1.0, 2)}, 0.0, device.event)
    for name, copies in (("a", 3), ("b", 2)):
        taken = [copy for each, copy in device.calls if each == name]
        assert taken[:copies] == list(range(copies))  # first calls
        assert taken[copies:] == [place % copies for place in range(len(taken) - copies)]


def test_sides_are_timed_in_turns_in_new_orders():
    device = Device()
    events.interleaved({name: device.side(name, 1.0) for name in "abc"}, 0.0, device.event)
    timed = [name for name, _ in device.calls[-27:]]
    rounds = [tuple(timed[start : start + 3]) for start in range(0, 27, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2


def test_the_host_waits_once_a_round_only():
    waits, device = [], Device()

    class Waiting(FakeEvent):
        def synchronize(self):
            waits.append(len(device.calls))

    events.interleaved({name: device.side(name, 1.0) for name in "ab"}, 0.0, lambda: Waiting(lambda: device.now))
    assert waits[:2] == [2 + 3, 2 + 3 + 3]  # how long a call takes
    assert waits[2:] == [each for made in range(10, 28, 2) for each in (made, made)]


@pytest.mark.parametrize(
    ("operands", "cache", "budget", "expected"),
    [
        (10, 100, 10_000, 32),  # no more than that are captured
        (50, 100, 10_000, 9),
        (400, 100, 10_000, 2),
        (401, 100, 10_000, 1),
        (50, 100, 120, 2),
        (500, 1000, 120, 1),
        (1, 0, 100, 1),
    ],
)
def test_copies_are_larger_than_four_caches_within_the_budget(operands, cache, budget, expected):
    assert events.copies(operands, cache, budget) == expected


def test_what_a_call_returns_is_freed_before_the_next_one():
    most = []

    class Result:
        living = 0

        def __init__(self):
            Result.living += 1
            most.append(Result.living)

        def __del__(self):
            Result.living -= 1

    events.interleaved({"a": [Result]}, 0.0, Device().event)
    assert max(most) == 1

"""Timing on a GPU: events of the device, several calls between two of them, and operands that no cache holds.

What a call returns is freed at once. A call takes its operands from another copy each time, so that they come from
memory as in training, where other layers run in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Protocol

from meprop import timing
from meprop.bench.measure import Times

Call = Callable[[], object]

_LEAST_ROUNDS = 9
_PAIR_SECONDS = 1e-3  # between two events at least: an event costs some microseconds, and so does an idle start
_MOST_CALLS = 64  # between two events
_MOST_COPIES = 32  # each of them is captured
_CACHES = 4  # the copies of the operands together, in sizes of the cache


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> object:
        """Note the time when the device gets there."""
        ...

    def synchronize(self) -> object:
        """Wait until the device got there."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to a later one."""
        ...


def copies(operand_bytes: int, cache_bytes: int, budget_bytes: int) -> int:
    """Return how many copies of operands are larger than four caches together: 1 to 32, as far as the budget goes.

    Args:
        operand_bytes: Of one copy.
        cache_bytes: Of the device's L2 cache.
        budget_bytes: Of all copies together.
    """
    wanted = _CACHES * cache_bytes // operand_bytes + 1
    return max(1, min(wanted, _MOST_COPIES, budget_bytes // operand_bytes))


def interleaved(sides: Mapping[str, Sequence[Call]], seconds: float, event: Callable[[], Event]) -> dict[str, Times]:
    """Return the times of one call of each side: `meprop.timing.rounds`, by events of the device.

    The device works through a round without waiting for the host, except where a call makes it wait.

    Args:
        sides: By name, calls that do the same with other copies of the operands. They are made in turns.
        seconds: To spend on all sides together. There are at least 9 rounds.
        event: Makes an event.
    """
    turns = {name: cycle(calls) for name, calls in sides.items()}
    for calls in sides.values():
        for call in calls:  # first calls allocate
            call()
    together = {name: _calls_together(turn, event) for name, turn in turns.items()}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for order in timing.rounds(sides, seconds, least=_LEAST_ROUNDS):
        pairs = {name: _between_events(turns[name], together[name], event) for name in order}
        for name, pair in pairs.items():
            spent[name].append(_seconds(*pair) / together[name])
    return {name: replace(Times.of(each), calls=len(each) * together[name]) for name, each in spent.items()}


def _calls_together(turn: Iterator[Call], event: Callable[[], Event]) -> int:
    """How many calls of a side take a millisecond."""
    calls = 3
    one = _seconds(*_between_events(turn, calls, event)) / calls
    return max(1, min(_MOST_CALLS, math.ceil(_PAIR_SECONDS / max(one, 1e-9))))


def _between_events(turn: Iterator[Call], calls: int, event: Callable[[], Event]) -> tuple[Event, Event]:
    start, end = event(), event()
    start.record()
    for _ in range(calls):
        next(turn)()
    end.record()
    return start, end


def _seconds(start: Event, end: Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1e3

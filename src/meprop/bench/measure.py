"""Timing several ways of doing one thing in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter

_LEAST_ROUNDS = 9


@dataclass(frozen=True)
class Times:
    """How long the calls of one side took: the fastest and percentiles, in seconds, and the number of calls."""

    best: float
    p20: float
    p50: float
    p80: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Return the percentiles of at least two calls."""
        tenths = quantiles(seconds, n=10, method="inclusive")
        return cls(min(seconds), tenths[1], tenths[4], tenths[7], len(seconds))


@dataclass(frozen=True)
class Ratio:
    """Dense time / sparse time: above 1, sparse is faster. Of the 20th percentiles and of the medians."""

    p20: float
    p50: float

    @classmethod
    def of(cls, dense: Times, sparse: Times) -> Ratio:
        """Return the ratio of two sides."""
        return cls(dense.p20 / sparse.p20, dense.p50 / sparse.p50)


def interleaved(sides: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Call the sides in turn, in a new order each round, until the time is spent, and at least 9 rounds.

    What a side returns is freed after its clock has stopped. One round before the first is not timed.
    """
    shuffle = random.Random(0).shuffle
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    order, rounds, end = list(sides), 0, perf_counter() + seconds
    while rounds < _LEAST_ROUNDS or perf_counter() < end:
        shuffle(order)
        for name in order:
            run = sides[name]
            start = perf_counter()
            result = run()
            spent[name].append(perf_counter() - start)
            del result
        rounds += 1
    return {name: Times.of(calls) for name, calls in spent.items()}


@dataclass(frozen=True)
class Disturbance:
    """Shares of all processors' time that were not ours to use: the higher, the less a measurement is worth.

    Attributes:
        stolen: Taken by the host for its other guests.
        others: Taken by other processes of this system.
    """

    stolen: float
    others: float


class DisturbanceMeter:
    """Watches from its making on."""

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def read(self) -> Disturbance | None:
        """Return what happened since; None where the system does not tell, or in less than one of its ticks."""
        now = _processor_seconds()
        if now is None or self._start is None:
            return None
        every, idle, stolen, own = (after - before for after, before in zip(now, self._start, strict=True))
        if every <= 0:
            return None
        return Disturbance(stolen / every, max(0.0, every - idle - stolen - own) / every)


def _processor_seconds() -> tuple[float, float, float, float] | None:
    """Seconds since start, of all processors: in all, idle, stolen, and in this process."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = (int(field) / ticks for field in fields)
    every = user + nice + system + idle + waiting + interrupts + soft_interrupts + stolen
    times = os.times()
    return every, idle + waiting, stolen, times.user + times.system

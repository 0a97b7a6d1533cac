"""How much a measurement was disturbed: the processor time that was not ours to use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Disturbance:
    """Shares of all processors' time that were not ours to use: the higher, the less a measurement is worth.

    Attributes:
        stolen: Taken by the host for its other guests.
        others: Taken by other processes of this system, the workers of a DataLoader among them.
    """

    stolen: float
    others: float


class DisturbanceMeter:
    """Watches from its making on."""

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def read(self) -> Disturbance | None:
        """Return what happened since; None where the system does not tell, or in less than one of its ticks."""
        return _shares(_since(self._start))


class DisturbanceSum:
    """Adds up what happens while it is entered, as a context manager.

    Attributes:
        seconds: Of all processors: in all, idle, stolen, and in this process. All are 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self.seconds: Sequence[float] = (0.0, 0.0, 0.0, 0.0)

    def __enter__(self) -> None:
        self._start = _processor_seconds()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = [sum(each) for each in zip(self.seconds, _since(self._start), strict=True)]

    def read(self) -> Disturbance | None:
        """Return what happened so far; None where the system does not tell, or in less than one of its ticks."""
        return _shares(self.seconds)


def _shares(seconds: Sequence[float]) -> Disturbance | None:
    every, idle, stolen, own = seconds
    if every <= 0:
        return None
    return Disturbance(stolen / every, max(0.0, every - idle - stolen - own) / every)


def _since(start: Sequence[float]) -> list[float]:
    return [after - before for after, before in zip(_processor_seconds(), start, strict=True)]


def _processor_seconds() -> tuple[float, float, float, float]:
    """Seconds since start, of all processors: in all, idle, stolen, and in this process; 0 where that is not known."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0, 0.0, 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = (int(field) / ticks for field in fields)
    every = user + nice + system + idle + waiting + interrupts + soft_interrupts + stolen
    times = os.times()
    return every, idle + waiting, stolen, times.user + times.system

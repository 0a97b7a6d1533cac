"""What was measured: times and ratios."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles

from meprop import timing

_LEAST_ROUNDS = 9


@dataclass(frozen=True)
class Times:
    """How long the calls of one side took: the fastest and percentiles, in seconds, and the number of calls."""

    best: float
    p20: float
    p50: float
    p80: float
    calls: int

    @property
    def milliseconds(self) -> str:
        """The 20th percentile, the median and the 80th percentile, as text."""
        return " / ".join(f"{1e3 * seconds:.3g}" for seconds in (self.p20, self.p50, self.p80))

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Return the percentiles of at least two calls."""
        tenths = quantiles(seconds, n=10, method="inclusive")
        return cls(min(seconds), tenths[1], tenths[4], tenths[7], len(seconds))


def milliseconds(times: Times) -> str:
    """Return the 20th percentile and the median as text, for devices whose times hardly vary."""
    return f"{1e3 * times.p20:.3g} / {1e3 * times.p50:.3g}"


@dataclass(frozen=True)
class Ratio:
    """Dense time / sparse time: above 1, sparse is faster. Of the 20th percentiles and of the medians."""

    p20: float
    p50: float

    def __str__(self) -> str:
        return f"{self.p20:.2f}x ({self.p50:.2f}x)"

    @classmethod
    def of(cls, dense: Times, sparse: Times) -> Ratio:
        """Return the ratio of two sides."""
        return cls(dense.p20 / sparse.p20, dense.p50 / sparse.p50)


def interleaved(sides: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Return the times of each side: `meprop.timing.interleaved` with at least 9 rounds."""
    return {name: Times.of(spent) for name, spent in timing.interleaved(sides, seconds, least=_LEAST_ROUNDS).items()}


def check_seconds(seconds: float) -> None:
    """Refuse a time to spend that is none.

    Raises:
        ValueError: It is not a positive number; the message names the option.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds must be a positive number, got {seconds}")


@contextmanager
def until_stopped(results: Sequence[object]) -> Generator[None]:
    """Let Ctrl-C end what is measured within it, where there are results to show by then."""
    try:
        yield
    except KeyboardInterrupt:
        if not results:
            raise

"""Student's t on values of seeds: intervals, one-sided tests, and the chance that a test succeeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

# Timings of one machine differ by 1 to 5% from seed to seed in our records. That a few of them lie closer is chance.
LEAST_SPEED_SPREAD = 0.03


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its two-sided 95% interval."""

    value: float
    low: float | None
    """None of one seed, as `high`."""
    high: float | None


@dataclass(frozen=True)
class Sample:
    """Values of seeds, taken as drawn from a normal distribution: those of ratios are logarithms."""

    mean: float
    spread: float
    """The standard deviation; 0 of one seed, of which nothing is shown."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float], least_spread: float = 0.0) -> Sample:
        """Return the sample of values, with a spread of at least `least_spread`."""
        spread = max(stdev(values), least_spread) if len(values) > 1 else 0.0
        return cls(mean(values), spread, len(values))

    @classmethod
    def of_ratios(cls, pairs: Sequence[tuple[float, float]]) -> Sample:
        """Return the sample of the logarithms of ratios of times."""
        return cls.of([math.log(first / second) for first, second in pairs], LEAST_SPEED_SPREAD)

    def estimate(self) -> Estimate:
        """Return the mean with the two-sided 95% interval of Student's t."""
        if self.count == 1:
            return Estimate(self.mean, None, None)
        half = float(_special().stdtrit(self.count - 1, 0.975)) * self.spread / math.sqrt(self.count)
        return Estimate(self.mean, self.mean - half, self.mean + half)

    def ratio(self) -> Estimate:
        """Return the same of logarithms, as ratios."""
        found = self.estimate()
        value, low, high = (None if each is None else math.exp(each) for each in (found.value, found.low, found.high))
        assert value is not None
        return Estimate(value, low, high)

    def p_above(self, bound: float) -> float:
        """Return the p value of the one-sided t test that shows the mean to be above `bound`; 1 of one seed."""
        if self.count == 1 or (self.mean <= bound and self.spread == 0):
            return 1.0
        if self.spread == 0:
            return 0.0
        return float(_special().stdtr(self.count - 1, (bound - self.mean) * math.sqrt(self.count) / self.spread))

    def p_below(self, bound: float) -> float:
        """Return the same for a mean below `bound`."""
        return Sample(-self.mean, self.spread, self.count).p_above(-bound)

    def power_above(self, bound: float, level: float, counts: Any) -> Any:
        """Return the chance that this test succeeds with so many seeds, if mean and spread are those of the sample.

        Args:
            bound: That of `p_above`.
            level: The p value that it has to fall below.
            counts: An integer array of numbers of seeds, each 2 or more.

        Returns:
            A float64 array of the same shape.
        """
        import numpy as np

        special = _special()
        # Beyond 30 the chance is 0 or 1, and so far off the distribution function loses its accuracy.
        far = math.inf if self.mean > bound else -math.inf
        shift = (self.mean - bound) / self.spread if self.spread > 0 else far
        shifts = np.clip(shift * np.sqrt(counts), -30, 30)
        return 1 - special.nctdtr(counts - 1, shifts, special.stdtrit(counts - 1, 1 - level))

    def power_below(self, bound: float, level: float, counts: Any) -> Any:
        """Return the same for a mean below `bound`."""
        return Sample(-self.mean, self.spread, self.count).power_above(-bound, level, counts)


def _special() -> Any:
    """Return scipy's distribution functions. They take a second to import, which only a verdict needs."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return special

"""Whether a rule is worth using: paired statistics over the seeds of a comparison, and one word. docs/compare.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from meprop.training.config import DENSE, MARGIN
from meprop.training.paired import Estimate, Sample
from meprop.training.records import Run

Word = Literal["USE", "TIE", "DON'T", "UNDECIDED"]
Budget = Literal["epochs", "seconds"]

TOLERANCE = 1.03
"""A ratio of times up to this, and from its inverse, counts as equally fast."""
SEEDS_TO_USE = 3
"""Fewer are never USE: two have a spread of one degree of freedom."""
MOST_SEEDS = 100
"""More are not asked for."""
_LEVEL = 0.05  # of each one-sided test of quality
_INTERVAL_LEVEL = 0.025  # of what USE needs beside: a bound of the 95% interval that is shown
_POWER = 0.8
_FAR = math.log(TOLERANCE)
# One seed has no spread to test. No task of our records has a spread over seeds of a third of this loss.
_HOPELESS_MARGINS = 10


@dataclass(frozen=True)
class Verdict:
    """What the runs of a rule show beside the dense runs of the same seeds. Scores are in points, times are ratios.

    A ratio is a geometric mean over seeds of dense's time / the rule's time: above 1, the rule is faster.
    """

    rule: str
    word: Word
    why: str
    """A sentence with the numbers that decide, without its subject, which is the rule, and its full stop."""
    metric: str
    margin: float
    budget: Budget
    seeds: list[int]
    dev: Estimate
    """The rule's score less dense's, after the last epoch."""
    test: Estimate | None
    """The same of the test scores; None if there are none. Nothing is decided on it."""
    p_worse: float
    """Of the one-sided test against a loss of the margin or more; 1 of one seed. Small: quality is not lower."""
    p_better: float
    """Of the one-sided test against a gain of the margin or more. Both small: quality is equivalent."""
    step: Estimate
    """Ratio of the seconds of a step."""
    total: Estimate
    """Ratio of the seconds of all steps. It is that of a step where all runs have the same epochs."""
    target: float
    """The score to reach: the mean of dense's dev scores after the last epoch, less the margin."""
    seconds_to_target: list[float | None]
    """Of each run of the rule in the order of `seeds`: the seconds of training until the end of the first epoch whose
    dev score reaches the target; None if none does."""
    dense_seconds_to_target: list[float | None]
    """The same of the dense runs."""
    to_target: Estimate | None
    """Ratio of these seconds; None unless all runs reach the target."""
    seeds_needed: int | None
    """About how many seeds would decide, if they turn out as these did; None if it is decided, or if not even
    `MOST_SEEDS` would."""


def check_margin(margin: float) -> None:
    """Refuse what is no margin.

    Raises:
        ValueError: It is not positive.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"--margin must be a positive number of points, got {margin}")


def judge_all(runs: Sequence[Run], metric: str, margin: float = MARGIN, budget: Budget = "epochs") -> list[Verdict]:
    """Return the verdict on each rule in the order of `runs`; see `judge`. Without dense runs there is none."""
    by_rule = {rule: [run for run in runs if run.rule == rule] for rule in dict.fromkeys(run.rule for run in runs)}
    dense = by_rule.pop(DENSE, [])
    return [judge(dense, group, metric, margin, budget) for group in by_rule.values()] if dense else []


def judge(
    dense: Sequence[Run], sparse: Sequence[Run], metric: str, margin: float = MARGIN, budget: Budget = "epochs"
) -> Verdict:
    """Return what runs of one rule show beside dense runs, paired by seed.

    Args:
        dense: The dense runs.
        sparse: Those of one rule, of the same seeds.
        metric: The score; higher is better.
        margin: The points of it that do not matter.
        budget: What all runs have had the same of.

    Raises:
        ValueError: The seeds differ, or one is there twice, or none is there; the runs differ in epochs, which are the
            budget; the margin is not positive; `budget` is neither.
    """
    check_margin(margin)
    return _judge_pairs(*_paired(dense, sparse, budget), metric, margin, budget)


def _judge_pairs(dense: list[Run], sparse: list[Run], metric: str, margin: float, budget: Budget) -> Verdict:
    gains = [s.dev[metric] - d.dev[metric] for d, s in zip(dense, sparse, strict=True)]
    tests = [s.test[metric] - d.test[metric] for d, s in zip(dense, sparse, strict=True) if d.test and s.test]
    target = mean(run.dev[metric] for run in dense) - margin
    of_dense, of_sparse = ([_time_to(target, run, metric) for run in runs] for runs in (dense, sparse))
    pairs = [(d, s) for d, s in zip(of_dense, of_sparse, strict=True) if d is not None and s is not None]
    evidence = _Evidence(
        margin,
        budget,
        quality=Sample.of(gains),
        step=_ratios(dense, sparse, lambda run: run.seconds["step"] / (run.steps or run.epochs)),
        to_target=Sample.of_ratios(pairs) if len(pairs) == len(sparse) else None,
        hopeless=max(gains) < -_HOPELESS_MARGINS * margin,
    )
    word = evidence.word()
    needed = evidence.seeds_needed() if word == "UNDECIDED" else None
    is_dense = sparse[0].rule.partition(":")[0] == DENSE
    nothing = "; no layer was sparse" if all(run.density == 1 for run in sparse) and not is_dense else ""
    return Verdict(
        rule=sparse[0].rule,
        word=word,
        why=evidence.why(word, target, metric, needed) + nothing,
        metric=metric,
        margin=margin,
        budget=budget,
        seeds=[run.seed for run in sparse],
        dev=evidence.quality.estimate(),
        test=Sample.of(tests).estimate() if tests else None,
        p_worse=evidence.quality.p_above(-margin),
        p_better=evidence.quality.p_below(margin),
        step=evidence.step.ratio(),
        total=_ratios(dense, sparse, lambda run: run.seconds["step"]).ratio(),
        target=target,
        seconds_to_target=of_sparse,
        dense_seconds_to_target=of_dense,
        to_target=None if evidence.to_target is None else evidence.to_target.ratio(),
        seeds_needed=needed,
    )


def _paired(dense: Sequence[Run], sparse: Sequence[Run], budget: Budget) -> tuple[list[Run], list[Run]]:
    """Return both by ascending seed, or refuse what is no pair of runs for each seed."""
    dense, sparse = (sorted(runs, key=lambda run: run.seed) for runs in (dense, sparse))
    of_dense, of_sparse = [run.seed for run in dense], [run.seed for run in sparse]
    if of_dense != of_sparse or not of_dense or len(set(of_dense)) < len(of_dense):
        raise ValueError(
            f"a comparison is paired by seed, one run of each: got dense runs of the seeds {of_dense} and others of "
            f"{of_sparse}; train what is missing"
        )
    if budget not in ("epochs", "seconds"):
        raise ValueError(f"budget must be 'epochs' or 'seconds', got {budget!r}")
    epochs = sorted({run.epochs for run in (*dense, *sparse)})
    if budget == "epochs" and len(epochs) > 1:
        raise ValueError(f"runs with a budget in epochs have the same epochs, got {epochs}; or give budget='seconds'")
    return dense, sparse


def _time_to(target: float, run: Run, metric: str) -> float | None:
    return next((record["seconds"] for record in run.curve if record["dev"][metric] >= target), None)


def _ratios(dense: Sequence[Run], sparse: Sequence[Run], value: Callable[[Run], float]) -> Sample:
    return Sample.of_ratios([(value(d), value(s)) for d, s in zip(dense, sparse, strict=True)])


@dataclass(frozen=True)
class _Evidence:
    """What a verdict rests on, and the rules by which it does: the tables of docs/compare.md."""

    margin: float
    budget: Budget
    quality: Sample
    step: Sample
    to_target: Sample | None
    hopeless: bool
    """Every seed lost many margins."""

    @property
    def not_worse(self) -> bool:
        return self.quality.p_above(-self.margin) < _LEVEL

    @property
    def equivalent(self) -> bool:
        return self.not_worse and self.quality.p_below(self.margin) < _LEVEL

    @property
    def worse(self) -> bool:
        return self.hopeless or self.quality.p_below(-self.margin) < _LEVEL

    @property
    def better_at_equal_time(self) -> bool:
        return self.budget == "seconds" and self.quality.p_above(self.margin) < _INTERVAL_LEVEL

    @property
    def times(self) -> list[Sample]:
        """The ratios that count; a slow step costs nothing more in a fixed time.

        Where not all reach the target, the whole time alone counts: that to the end, where quality is compared.
        """
        reached = [] if self.to_target is None else [self.to_target]
        return [self.step, *reached] if self.budget == "epochs" else reached

    @property
    def times_to_shorten(self) -> list[Sample]:
        """The ratios that USE needs: that of a step as well, as the time to the target jumps by epochs."""
        return [self.step, *self.times] if self.times and self.budget == "seconds" else self.times

    @property
    def faster(self) -> bool:
        return bool(self.times_to_shorten) and all(map(_shorter, self.times_to_shorten))

    @property
    def slower(self) -> bool:
        return any(time.p_below(-_FAR) < _INTERVAL_LEVEL for time in self.times)

    def word(self) -> Word:
        """Return the verdict."""
        if self.worse:
            return "DON'T"
        if not self.not_worse:
            return "UNDECIDED"
        better = self.better_at_equal_time
        if self.slower and not better:
            return "DON'T"
        if self.faster or better:
            return "USE" if self.quality.count >= SEEDS_TO_USE else "UNDECIDED"
        return "TIE" if self.equivalent and not any(map(_shorter, self.times)) else "UNDECIDED"

    def seeds_needed(self) -> int | None:
        """Return the least number of seeds, above the present one, with a chance of 80% or more of another word."""
        if self.quality.count == 1:
            return SEEDS_TO_USE  # there is no spread to calculate with
        import numpy as np  # here, as in `paired`: the command line can be asked for its version without it

        counts = np.arange(max(SEEDS_TO_USE, self.quality.count + 1), MOST_SEEDS + 1)
        if not len(counts):
            return None
        chances = np.max(list(self.chances(counts).values()), axis=0)
        enough = counts[chances >= _POWER]
        return int(enough[0]) if len(enough) else None

    def chances(self, counts: Any) -> dict[str, Any]:
        """Return the chances of what decides, with so many seeds that turn out as these did.

        Quality and times are taken as independent. The chance of tests together is at least what is returned.
        """
        import numpy as np

        quality, margin, never = self.quality, self.margin, np.zeros(len(counts))
        not_worse = quality.power_above(-margin, _LEVEL, counts)
        equivalent = np.clip(not_worse + quality.power_below(margin, _LEVEL, counts) - 1, 0, 1)
        shorter = [time.power_above(_FAR, _INTERVAL_LEVEL, counts) for time in self.times_to_shorten]
        all_shorter = np.clip(1 - sum(1 - chance for chance in shorter), 0, 1) if shorter else never
        # The step is the first of them. It is none of `times` where the budget is in seconds.
        none_shorter = np.clip(1 - sum(shorter if self.budget == "epochs" else shorter[1:]), 0, 1)
        longer = [time.power_below(-_FAR, _INTERVAL_LEVEL, counts) for time in self.times]
        better = quality.power_above(margin, _INTERVAL_LEVEL, counts) if self.budget == "seconds" else never
        return {
            "worse": quality.power_below(-margin, _LEVEL, counts),
            "slower": not_worse * np.max([never, *longer], axis=0),
            "better": better,
            "faster or a tie": not_worse * all_shorter + equivalent * none_shorter,
        }

    def why(self, word: Word, target: float, metric: str, needed: int | None) -> str:
        """Return the sentence: of a loss, the loss first."""
        count = self.quality.count
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        quality = f"dev {_points(self.quality)} of margin {self.margin:g}"
        if self.to_target is not None:
            time = f"reaches {target:.2f} in {_share(self.to_target)}"
        elif self.budget == "epochs":
            time = f"trains in {_share(self.step)}, and not every run reached {target:.2f}"
        else:
            time = f"does a step in {_share(self.step)}, and not every run reached {target:.2f}"
        if self.better_at_equal_time and word == "USE":
            return f"better in the same time: {quality}; {time}, {seeds}"
        if word == "USE":
            return f"{time}; {quality}, {seeds}"
        if word == "TIE":
            return f"as good as dense and not shown to be faster or slower: {time}; {quality}, {seeds}"
        if self.worse:
            lost = f" ({_HOPELESS_MARGINS} margins and more with each seed)" if self.hopeless else ""
            return f"loses {-self.quality.mean:.2f} points of {metric}{lost}: {quality}; {time}, {seeds}"
        if word == "DON'T":
            step = "" if self.to_target is None else f", a step takes {_share(self.step)}"
            return f"slower: {time}{step}; {quality}, {seeds}"
        return f"{self._doubt()}: {quality}; {time}, {seeds}{_more(needed)}"

    def _doubt(self) -> str:
        if self.quality.count == 1:
            return "one seed cannot tell a difference from chance"
        if not self.not_worse:
            return "a loss beyond the margin is not excluded"
        if self.quality.count < SEEDS_TO_USE:
            return "two seeds are too few to rely on"
        if self.times and _shorter(self.step):
            return "a step is cheaper, but that the target is reached sooner is not shown"
        return "quality is not lower, but no saving of time is shown"


def _shorter(time: Sample) -> bool:
    return time.p_above(_FAR) < _INTERVAL_LEVEL


def _points(sample: Sample) -> str:
    found = sample.estimate()
    return f"{found.value:+.2f}" + ("" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]")


def _share(sample: Sample) -> str:
    """Return the share of dense's time that the rule takes: the inverse of the ratio."""
    found = Sample(-sample.mean, sample.spread, sample.count).ratio()
    interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f} of dense's time{interval}"


def _more(needed: int | None) -> str:
    return "; more seeds would hardly decide" if needed is None else f"; about {needed} would decide"

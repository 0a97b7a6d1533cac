"""The numbers of a page's charts: each chart is drawn from the table that it is shown with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import NamedTuple

from meprop.reporting.look import PHASE_COLORS
from meprop.reporting.page.series import Series
from meprop.training.config import DENSE
from meprop.training.records import Run


class Point(NamedTuple):
    """An epoch of a run, or of the mean of a series."""

    series: int
    """Its place on the page."""
    label: str
    seed: int | str
    kind: str
    """"bold" of the mean, or of the only run; "thin" of the other runs; "running" of those that are not finished."""
    epoch: float
    seconds: float
    score: float
    density: float | None
    """In percent."""


def points(series: Sequence[Series]) -> list[Point]:
    """Return the epochs of all runs; of several seeds their mean too, as far as all of them have come."""
    return [point for place, each in enumerate(series) for point in _points(place, each)]


def _points(place: int, series: Series) -> Iterator[Point]:
    curves = [_curve(place, series, run, "thin" if len(series.runs) > 1 else "bold") for run in series.runs]
    if len(curves) > 1:
        yield from map(_mean, zip(*curves, strict=False))
    for curve in (*curves, *(_curve(place, series, run, "running") for run in series.running)):
        yield from curve


def _curve(place: int, series: Series, run: Run, kind: str) -> list[Point]:
    return [
        Point(
            place,
            series.label,
            run.seed,
            kind,
            record["epoch"],
            record["seconds"],
            record["dev"][series.source.metric],
            _density(run, record.get("density")),
        )
        for record in run.curve
    ]


def _density(run: Run, of_epoch: float | None) -> float | None:
    """Return the density of an epoch; None of dense runs, and of simplified ones whose layers were wider then."""
    density = of_epoch if of_epoch is not None or run.checks else run.density
    return None if density is None or run.rule == DENSE else 100 * density


def _mean(same: Sequence[Point]) -> Point:
    epoch, seconds, score = (mean(each) for each in zip(*(point[4:7] for point in same), strict=True))
    kept = [point.density for point in same if point.density is not None]
    density = mean(kept) if len(kept) == len(same) else None
    return Point(same[0].series, same[0].label, "mean", "bold", epoch, seconds, score, density)


def kept(points: Sequence[Point]) -> dict[str, float | None]:
    """Return the density of each series that has one, by its label: None if it is not the same in all epochs."""
    found: dict[str, set[float]] = {}
    for point in points:
        if point.density is not None and point.seed != "mean":
            found.setdefault(point.label, set()).add(point.density)
    return {label: next(iter(values)) if len(values) == 1 else None for label, values in found.items()}


def described(points: Sequence[Point]) -> str:
    """Return in words where the curves end, for those who do not see them."""
    ends = {point.series: point for point in points if point.kind == "bold"}
    said = [
        f"{end.label} ends at {end.score:.2f} after {end.epoch:g} epochs and {end.seconds:.1f} seconds"
        for end in ends.values()
    ]
    return "; ".join(said) or "no run is finished"


class Parts(NamedTuple):
    """The seconds of the training steps of an epoch, by what they are spent on: means over seeds."""

    series: int
    label: str
    seconds: list[float]
    """Of each of `PHASE_COLORS`."""
    whole: float


def parts(series: Sequence[Series]) -> list[Parts]:
    """Return the parts of the step of each series."""

    def of(runs: Sequence[Run], phase: str) -> float:
        return mean(run.seconds[phase] / run.epochs for run in runs)

    return [
        Parts(place, each.label, [of(each.runs, phase) for phase in PHASE_COLORS], of(each.runs, "step"))
        for place, each in enumerate(series)
        if each.runs
    ]

"""The verdicts of a page, and the numbers that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from meprop.reporting.page.series import Judged, Series
from meprop.training.paired import Estimate
from meprop.training.verdict import Verdict


class Tile(NamedTuple):
    """A number that matters."""

    name: str
    value: str
    about: str


@dataclass(frozen=True)
class Card:
    """A verdict, or what there is of a series without one."""

    series: int
    """Its place on the page."""
    label: str
    word: str
    why: str
    tiles: list[Tile]


def of_verdict(judged: Judged, place: int) -> Card:
    """Return the card of a verdict."""
    found = judged.verdict
    tiles = [_to_target(found), _difference(found), _step(found)]
    return Card(place, judged.series.label, found.word, f"{found.why}.", tiles)


def without_verdict(series: Series, place: int) -> Card:
    """Return the card of a series of finished runs that is not set beside dense."""
    runs, metric, unit = series.runs, series.source.metric, series.source.unit
    why = "There are no dense runs of the same settings and seeds, so that there is no verdict."
    tiles = [
        Tile(f"dev {metric}{unit}", f"{mean(run.dev[metric] for run in runs):.2f}", _seeds(len(runs))),
        Tile("training, s", f"{mean(run.seconds['step'] for run in runs):.1f}", "seconds of all steps"),
        Tile("step, s an epoch", f"{mean(run.seconds['step'] / run.epochs for run in runs):.2f}", "mean of the seeds"),
    ]
    return Card(place, series.label, "", why, tiles)


def _to_target(found: Verdict) -> Tile:
    name = f"Time to {found.target:.2f}"
    if found.to_target is None:
        reached = [sum(each is not None for each in of) for of in (found.seconds_to_target, found.dense_seconds_to_target)]
        count = len(found.seeds)
        return Tile(name, "not reached", f"by {reached[0]} of {_seeds(count)}; dense by {reached[1]} of {count}")
    own, dense = (
        mean(each for each in of if each is not None)
        for of in (found.seconds_to_target, found.dense_seconds_to_target)
    )
    return Tile(name, f"{found.to_target.value:.2f}×", f"{own:.1f} s, dense {dense:.1f} s; {_interval(found.to_target)}")


def _difference(found: Verdict) -> Tile:
    about = f"{_interval(found.dev, '+')}; margin {found.margin:g}"
    if found.test is not None:
        about += f"; test {found.test.value:+.2f}"
    return Tile(f"dev {found.metric}", f"{found.dev.value:+.2f}", about)


def _step(found: Verdict) -> Tile:
    return Tile("Speed of a step", f"{found.step.value:.2f}×", _interval(found.step))


def _interval(found: Estimate, sign: str = "") -> str:
    return "one seed, no interval" if found.low is None else f"95%: {found.low:{sign}.2f} to {found.high:{sign}.2f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"

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
    about: list[str]


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
    return Card(place, judged.series.label, found.word, f"{found.why[0].upper()}{found.why[1:]}.", tiles)


def without_verdict(series: Series, place: int) -> Card:
    """Return the card of a series of finished runs that is not set beside dense."""
    runs, metric = series.runs, series.source.metric
    why = "There are no dense runs of the same settings and seeds, so that there is no verdict."
    tiles = [
        Tile(
            f"Dev {metric}{series.source.unit}",
            f"{mean(run.dev[metric] for run in runs):.2f}",
            ["after the last epoch", _seeds(len(runs))],
        ),
        Tile("Training", f"{mean(run.seconds['step'] for run in runs):.1f} s", ["of all steps"]),
        Tile("Steps of an epoch", f"{mean(run.seconds['step'] / run.epochs for run in runs):.2f} s", []),
    ]
    return Card(place, series.label, "", why, tiles)


def _to_target(found: Verdict) -> Tile:
    name, count = f"Time to {found.target:.2f}", len(found.seeds)
    own, dense = (
        [each for each in of if each is not None] for of in (found.seconds_to_target, found.dense_seconds_to_target)
    )
    if found.to_target is None:
        return Tile(name, f"{len(own)} of {count}", ["runs reach it", f"of dense {len(dense)} of {count}"])
    about = [f"{mean(own):.1f} s, dense {mean(dense):.1f} s", _interval(found.to_target)]
    return Tile(name, f"{found.to_target.value:.2f}x", about)


def _difference(found: Verdict) -> Tile:
    about = [_interval(found.dev, "+"), f"margin {found.margin:g}"]
    if found.test is not None:
        about.append(f"test {found.test.value:+.2f}")
    return Tile(f"Dev {found.metric} against dense", f"{found.dev.value:+.2f}", about)


def _step(found: Verdict) -> Tile:
    return Tile("Speed of a step", f"{found.step.value:.2f}x", [_interval(found.step)])


def _interval(found: Estimate, sign: str = "") -> str:
    return "one seed, no interval" if found.low is None else f"95%: {found.low:{sign}.2f} to {found.high:{sign}.2f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"mean of {count} seeds"

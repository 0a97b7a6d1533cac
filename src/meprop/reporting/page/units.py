"""The units of simplified runs: how many there are after each check, and how often those that are left are selected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from meprop.reporting.page.series import Series
from meprop.training.records import Run

_STEPS = 20  # of the shares of the units for which the activity is shown


class Line(NamedTuple):
    """One set of units of one run."""

    units: int
    """The place of the set among all sets."""
    label: str
    name: str
    """That of the set in the run."""
    run: Run


def lines(series: Sequence[Series]) -> list[Line]:
    """Return the sets of units of all simplified runs that have been checked."""
    runs = [(each, run) for each in series for run in (*each.runs, *each.running) if run.checks]
    several = len({each.label for each, _ in runs}) > 1
    found = [
        (f"{each.label}, layer {name}" if several else f"layer {name}", name, run)
        for each, run in runs
        for name in run.checks[0]["widths"]
    ]
    places = {label: place for place, label in enumerate(dict.fromkeys(label for label, _, _ in found))}
    return [Line(places[label], label, name, run) for label, name, run in found]


class Width(NamedTuple):
    """How wide one set of units is after a check of a simplified run."""

    units: int
    label: str
    seed: int
    step: int
    width: int
    removes: bool
    """Whether units were removed in this cycle."""


def widths(lines: Sequence[Line]) -> list[Width]:
    """Return the widths: the checks at which a width or the kind of cycle changes."""
    return [width for line in lines for width in _changes(*line)]


def _changes(units: int, label: str, name: str, run: Run) -> Iterator[Width]:
    line = [
        Width(units, label, run.seed, check["step"], check["widths"][name], check["prunes"]) for check in run.checks
    ]
    for before, now, after in zip([None, *line], line, [*line[1:], None], strict=False):
        if before is None or after is None or now[4:] != before[4:] or now.removes != after.removes:
            yield now


class Activity(NamedTuple):
    """How often a unit of a simplified run is selected, of those that are left at the last check."""

    units: int
    label: str
    seed: int
    place: float
    """The share of the units that are selected more often, in percent."""
    share: float
    """The share of the examples that select the unit, in percent."""


def activity(lines: Sequence[Line]) -> list[Activity]:
    """Return the activity at 21 places of each set for which it is recorded, the most active unit first."""
    found: list[Activity] = []
    for units, label, name, run in lines:
        shares = sorted((share for share in run.activity.get(name, ()) if share is not None), reverse=True)
        for step in range(_STEPS + 1 if shares else 0):
            share = shares[round(step / _STEPS * (len(shares) - 1))]
            found.append(Activity(units, label, run.seed, 100 * step / _STEPS, 100 * share))
    return found

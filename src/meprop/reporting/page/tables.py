"""The tables of a page: scores, layers, models, and how the results were made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from meprop.names import common_name, folded
from meprop.reporting.page.series import Series
from meprop.reporting.page.sources import Source
from meprop.reporting.pages import short_commit
from meprop.training.records import Run


class Score(NamedTuple):
    """The outcome of a series, after the last epoch."""

    series: int
    label: str
    seeds: str
    epochs: str
    dev: str
    test: str
    seconds: float
    """Of all training steps, mean over seeds."""


def scores(series: Sequence[Series]) -> list[Score]:
    """Return the outcome of each series that has finished runs."""
    return [_score(place, each) for place, each in enumerate(series) if each.runs]


def _score(place: int, series: Series) -> Score:
    runs, metric = series.runs, series.source.metric
    tests = [run.test[metric] for run in runs if metric in run.test]
    epochs = sorted({run.epochs for run in runs})
    return Score(
        place,
        series.label,
        listed([run.seed for run in runs]),
        f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}",
        _spread([run.dev[metric] for run in runs]),
        _spread(tests) if tests else "",
        mean(run.seconds["step"] for run in runs),
    )


def listed(values: Sequence[int]) -> str:
    """Return numbers as a list in words; many consecutive ones as a range."""
    if len(values) > 3 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


class Layers(NamedTuple):
    """Layers of one folded name, kind, shape, rule and state in a series. Of several seeds they are the first's."""

    series: int
    label: str
    name: str
    number: int
    """Of layers."""
    kind: str
    shape: str
    rule: str
    state: str
    density: float | None
    """In percent, mean over the layers; None if it is not known."""
    reason: str


def layers(series: Sequence[Series]) -> list[Layers]:
    """Return the layers of each series that has a report of them."""
    found: list[Layers] = []
    for place, each in enumerate(series):
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for layer in next((run.layers for run in (*each.runs, *each.running) if run.layers), []):
            rule = _rule(layer["rule"])
            key = (
                folded(layer["name"]),
                layer["kind"],
                layer["in_features"],
                layer["out_features"],
                rule,
                layer["status"],
            )
            groups.setdefault(key, []).append(layer)
        found += [_layers(place, each.label, rule, members) for (*_, rule, _), members in groups.items()]
    return found


def _layers(place: int, label: str, rule: str, members: Sequence[Mapping[str, Any]]) -> Layers:
    one = members[0]
    densities = [100 * layer["density"] for layer in members if layer["density"] is not None]
    reasons = dict.fromkeys(layer["reason"] for layer in members)
    more = "" if len(reasons) == 1 else f"; {len(reasons) - 1} of these layers have other reasons"
    return Layers(
        place,
        label,
        common_name([layer["name"] for layer in members]) or "the model",
        len(members),
        one["kind"],
        f"{one['in_features']} → {one['out_features']}",
        rule,
        one["status"],
        mean(densities) if densities else None,
        next(iter(reasons)) + more,
    )


def _rule(options: Mapping[str, Any] | None) -> str:
    given = {} if options is None else {name: value for name, value in options.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {_option(value)}" for name, value in given.items())


def _option(value: Any) -> str:
    return re.sub(r'["{}]', "", json.dumps(value)) if isinstance(value, dict) else str(value)


class Model(NamedTuple):
    """A trained model of `meprop simplify`, as plain layers."""

    label: str
    seed: int
    width: float
    thousands: float
    """Of parameters."""
    steps_ms: tuple[float, float]
    """Of a training step, in the first and in the last epoch."""
    inference_ms: float


def models(sources: Sequence[Source]) -> list[Model]:
    """Return the models of all results that have them."""
    return [
        Model(
            each["rule"],
            each["seed"],
            each["width"],
            each["parameters"] / 1e3,
            (1e3 * each["first_step"], 1e3 * each["last_step"]),
            1e3 * each["inference"]["p20"],
        )
        for source in sources
        for each in source.content.get("models", [])
    ]


class Disturbed(NamedTuple):
    """How much of the processors' time others took while the runs of a series trained, in percent, over its seeds."""

    series: int
    label: str
    host: str
    others: str


def disturbed(series: Sequence[Series]) -> list[Disturbed]:
    """Return the disturbance of each series that has finished runs for which it is known."""

    def over(found: Sequence[Mapping[str, float]], name: str) -> str:
        low, high = (f"{100 * of(each[name] for each in found):.0f}" for of in (min, max))
        return low if low == high else f"{low} to {high}"

    known = [[run.disturbance for run in each.runs if run.disturbance is not None] for each in series]
    return [
        Disturbed(place, each.label, over(found, "stolen"), over(found, "others"))
        for place, (each, found) in enumerate(zip(series, known, strict=True))
        if found
    ]


class Made(NamedTuple):
    """Results that were made by one command, on one machine, with the same versions."""

    facts: list[tuple[str, str]]
    command: str | None
    """That makes them again; None if it is not known."""
    files: list[File]


class File(NamedTuple):
    """The file of a result."""

    place: int
    """That of the result on the page."""
    path: str
    name: str
    """What a download is called."""
    runs: str
    """Which rules and seeds are in it."""


_NAMES = {
    "cpu": "processor",
    "cpu_capability": "instruction set",
    "memory_gib": "memory, GiB",
    "keeps_freed_memory": "freed memory is kept",
}


def made(sources: Sequence[Source]) -> list[Made]:
    """Return how the results were made."""
    groups: dict[str, Made] = {}
    for place, source in enumerate(sources):
        content = source.content
        facts = {
            **content["machine"],
            **content["versions"],
            "commit": short_commit(content.get("commit")).removeprefix("commit "),
        }
        said = [
            (_NAMES.get(name, name.replace("_", " ")), _said(value))
            for name, value in facts.items()
            if value is not None
        ]
        command = source.command
        file = File(place, str(source.path), source.path.name, _runs(source.runs))
        groups.setdefault(json.dumps([said, command]), Made(said, command, [])).files.append(file)
    return list(groups.values())


def _said(value: Any) -> str:
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )


def _runs(runs: Sequence[Run]) -> str:
    """Return which rules and seeds runs are of."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.rule, []).append(run.seed)
    return "; ".join(f"{rule}: {'seed' if len(of) == 1 else 'seeds'} {listed(of)}" for rule, of in seeds.items())

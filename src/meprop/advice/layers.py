"""The layers of a model in groups, and what the backward pass of each group takes, dense and with each rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from statistics import mean
from typing import Any

import torch

from meprop import timing
from meprop.advice.record import GroupAdvice
from meprop.advice.trial import Trial
from meprop.advice.watch import Watch
from meprop.advice.ways import DENSE, FREE, Ways
from meprop.names import common_name, folded
from meprop.report import ConversionReport, LayerReport

__all__ = ["LEAST_GAIN", "groups_of", "reported_layers", "watched"]

LEAST_GAIN = 1.05
"""A gain below this is not one: the next measurement may take it back."""


def reported_layers(ways: Ways) -> dict[str, torch.nn.Module]:
    """The modules that the reports are about, by name."""
    modules = dict(ways.model.named_modules())
    names = {each.name for found in ways.reports.values() for each in found.layers}
    return {name: module for name, module in modules.items() if name in names}


def watched(trial: Trial, ways: Ways, batch: Any) -> Watch:
    """One dense step, with all that can be seen of it."""
    ways.take(DENSE)
    watch = Watch(trial.synchronize)
    with watch.on(reported_layers(ways), count=True):
        trial.step(batch)
    return watch


def groups_of(trial: Trial, ways: Ways, seen: Watch, batch: Any, seconds: float) -> tuple[GroupAdvice, ...]:
    """Groups of layers of the same folded name, kind and shape, each measured in real backward passes.

    Args:
        trial: The model.
        ways: The ways. Each has done a step.
        seen: What was seen of a dense step.
        batch: What to do steps with.
        seconds: The time to spend. There are three rounds in any case.
    """
    times, backward = _times(trial, ways, batch, seconds)
    reports = {name: ways.report(name) for name in ways.rules}
    members: dict[tuple[Any, ...], list[LayerReport]] = {}
    for each in ways.reports[next(iter(ways.rules))].layers:
        used = each.name in seen.seconds
        key = (folded(each.name), each.kind, each.in_features, each.out_features, each.name in ways.layers, used)
        members.setdefault(key, []).append(each)
    return tuple(_group(ways, layers, seen, times, backward, reports) for layers in members.values())


_Times = Mapping[str, Mapping[str, float]]


def _times(trial: Trial, ways: Ways, batch: Any, seconds: float) -> tuple[_Times, float]:
    """The seconds of each layer's backward pass, by way and name, and those of the whole dense backward pass."""
    layers = reported_layers(ways)
    spent: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in ways.names if name != FREE}

    def run(name: str) -> None:
        ways.take(name)
        watch = Watch(trial.synchronize)
        with watch.on(layers):
            phases = trial.step(batch)
        spent[name].append((phases.backward, watch.seconds))

    timing.interleaved({name: partial(run, name) for name in spent}, seconds, least=3)
    ways.take(DENSE)
    fastest = {way: sorted(of, key=lambda each: each[0])[: max(1, 2 * len(of) // 5)] for way, of in spent.items()}
    times = {
        way: {name: mean(seconds.get(name, 0.0) for _, seconds in of) for name in of[0][1]}
        for way, of in fastest.items()
    }
    return times, mean(backward for backward, _ in fastest[DENSE])


def _group(
    ways: Ways,
    layers: Sequence[LayerReport],
    seen: Watch,
    times: _Times,
    backward: float,
    reports: Mapping[str, ConversionReport],
) -> GroupAdvice:
    one, names = layers[0], tuple(each.name for each in layers)
    dense = sum(times[DENSE].get(each, 0.0) for each in names)
    sparse: dict[str, float] = {}
    kept: dict[str, float] = {}
    for way, found in reports.items():
        now = [each for each in found.layers if each.name in names and each.status == "sparse"]
        if now:
            sparse[way] = sum(times[way].get(each, 0.0) for each in names)
            kept[way] = sum(each.density for each in now) / len(now)
    fastest = min(sparse, key=lambda way: sparse[way]) if sparse and dense else None
    best = None if fastest is None else ways.rules[fastest]
    gain = None if fastest is None else dense / sparse[fastest]
    share = None if fastest is None or isnan(kept[fastest]) else kept[fastest]
    return GroupAdvice(
        common_name(names),
        names,
        one.kind,
        one.in_features,
        one.out_features,
        seen.outputs[one.name] // one.out_features if one.name in seen.outputs else None,
        dense / backward if dense else None,
        best,
        gain,
        share,
        _why(ways, one, seen, gain, share),
    )


def _why(ways: Ways, layer: LayerReport, seen: Watch, gain: float | None, kept: float | None) -> str:
    """Why a layer is best left dense, and what would change that. Empty if a rule is faster."""
    if layer.name not in ways.layers:
        reason = "gives the model's outputs" if layer.name == ways.output else layer.reason
        return f"{reason}; lower min_features if it is not the output" if reason.startswith("narrow") else reason
    if layer.name not in seen.outputs:
        return "the loss does not call it"
    if layer.name not in seen.seconds:
        return "no gradient reaches it"
    if gain is not None and gain >= LEAST_GAIN:
        return ""
    if kept is not None and kept > 0.3:
        return f"its gradient has no few large entries: {kept:.0%} kept; more noise, or later in training"
    frozen = not any(each.requires_grad for each in ways.layers[layer.name].parameters())
    less = ", and its weight is frozen, which saves half of the work" if frozen else ""
    return f"no rule is faster here{less}; a larger batch or a wider layer would change that"

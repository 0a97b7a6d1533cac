"""The layers of a model in groups, and what the backward pass of each group takes, dense and with each rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from meprop import timing
from meprop.advice.record import GroupAdvice
from meprop.advice.trial import Trial
from meprop.advice.ways import DENSE, Ways
from meprop.convert import LayerReport
from meprop.nn.base import SparseLayer
from meprop.recording import Call, backward_of, recorded
from meprop.rules import Rule

__all__ = ["LEAST_GAIN", "folded", "groups_of", "record_calls"]

LEAST_GAIN = 1.05
"""A gain below this is not one: the next measurement may take it back."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def folded(name: str) -> str:
    """The name of a layer with a star for each number of a part of a list: layers.0.mlp.up is layers.*.mlp.up."""
    return _NUMBER.sub("*", name)


def record_calls(trial: Trial, ways: Ways, batch: Any) -> dict[str, list[Call]]:
    """What each reported layer gets from one batch, by its name."""
    ways.take(DENSE)
    modules = dict(trial.model.named_modules())
    names = {each.name for found in ways.reports.values() for each in found.layers}
    with recorded({name: modules[name] for name in names if name in modules}) as calls:
        trial.loss_of(batch).backward()
    trial.model.zero_grad()
    return calls


def groups_of(
    trial: Trial, ways: Ways, calls: Mapping[str, Sequence[Call]], backward: float, seconds: float
) -> tuple[GroupAdvice, ...]:
    """Groups of layers of the same folded name, kind and shape, each measured on one layer's calls.

    Args:
        trial: The model.
        ways: The ways.
        calls: What the layers got.
        backward: The seconds of the whole dense backward pass.
        seconds: The time to spend.
    """
    first = next(iter(ways.reports.values()))
    members: dict[tuple[Any, ...], list[LayerReport]] = {}
    for each in first.layers:
        used = any(call.grads for call in calls.get(each.name, ()))
        key = (folded(each.name), each.kind, each.in_features, each.out_features, each.name in ways.layers, used)
        members.setdefault(key, []).append(each)
    slice_ = seconds / len(members) if members else 0.0
    groups = [_group(trial, ways, layers, calls, backward, slice_) for layers in members.values()]
    return tuple(groups)


def _group(
    trial: Trial,
    ways: Ways,
    layers: Sequence[LayerReport],
    calls: Mapping[str, Sequence[Call]],
    backward: float,
    seconds: float,
) -> GroupAdvice:
    one = layers[0]
    name = one.name if len(layers) == 1 else folded(one.name)
    with_gradient = [call for call in calls.get(one.name, ()) if call.grads]
    share, best, gain, kept = None, None, None, None
    module = dict(trial.model.named_modules()).get(one.name)
    if with_gradient and module is not None:
        dense, of_rules, kept_by = _times(trial, ways, one.name, module, with_gradient, seconds)
        share = dense * len(layers) / backward
        if of_rules:
            fastest = min(of_rules, key=lambda way: of_rules[way])
            best, gain, kept = ways.rules[fastest], dense / of_rules[fastest], kept_by[fastest]
    rows = with_gradient[0].rows if with_gradient else None
    why = _why(ways, one, module, calls.get(one.name, ()), gain, kept, rows)
    names = tuple(each.name for each in layers)
    return GroupAdvice(name, names, one.kind, one.in_features, one.out_features, rows, share, best, gain, kept, why)


def _times(
    trial: Trial, ways: Ways, name: str, module: torch.nn.Module, calls: Sequence[Call], seconds: float
) -> tuple[float, dict[str, float], dict[str, float | None]]:
    """The seconds of a layer's backward pass: dense, and with each rule that takes it; and what each rule kept."""
    ways.take(DENSE)
    sides: dict[str, Callable[[], object]] = {DENSE: backward_of(module, calls)}
    records: dict[str, Any] = {}
    for way in ways.rules if name in ways.layers else ():
        with ways.always(way, module) as is_sparse:
            if is_sparse and isinstance(module, SparseLayer):
                sides[way] = backward_of(module, calls)  # the graph keeps the policy
                records[way] = module.policy
    spent = timing.interleaved(sides, seconds, least=5, most=200, synchronize=trial.synchronize)
    times = {way: sorted(each)[len(each) // 5] for way, each in spent.items()}
    kept = {way: _kept(policy.record.density, policy.rule, module, ways) for way, policy in records.items()}
    return times.pop(DENSE), times, kept


def _kept(density: float | None, rule: Rule, module: torch.nn.Module, ways: Ways) -> float | None:
    return rule.density(ways.width(module)) if density is None else density


def _why(
    ways: Ways,
    layer: LayerReport,
    module: torch.nn.Module | None,
    calls: Sequence[Call],
    gain: float | None,
    kept: float | None,
    rows: int | None,
) -> str:
    """Why a layer is best left dense, and what would change that. Empty if a rule is faster."""
    if not calls and module is not None and not _is_part(layer):
        return "the loss does not call it"
    if calls and not any(call.grads for call in calls):
        return "no gradient reaches it"
    if layer.name not in ways.layers:
        return _with_remedy(layer, "gives the model's outputs" if layer.name == ways.output else layer.reason)
    if gain is None or gain >= LEAST_GAIN:
        return ""
    if kept is not None and kept > 0.3:
        return f"its gradient has no few large entries: {kept:.0%} kept; more noise, or later in training"
    frozen = module is not None and not any(each.requires_grad for each in module.parameters())
    less = "; its weight is frozen, so that half of the work is not there" if frozen else ""
    return f"too small for a gain at {rows} rows{less}; a larger batch or a wider layer would change that"


def _is_part(layer: LayerReport) -> bool:
    """Whether it is a weight without a layer, or a module that is called through another one."""
    return "sparse backward pass for" in layer.reason


def _with_remedy(layer: LayerReport, reason: str) -> str:
    if reason.startswith("narrow"):
        return f"{reason}; lower min_features if it is not the output"
    return reason

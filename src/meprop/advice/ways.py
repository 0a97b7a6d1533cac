"""The ways of doing a step with one model: dense, with each rule, and with a backward pass that costs nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch

from meprop import timing
from meprop.advice.free import free_backward
from meprop.advice.trial import Phases, Trial
from meprop.convert import Filter, convert, revert
from meprop.errors import NoEffectWarning
from meprop.nn.base import Descriptor, SparseLayer, become, described_layers
from meprop.policy import Policy
from meprop.report import ConversionReport, likely_output, report
from meprop.rules import Rule

__all__ = ["DENSE", "FREE", "Ways", "steps_in_turns", "typical"]

DENSE, FREE = "dense", "free"


class Ways:
    """One model that is made dense, sparse by each of several rules, or free, in turns. Parameters stay the same.

    Args:
        model: A model of torch's own layers, all of which have their shapes.
        rules: The rules.
        filter: As of `meprop.convert`. None leaves a layer dense that seems to give the model's outputs.
        min_features: As of `meprop.convert`.

    Attributes:
        names: The names of the ways: DENSE, FREE, and those of the rules, in their order.
        reports: What `meprop.convert` says of each rule, by its name.
        layers: The layers that a rule takes, by their names in the model.
        output: The name of the layer that seems to give the outputs, if `filter` was None, and a rule would take it.
        chosen: The code of the filter that was used. Empty without one.
    """

    def __init__(self, model: torch.nn.Module, rules: Sequence[Rule], filter: Filter | None, min_features: int) -> None:
        self.model, self.rules = model, {f"rule {number}": rule for number, rule in enumerate(rules)}
        self.names = (DENSE, FREE, *self.rules)
        self._descriptors: dict[torch.nn.Module, Descriptor[Any]] = {}
        self._policies: dict[str, dict[torch.nn.Module, Policy]] = {}
        self._own_forward: dict[torch.nn.Module, Any] = {}
        self.reports: dict[str, ConversionReport] = {}
        self.output: str | None = None
        described = described_layers(model)
        self._descriptors.update((layer, descriptor) for _, layer, descriptor in described)
        self.layers: dict[str, torch.nn.Module] = {}
        for name, rule in self.rules.items():
            found = _quietly(model, rule, filter, min_features)
            last = None if filter is not None else likely_output(found.layers)
            if last is not None and last.name:
                self.output = last.name
                revert(model)
                found = _quietly(model, rule, partial(_is_other, last.name), min_features)
            self.reports[name] = found
            self._policies[name] = {layer: layer.policy for _, layer, _ in described if isinstance(layer, SparseLayer)}
            sparse = {each.name for each in found.layers if each.status == "sparse"}
            self.layers.update({place: layer for place, layer, _ in described if place in sparse})
            revert(model)
        self.chosen = "" if self.output is None else f"lambda name, _: name != {self.output!r}"
        if filter is not None:
            self.chosen = getattr(filter, "__name__", "filter").replace("<lambda>", "filter")

    def take(self, name: str) -> None:
        """Lets the model work in one of the ways."""
        for layer, descriptor in self._descriptors.items():
            if isinstance(layer, SparseLayer):
                del vars(layer)["policy"]
                become(layer, descriptor.plain)
        for layer, forward in self._own_forward.items():
            vars(layer).pop("forward")
            if forward is not None:
                vars(layer)["forward"] = forward
        self._own_forward.clear()
        for layer in self.layers.values() if name == FREE else ():
            self._own_forward[layer] = vars(layer).get("forward")
            vars(layer)["forward"] = free_backward(layer.forward)
        for layer, policy in self._policies.get(name, {}).items():
            vars(layer)["policy"] = policy
            become(layer, self._descriptors[layer].sparse)

    def report(self, name: str) -> ConversionReport:
        """What has happened with a rule so far."""
        self.take(name)
        return report(self.model)


def _is_other(output: str, name: str, _layer: torch.nn.Module) -> bool:
    return name != output


def _quietly(model: torch.nn.Module, rule: Rule, filter: Filter | None, min_features: int) -> ConversionReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # without compiled kernels; the advice says so
        return convert(model, rule, filter=filter, min_features=min_features)


def steps_in_turns(trial: Trial, ways: Ways, batches: Sequence[Any], seconds: float) -> dict[str, list[list[Phases]]]:
    """Times whole steps of all ways in turns.

    Args:
        trial: The model and the optimizer, whose learning rate is 0.
        ways: The ways.
        batches: The batches. All ways of a round have the same one, and the rounds take them in turns.
        seconds: The time to spend. There are five rounds in any case.

    Returns:
        The times of each way's steps, by batch.
    """
    calls = dict.fromkeys(ways.names, 0)
    phases: dict[str, list[list[Phases]]] = {name: [[] for _ in batches] for name in ways.names}

    def run(name: str) -> None:
        ways.take(name)
        at = calls[name] % len(batches)
        phases[name][at].append(trial.step(batches[at]))
        calls[name] += 1

    for name in ways.names:  # a layer measures in its first step, and memory is allocated
        run(name)
        phases[name][0].clear()
    sides = {name: partial(run, name) for name in ways.names}
    timing.interleaved(sides, seconds, least=max(5, len(batches)))
    ways.take(DENSE)
    return phases


def typical(phases: Sequence[Sequence[Phases]]) -> Phases:
    """The seconds of the parts of a step: of the fastest two fifths of each batch's steps, as what disturbs only adds.

    It is the mean over these, and then over the batches. So the parts add up to the step.
    """
    fastest = [sorted(of, key=lambda each: each.step)[: max(1, 2 * len(of) // 5)] for of in phases]
    means = [[mean(part) for part in zip(*of, strict=True)] for of in fastest]
    return Phases(*(mean(part) for part in zip(*means, strict=True)))

"""What `meprop.advise` returns: plain data, as a table, as HTML, as a dict and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import Any

from meprop.advice.gradients import Agreement
from meprop.rules import Rule

__all__ = ["Advice", "GroupAdvice", "Part", "RuleAdvice"]


@dataclass(frozen=True)
class Part:
    """A part of the dense step.

    Attributes:
        name: What it is.
        ms: Its time in milliseconds.
        share: Its share of the step.
        within: Whether it is part of the one before, and counted there.
    """

    name: str
    ms: float
    share: float
    within: bool = False


@dataclass(frozen=True)
class RuleAdvice:
    """What one rule does to the step and to the gradient.

    Attributes:
        rule: The rule.
        step_ms: The time of the whole step in milliseconds.
        speedup: Dense / sparse, of the whole step.
        kept: The share of the output gradients that it kept, of the layers that are sparse. None if none is.
        sparse_layers: How many layers are sparse, after each has measured.
        unbiased: Whether it adds only noise to the gradient.
        weights: How its gradients of the weights agree with the dense ones. None if no layer is sparse.
        first: The same of the gradient that reaches the output of the first layer.
        of_noise: The error of the weights' gradients, as a multiple of the noise of a batch. None with one batch.
    """

    rule: Rule
    step_ms: float
    speedup: float
    kept: float | None
    sparse_layers: int
    unbiased: bool
    weights: Agreement | None
    first: Agreement | None
    of_noise: float | None


@dataclass(frozen=True)
class GroupAdvice:
    """Layers of the same folded name, kind and shape.

    Attributes:
        name: Their name, with a star where they differ, e.g. "layers.*.mlp.up".
        layers: The names of the layers.
        kind: The plain class's name.
        in_features: I.
        out_features: O.
        rows: N, the rows of an output. None if the loss does not call the layers.
        share: The share of the dense backward pass that all of them take. None if it could not be measured.
        best_rule: The fastest rule. None if no rule takes the layers.
        gain: Dense / sparse, of the backward pass of these layers, with the fastest rule.
        kept: The share of the output gradient that this rule kept.
        why: Why the layers are best left dense, and what would change that. Empty if the rule is faster.
    """

    name: str
    layers: tuple[str, ...]
    kind: str
    in_features: int
    out_features: int
    rows: int | None
    share: float | None
    best_rule: Rule | None
    gain: float | None
    kept: float | None
    why: str


@dataclass(frozen=True)
class Advice:
    """Whether meprop helps a model, and how. `print(advice)` is a table; notebooks show it as HTML.

    Attributes:
        line: The line of code to try. Empty if the model is best left dense.
        verdict: What to do and why, in one sentence.
        predicted: Dense / sparse, of the whole step, that the line gives. 1.0 without a line.
        bound: Dense / free, of the whole step: what no rule can pass. In the free step the backward products of all
            layers that a rule takes cost nothing. A rule that was measured faster is the bound itself.
        step_ms: The time of the dense step in milliseconds, without loading data.
        parts: The parts of the dense step.
        rules: The rules that were tried.
        noise: The noise of a batch's gradient of the weights. None with one batch.
        groups: The layers.
        notes: What may go wrong, a sentence each.
        state: At which state of training the gradients were measured.
        measured: On how many batches, for how long, and on how many threads.
    """

    line: str
    verdict: str
    predicted: float
    bound: float
    step_ms: float
    parts: tuple[Part, ...]
    rules: tuple[RuleAdvice, ...]
    noise: Agreement | None
    groups: tuple[GroupAdvice, ...]
    notes: tuple[str, ...]
    state: str
    measured: str

    def __str__(self) -> str:
        from meprop.advice import text

        return text.plain(self)

    def _repr_html_(self) -> str:
        from meprop.advice import text

        return text.html(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data. A rule is its text, and a number that is not finite is None."""
        return _plain(self)

    def to_json(self) -> str:
        """The dict as JSON."""
        return json.dumps(self.to_dict(), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Rule):
        return repr(value)
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value

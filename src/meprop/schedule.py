"""A schedule of rules, in the manner of torch's schedules of learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch

from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.nn.base import SparseLayer, described_layers, layer_descriptor
from meprop.policy import Policy
from meprop.rules import Rule, TopK
from meprop.rules.base import checked_share

__all__ = ["RuleAt", "RuleSchedule", "anneal"]

RuleAt = Callable[[int, Rule], Rule | None]
"""From the number of steps that are done and the rule that a layer was converted with to the rule of the next step.

None means that the step is dense.
"""

DENSE = TopK(1.0, scope="batch")
"""The rule of a dense phase. A layer that keeps everything is torch's own, bit for bit."""


class RuleSchedule:
    """Changes the rules of a converted model while it trains: a dense warm-up, an annealed budget, a dense end.

    Like `torch.optim.lr_scheduler.LambdaLR` it has a function of the number of steps. The function is called for each
    converted layer, so that layers with different rules go on with rules of their own. Each layer keeps its options
    and its record. In a dense phase a layer is torch's own, at torch's cost.

    A layer with ``when="auto"`` measures in its first pass that is not dense, once. It measures the rule that it was
    converted with, whatever the schedule makes of that. It keeps the decision through all phases.

    Only layers that are converted when the schedule is made take part. A layer that is then converted anew, or gets
    another `rule`, goes on from its new rule. A layer that is reverted takes part no longer.

    Under torch.compile each different rule is compiled once. After 8 of them torch runs the model eagerly, and with
    fullgraph=True it raises an error. So let rules change in few stages there. A `meprop.Simplifier` counts in a dense
    phase that each unit is selected.

    Args:
        model: A model that `meprop.convert` has converted. It may be wrapped by now.
        rule_at: The function. It gets the number of steps that are done, which is 0 for the first one, and the rule
            that a layer was converted with. It returns the rule of the next step, or None for a dense one.

    Attributes:
        steps: The number of steps so far.

    Raises:
        TypeError: `model` is not a module, `rule_at` cannot be called, or it returns something else than a rule or
            None.
        NotSupportedError: It returns a rule that a layer cannot have. No layer is changed then.
        ValueError: The same, of a layer with row-sparse gradients.

    Warns:
        NoEffectWarning: No layer is converted.

    Example:
        >>> import torch, meprop
        >>> model = torch.nn.Linear(8, 200)
        >>> report = meprop.convert(model, meprop.Sampled(noise=0.25), when="always")
        >>> schedule = meprop.RuleSchedule(model, lambda step, rule: rule if 2 <= step < 8 else None)
        >>> sparse = []
        >>> for _ in range(10):  # and in each step forward pass, backward pass and optimizer.step()
        ...     sparse.append(meprop.report(model).layers[0].status == "sparse")
        ...     schedule.step()
        >>> sparse
        [False, False, True, True, True, True, True, True, False, False]
    """

    def __init__(self, model: torch.nn.Module, rule_at: RuleAt) -> None:
        if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
        if not callable(rule_at):
            raise TypeError(
                f"rule_at={rule_at!r} is of type {type(rule_at).__name__}; it is a function of step and rule, such as "
                "lambda step, rule: None if step < 500 else rule"
            )
        self._layers = {name: layer for name, layer, _ in described_layers(model) if isinstance(layer, SparseLayer)}
        if not self._layers:
            message = "a schedule of a model without converted layers changes nothing; call meprop.convert before"
            warnings.warn(message, NoEffectWarning, stacklevel=2)
        self._rule_at = rule_at
        self._go_to(0)

    def step(self) -> None:
        """Is to be called after each step of the optimizer. It gives the layers their rules for the next step.

        Raises:
            TypeError, NotSupportedError or ValueError: See above.
        """
        self._go_to(self.steps + 1)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Gives the layers within a `with` statement the rules that they were converted with, e.g. for a report."""
        now = {layer: layer.policy for layer in self._sparse_layers().values()}
        for layer, policy in now.items():
            layer.policy = replace(policy, rule=policy.own_rule or policy.rule)
        try:
            yield
        finally:
            for layer, policy in now.items():
                layer.policy = policy

    def state_dict(self) -> dict[str, Any]:
        """The number of steps. The function and the layers' rules are not part of it."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with a function and a model like those of then.

        Raises:
            ValueError: The state is not one of a schedule.
            TypeError or NotSupportedError: See above.
        """
        steps = state.get("steps") if isinstance(state, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"the state is {state!r}; it is that of a RuleSchedule, such as {{'steps': 500}}")
        self._go_to(steps)

    def _sparse_layers(self) -> dict[str, SparseLayer]:
        """Those that are still converted, by name."""
        return {name: layer for name, layer in self._layers.items() if isinstance(layer, SparseLayer)}  # pyright: ignore[reportUnnecessaryIsInstance]

    def _go_to(self, steps: int) -> None:
        layers = self._sparse_layers()
        policies = [self._policy(steps, name, layer) for name, layer in layers.items()]
        for layer, policy in zip(layers.values(), policies, strict=True):
            layer.policy = policy
        self.steps = steps

    def _policy(self, steps: int, name: str, layer: SparseLayer) -> Policy:
        """The policy of a layer after so many steps. It is the same object if nothing changes."""
        now = layer.policy
        own = now.own_rule or now.rule
        rule = self._rule_at(steps, own)
        if rule is None:
            rule = DENSE
        elif not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"rule_at({steps}, {own}) is {rule!r}, of type {type(rule).__name__}; it is a rule, or None for a "
                "dense step"
            )
        if now.own_rule is not None and rule == now.rule:
            return now
        policy = replace(now, rule=rule, own_rule=own)
        module = cast("torch.nn.Module", layer)
        if (reason := layer_descriptor(module).why_dense(module, policy)) is not None:
            raise NotSupportedError(
                f"rule_at({steps}, {own}) is {rule}, which layer {name!r} cannot have: {reason}. Give it another, or "
                "None for a dense step"
            )
        return policy


def anneal(start: float, end: float, share: float) -> float:
    """What is between start and end at a share of the way, geometrically: each step multiplies by the same number.

    Args:
        start: The number at share 0, and before.
        end: The number at share 1, and after. If both are ints, as counts are, the result is rounded to an int.
        share: The share of the way, such as ``step / 1000``.

    Raises:
        ValueError: start or end is not a finite number above 0, or share is NaN.
        TypeError: One of them is not a number.

    Example:
        >>> [anneal(0.05, 0.5, step / 2) for step in range(4)]
        [0.05, 0.15811388300841897, 0.5, 0.5]
        >>> anneal(200, 50, 0.5)
        100
    """
    first, last = checked_share("start", start, below_one=False), checked_share("end", end, below_one=False)
    if math.isnan(share):
        raise ValueError(f"share={share!r}; it is a share of the way from start to end, such as step / 1000")
    part = min(max(share, 0.0), 1.0)
    found = first ** (1 - part) * last**part
    return round(found) if isinstance(start, int) and isinstance(end, int) else found

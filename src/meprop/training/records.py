"""What a training run leaves behind: its seconds, its epochs, its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Seconds:
    """Seconds of training, summed over the steps; waiting for data and evaluation are in none of them."""

    forward: float = 0.0
    """The model and the loss."""
    backward: float = 0.0
    """All gradients, the selection included."""
    optimizer: float = 0.0
    """The update, clearing the gradients, and simplifying."""
    step: float = 0.0
    """The whole step: the three together."""


@dataclass(frozen=True)
class EpochRecord:
    """What is known at the end of an epoch, which is a share of the seconds if those are the budget."""

    epoch: int
    loss: float
    """Mean training loss over the epoch's batches. Without any, as where a step takes more than a share of the seconds,
    it is that of the epoch before."""
    dev: dict[str, float]
    test: dict[str, float]
    seconds: float
    """Seconds of training steps so far."""
    widths: dict[str, int] = field(default_factory=dict[str, int])
    """Units of each set of the model, if it is simplified."""
    density: float | None = None
    """The share of the entries that was propagated in this epoch's sparse steps, if that depends on the gradient."""
    live: dict[str, float] = field(default_factory=dict[str, float])
    """What `training.live.Live` read, if live curves were asked for."""


@dataclass(frozen=True)
class Run:
    """The outcome of one run: an element of `runs` in result.json. Metrics are those after the last epoch."""

    rule: str
    """`"dense"`, the name of the rule with what is special to the run, or `"simplified"`."""
    seed: int
    epochs: int
    dev: dict[str, float]
    test: dict[str, float]
    seconds: dict[str, float]
    k: int | float | None
    """The rule's; None if dense, or if the gradient decides."""
    density: float | None
    """The share of the entries that is propagated, over the output gradients of the sparse layers, dense steps of a
    schedule included. It is 1 if there are no such layers, and None if it depends on the gradient."""
    curve: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`EpochRecord` of each epoch."""
    layers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The conversion report's records; empty if dense."""
    steps: int | None = None
    """Of training. None in records of earlier versions."""
    checks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`meprop.pruning.Check` of each check, with the widths; empty if not simplified."""
    activity: dict[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    """`meprop.Simplifier.activity`: of each set of units the shares of the examples before the last check. Empty if not
    simplified, and in records of earlier versions."""
    disturbance: dict[str, float] | None = None
    """`meprop.disturbance.Disturbance` while it was trained and evaluated. None where the system does not tell, and in
    records of earlier versions."""

    def selected(self, metric: str) -> EpochRecord:
        """Return the epoch with the best dev score, the first of equals: what the paper reports.

        Of a simplified run, among those in which the model had its last widths: an earlier one is not what it became.
        """
        records = [EpochRecord(**record) for record in self.curve]
        return max((each for each in records if each.widths == records[-1].widths), key=lambda each: each.dev[metric])


def plain_activity(activity: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Return `meprop.Simplifier.activity` as plain data, to 4 digits: None for NaN, which JSON has not."""
    return {
        label: [None if isnan(share) else round(share, 4) for share in shares.tolist()]
        for label, shares in activity.items()
    }

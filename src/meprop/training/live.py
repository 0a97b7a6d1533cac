"""The numbers of a run that are shown while it trains, beside its losses and metrics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import nn

from meprop.meter import Meter
from meprop.training.records import Seconds


class Live:
    """What the model keeps of its gradients in each epoch, and what a step takes.

    After a resume within an epoch, that epoch's numbers are those of the steps since then.

    Args:
        model: Of the run.
        seconds: Of training so far.
    """

    def __init__(self, model: nn.Module, seconds: Seconds) -> None:
        self._meter = Meter(model)
        self._begin(seconds)

    def _begin(self, seconds: Seconds) -> None:
        self._before, self._steps = replace(seconds), 0

    def step(self) -> AbstractContextManager[None]:
        """Return a context for the backward pass of a step. The first one of an epoch measures the energy."""
        self._steps += 1
        return self._meter.measuring() if self._steps == 1 else nullcontext()

    def read(self, seconds: Seconds) -> dict[str, float]:
        """Return the numbers of the epoch that ends: those of `meprop.Meter`, and milliseconds of a step by part."""
        found = self._meter.read()
        for part in ("forward", "backward", "optimizer") if self._steps else ():
            took = getattr(seconds, part) - getattr(self._before, part)
            found[f"milliseconds/{part}"] = 1000 * took / self._steps
        self._begin(seconds)
        return found

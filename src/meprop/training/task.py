"""What the training loop needs to know of a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """What the loop needs to know of a task; `meprop.tasks` holds the tasks."""

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        ...

    @property
    def metric(self) -> str:
        """The quality to compare by: a key of what `evaluate` returns, in percent, the higher the better."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data, wherever they lie: two runs with different ones are not to be compared."""
        ...

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        """Arguments that the model can be called with, of the ranks that it is trained with; on the CPU."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """How many batches `train_batches` yields."""
        ...

    def build_model(self) -> nn.Module:
        """Return a dense model, initialised from torch's global random state."""
        ...

    def train_batches(self, generator: torch.Generator) -> Iterable[Any]:
        """Return one epoch's batches (tensors, or tuples of them), in an order drawn from `generator` alone."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of a batch."""
        ...

    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Return the metrics of a split, without touching the random state."""
        ...

"""`meprop advise`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

import meprop
from meprop.cli.commands import HELP
from meprop.cli.common import TaskConfig, threads, with_tasks
from meprop.training import tasks
from meprop.training.tasks import TaskEntry


@dataclass(frozen=True)
class Advise(Generic[TaskConfig]):
    """`meprop advise` with its options."""

    task: TaskConfig
    seconds: float = 40.0
    """Seconds to spend. It takes longer if steps are slow."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""
    threads: int = 0
    """Threads to measure with; 0: torch's own choice."""
    json: bool = False
    """Print the advice as JSON."""

    def run(self) -> None:
        """Measure, and print the advice."""
        from meprop.training.loop import Trainer

        entry = tasks.entry_of(self.task)
        # What a file of the user's prints is no part of the JSON.
        with threads(self.threads), redirect_stdout(sys.stderr if self.json else sys.stdout):
            run = Trainer(entry.build(self.task), entry.training, None, self.seed)

            def loss(model: torch.nn.Module, batch: Any) -> Tensor:
                return run.setup.loss(model, run.to_device(batch))

            advice = meprop.advise(run.model, run.setup.batches, loss, optimizer=run.optimizer, seconds=self.seconds)
        print(advice.to_json() if self.json else advice)


def options() -> Any:
    """Return the type that `tyro` reads the options from."""

    def default(_name: str, entry: TaskEntry) -> Any:
        return Advise(entry.config())

    return with_tasks(HELP["advise"], lambda entry: Advise[entry.config], default, tasks.with_script())

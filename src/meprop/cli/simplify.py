"""`meprop simplify`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch

from meprop import machine
from meprop.bench.measure import check_seconds
from meprop.cli.common import Command, RuleName, TaskConfig, rule_choice, with_tasks
from meprop.cli.train import train_in_turns
from meprop.training import tasks, tracking
from meprop.training.config import DEFAULT_RULE, SimplifyConfig, TrainingConfig
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.tasks import TaskEntry

_K = 160  # that of the paper's code


@dataclass(frozen=True)
class Simplify(Generic[TaskConfig, RuleName]):
    """Train dense, sparse (meProp), and sparse and simplified (meSimp), side by side; and time the models then."""

    task: TaskConfig
    training: TrainingConfig
    simplify: SimplifyConfig
    out: Path
    """Folder for result.json and the pictures curves.png, widths.png and activity.png. It also gets the simplified
    models, each as a plain torch module, such as compact-seed0.pt."""
    rule: RuleName
    seconds: float = 2.0
    """Seconds to spend on timing inference, for each seed."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train, measure, and write and show the result."""
        from rich.console import Console

        from meprop.reporting import figures, terminal
        from meprop.reporting import simplify as report

        check_seconds(self.seconds)
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        tracking.claim_folder(self.out, overwrite=self.overwrite)
        rule = self.training.rule(self.rule)
        runs: list[Run] = []
        models: list[report.ModelRecord] = []
        starts: dict[str, int] = {}
        for seed in self.training.seeds:
            trainers = [Trainer(task, self.training, each, seed) for each in (None, rule)]
            simplified = Trainer(task, self.training, rule, seed, self.simplify)
            assert simplified.simplifier is not None
            starts = simplified.simplifier.widths
            runs += train_in_turns([*trainers, simplified], self.out, tensorboard=self.tensorboard)
            models += report.describe([*trainers, simplified], self.seconds)
            print(simplified.simplifier.report())
            compact = simplified.simplifier.compact()
            machine.write_atomically(self.out / f"compact-seed{seed}.pt", lambda file, m=compact: torch.save(m, file))
            if seed == self.training.seeds[0]:
                report.draw_activity(simplified.simplifier.activity, self.out / report.ACTIVITY)
        record = tracking.describe(task.name, tracking.plain(self), runs)
        tracking.write_result(self.out / tracking.RESULT, report.SimplifyResult(**vars(record), models=models))
        figures.draw_runs(runs, task.metric, self.out / tracking.FIGURE)
        of_simplified = [run for run in runs if run.rule == "simplified"]
        report.draw_widths(of_simplified, starts, task.steps_per_epoch, self.out / report.WIDTHS)
        console = Console()
        console.print(terminal.run_table(runs, task.metric))
        console.print(report.model_table(models))
        print(f"written: {self.out}")


def _forms() -> Any:
    rules = rule_choice("What the sparse runs back-propagate of each output gradient.")

    def default(name: str, entry: TaskEntry) -> Any:
        training, out = replace(entry.training, k=_K), Path("runs") / f"simplify-{name}"
        return Simplify(entry.config(), training, SimplifyConfig(), out, DEFAULT_RULE)

    return with_tasks(Simplify, lambda config: Simplify[config, rules], default)


SIMPLIFY = Command("simplify", str(Simplify.__doc__), _forms)

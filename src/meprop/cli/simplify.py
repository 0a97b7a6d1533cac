"""`meprop simplify`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch

import meprop
from meprop import machine
from meprop.bench.measure import check_seconds
from meprop.cli.commands import HELP
from meprop.cli.common import RuleName, TaskConfig, Training, rule_choice, with_tasks
from meprop.cli.messages import note
from meprop.cli.seeds import Seeds
from meprop.cli.session import Session
from meprop.training import tasks, tracking
from meprop.training.config import DENSE, SimplifyConfig
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry

if TYPE_CHECKING:
    from meprop.reporting.simplify import ModelRecord

_K = 160  # that of the paper's code


@dataclass(frozen=True)
class Simplify(Generic[TaskConfig, Training, RuleName]):
    """`meprop simplify` with its options."""

    task: TaskConfig
    training: Training
    simplify: SimplifyConfig
    out: Path
    """Folder for result.json and the pictures curves.png, widths.png and activity.png. It also gets the simplified
    models, each of plain torch layers, such as compact-seed0.pt. To load the tagger's takes meprop.tasks, and one of
    your own the file with its classes."""
    rule: RuleName
    seconds: float = 2.0
    """Seconds to spend on timing inference, for each seed."""
    resume: bool = False
    """Continue the experiment in --out, bit for bit. Without one, start from the beginning."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well: losses, metrics, density, energy, parts of the step."""

    def run(self) -> None:
        """Train, measure, and write and show the result."""
        from meprop.reporting import simplify as report

        check_seconds(self.seconds)
        session = Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=self.tensorboard)
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        rule = self.training.rule(self.rule)
        runs: list[Run] = []
        models: list[report.ModelRecord] = []
        with session:
            seeds = Seeds(session, self, task)
            if earlier := seeds.begin(report.SimplifyResult, (DENSE, self.rule, "simplified")):
                runs, models = earlier.runs, earlier.models

            def build(seed: int) -> list[Trainer]:
                trainers = [Trainer(task, self.training, each, seed) for each in (None, rule)]
                _check_savable(trainers[0].model)
                return [*trainers, Trainer(task, self.training, rule, seed, self.simplify)]

            def record(running: Sequence[Run] = ()) -> None:
                found = tracking.describe(task.name, seeds.config, runs, running)
                session.write_result(report.SimplifyResult(**vars(found), models=models))

            def finish(trainers: Sequence[Trainer], outcome: list[Run]) -> None:
                runs.extend(outcome)
                models.extend(report.describe(trainers, self.seconds))
                simplifier = _simplifier(trainers)
                print(simplifier.report())
                session.make_way()
                _write_model(simplifier.compact(), session.out / f"compact-seed{outcome[0].seed}.pt")
                if outcome[0].seed == self.training.seeds[0] and simplifier.widths:
                    report.draw_activity(simplifier.activity, session.out / report.ACTIVITY)
                # Last: the seed is finished with it, and not looked at again after a resume.
                record()

            try:
                seeds.train(build, record, finish)
                self._draw(session.out, task, runs, build(self.training.seeds[0]))
            finally:
                _show(task, runs, models)
            print(f"written: {self.out}")

    def _draw(self, out: Path, task: Task, runs: list[Run], new: Sequence[Trainer]) -> None:
        """Draw the curves, and the widths where something could be pruned."""
        from meprop.reporting import figures
        from meprop.reporting import simplify as report

        figures.draw_runs(runs, task.metric, out / tracking.FIGURE, unit=task.unit)
        if starts := _simplifier(new).widths:
            simplified = [run for run in runs if run.rule == "simplified"]
            report.draw_widths(simplified, starts, new[-1].steps_per_epoch, out / report.WIDTHS)
        else:
            note("no layer could be pruned, so that there are no pictures of widths and activity")


def _simplifier(trainers: Sequence[Trainer]) -> meprop.Simplifier:
    """Return that of the run that is simplified, the last."""
    simplifier = trainers[-1].simplifier
    assert simplifier is not None
    return simplifier


def _write_model(model: torch.nn.Module, path: Path) -> None:
    machine.write_atomically(path, lambda file: torch.save(model, file))


def _check_savable(model: torch.nn.Module) -> None:
    """Find out before training whether the model can be saved whole.

    Raises:
        ValueError: Something in it cannot be pickled.
    """
    try:
        torch.save(model, io.BytesIO())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the model cannot be saved ({error}); define its classes at the top level of a file, and keep lambdas and "
            "functions within functions out of it"
        ) from error


def _show(task: Task, runs: list[Run], models: list[ModelRecord]) -> None:
    """Print the tables of what is finished."""
    from rich.console import Console

    from meprop.reporting import simplify as report
    from meprop.reporting import terminal

    if runs:
        Console().print(terminal.run_table(runs, task.metric, unit=task.unit))
        Console().print(report.model_table(models))


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    rules = rule_choice("What the sparse runs back-propagate of each output gradient.")

    def default(name: str, entry: TaskEntry) -> Any:
        training, out = replace(entry.training, k=_K), Path("runs") / f"simplify-{name}"
        return Simplify(entry.config(), training, SimplifyConfig(), out, entry.rule)

    return with_tasks(
        HELP["simplify"],
        lambda entry: Simplify[entry.config, type(entry.training), rules],
        default,
        tasks.with_script(),
    )

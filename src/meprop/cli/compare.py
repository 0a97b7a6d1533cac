"""`meprop compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic

from meprop.cli.commands import HELP
from meprop.cli.common import RuleTexts, TaskConfig, Training, rule_texts, show_runs, with_tasks
from meprop.cli.seeds import Seeds
from meprop.cli.session import Session
from meprop.training import tasks, tracking
from meprop.training.choices import Choice, read_choices
from meprop.training.config import MARGIN
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry
from meprop.training.verdict import Verdict, check_margin, judge_all


@dataclass(frozen=True)
class Compare(Generic[TaskConfig, Training, RuleTexts]):
    """`meprop compare` with its options."""

    task: TaskConfig
    training: Training
    out: Path
    """Folder for result.json, which has the finished seeds, for curves.png, for the page report.html, and for
    checkpoints of the unfinished."""
    rule: RuleTexts
    margin: float = MARGIN
    """How much lower the dev score may be for sparse to count as good as dense. The target is dense's, less this."""
    resume: bool = False
    """Continue the comparison in --out, bit for bit. Without one, start from the beginning."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well: losses, metrics, density, energy, parts of the step."""

    def run(self) -> None:
        """Train, and write and show the result."""
        self._session()
        self._choices()  # what is wrong is said before the data are read
        tracking.commit()
        self.train(tasks.entry_of(self.task).build(self.task))

    def _session(self) -> Session:
        return Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=self.tensorboard)

    def _choices(self) -> list[Choice]:
        check_margin(self.margin)
        return read_choices(self.rule, self.training)

    def train(self, task: Task, *, quietly: bool = False) -> list[Run]:
        """Train what is not finished, write the result, and return all runs.

        Args:
            task: That of the config.
            quietly: Show nothing but progress.
        """
        from meprop.reporting import figures
        from meprop.reporting.page import write_report

        session, choices = self._session(), self._choices()
        runs: list[Run] = []

        def judged() -> list[Verdict]:
            return judge_all(runs, task.metric, self.margin, self.training.budget)

        with session:
            seeds = Seeds(session, self, task)
            if earlier := seeds.begin(tracking.Comparison, [choice.name for choice in choices]):
                runs += earlier.runs

            def show_layers(trainers: Sequence[Trainer]) -> None:
                for trainer in trainers:
                    if trainer.rule is not None and not quietly:
                        print(trainer.report)

            def build(seed: int) -> list[Trainer]:
                trainers = [choice.trainer(task, seed) for choice in choices]
                if not runs:
                    show_layers(trainers)
                return trainers

            def record(running: Sequence[Run] = ()) -> None:
                found = tracking.describe(task.name, seeds.config, runs, running)
                session.write_result(tracking.Comparison(**vars(found), verdicts=[asdict(each) for each in judged()]))

            def finish(trainers: Sequence[Trainer], outcome: list[Run]) -> None:
                show_layers([each for each in trainers if each.config.when == "auto"])  # now with what was decided
                runs.extend(outcome)
                record()

            try:
                seeds.train(build, record, finish)
                figures.draw_runs(runs, task.metric, session.out / tracking.FIGURE, judged()[0].target, task.unit)
            finally:
                if not quietly:
                    show_runs(runs, task, judged(), self.margin)
            page = write_report([session.out], overwrite=True)
            if not quietly:
                print(f"written: {self.out / tracking.RESULT}, {self.out / tracking.FIGURE}, {self.out / page.name}")
        return runs


def options() -> Any:
    """Return the type that `tyro` reads the options from."""

    def default(name: str, entry: TaskEntry) -> Any:
        return Compare(entry.config(), entry.training, Path("runs") / f"compare-{name}", (entry.rule,))

    return with_tasks(
        HELP["compare"],
        lambda entry: Compare[entry.config, type(entry.training), rule_texts()],
        default,
        tasks.with_script(),
    )

"""`meprop train` and `meprop compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic

from meprop.cli.common import Command, RuleName, TaskConfig, Training, note, rule_choice, with_tasks
from meprop.cli.seeds import Seeds
from meprop.cli.session import Saved, Session
from meprop.training import checkpoint, tasks, tracking
from meprop.training.config import DENSE, MARGIN
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry


@dataclass(frozen=True)
class Train(Generic[TaskConfig, Training, RuleName]):
    """Train once, dense or sparse, with checkpoints."""

    task: TaskConfig
    training: Training
    out: Path
    """Folder for checkpoint.pt, result.json and curves.png."""
    rule: RuleName
    resume: bool = False
    """Continue from the checkpoint in --out, bit for bit. Without a checkpoint, start from the beginning."""
    checkpoint_every: int = 0
    """Save a checkpoint every so many steps, to within 100, and after each epoch; 0: after each epoch only."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train, and write the result."""
        from meprop.reporting import figures

        if len(self.training.seeds) != 1:
            raise ValueError(f"meprop train is one run: give one seed to --seeds, got {list(self.training.seeds)}")
        if self.checkpoint_every < 0:
            raise ValueError(f"--checkpoint-every must be 0 or more, got {self.checkpoint_every}")
        session = Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=self.tensorboard)
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        with session:
            run = self._begin(session, task)
            if run.trainer.rule is not None:
                print(run.trainer.report)
            try:
                runs = session.train([run], self.checkpoint_every)
            except KeyboardInterrupt:
                if session.saved and checkpoint.exists(run.path):
                    note(f"stopped; {run.path} is kept: continue with --resume")
                else:
                    note("stopped before the first checkpoint: nothing is kept")
                raise
            try:
                session.write_result(tracking.describe(task.name, tracking.plain(self), runs))
                figures.draw_runs(runs, task.metric, session.out / tracking.FIGURE, unit=task.unit)
            finally:
                _show(runs, task)
            if session.saver.failure is not None:
                raise session.saver.failure
            checkpoint.delete_earlier(run.path)
            print(f"written: {self.out / tracking.RESULT}, {self.out / tracking.FIGURE}")

    def _begin(self, session: Session, task: Task) -> Saved:
        """Return the run, where an earlier process left it if that is to be continued."""
        rule, seed = None if self.rule == DENSE else self.training.rule(self.rule), self.training.seeds[0]
        settings = tracking.settings(self.task, self.training, self.rule)
        settings |= {"seed": seed, "data": task.fingerprint}
        trainer = Trainer(task, self.training, rule, seed)
        run = Saved(trainer, session.out / tracking.CHECKPOINT, settings, type(self.task))
        if not (self.resume and run.resume()):
            session.start(f"{run.path} does not exist")
        return run


@dataclass(frozen=True)
class Comparison(tracking.Result):
    """The content of result.json of a comparison."""

    verdicts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`training.verdict.Verdict` of each rule, on the seeds that are finished."""


@dataclass(frozen=True)
class Compare(Generic[TaskConfig, Training, RuleName]):
    """Train dense and sparse side by side, with the same seeds and budget."""

    task: TaskConfig
    training: Training
    out: Path
    """Folder for result.json, which has the finished seeds, for curves.png, and for checkpoints of the unfinished."""
    rule: RuleName
    margin: float = MARGIN
    """How much lower the dev score may be for sparse to count as good as dense. The target is dense's, less this."""
    resume: bool = False
    """Continue the comparison in --out, bit for bit. Without one, start from the beginning."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train both, and write and show the result."""
        from meprop.reporting import figures
        from meprop.training.verdict import check_margin, judge_all

        check_margin(self.margin)
        session = Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=self.tensorboard)
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        sparse = self.training.rule(self.rule)
        runs: list[Run] = []
        with session:
            seeds = Seeds(session, self, task)
            if earlier := seeds.begin(Comparison, (DENSE, self.rule)):
                runs += earlier.runs

            def build(seed: int) -> list[Trainer]:
                pair = [Trainer(task, self.training, rule, seed) for rule in (None, sparse)]
                if not runs:
                    print(pair[1].report)
                return pair

            def finish(pair: Sequence[Trainer], outcome: list[Run]) -> None:
                if self.training.when == "auto":
                    print(pair[1].report)  # now with what was decided
                runs.extend(outcome)
                record = tracking.describe(task.name, seeds.config, runs)
                verdicts = judge_all(runs, task.metric, self.margin)
                session.write_result(Comparison(**vars(record), verdicts=[asdict(each) for each in verdicts]))

            try:
                seeds.train(build, finish)
                verdicts = judge_all(runs, task.metric, self.margin)
                figures.draw_runs(runs, task.metric, session.out / tracking.FIGURE, verdicts[0].target, task.unit)
            finally:
                _show(runs, task, self.margin)
            print(f"written: {self.out / tracking.RESULT}, {self.out / tracking.FIGURE}")


def _show(runs: list[Run], task: Task, margin: float = MARGIN) -> None:
    """Print the table of what is finished and, of a comparison, the verdicts."""
    from rich.console import Console

    from meprop.reporting.terminal import run_table, verdict_line
    from meprop.training.verdict import judge_all

    if runs:
        verdicts = judge_all(runs, task.metric, margin)
        Console().print(run_table(runs, task.metric, verdicts, task.unit))
        for verdict in verdicts:
            print(verdict_line(verdict))
        if verdicts and margin == MARGIN and not task.unit and all(abs(run.dev[task.metric]) <= 1 for run in runs):
            note(f"{task.metric} is within 1, and --margin is {margin}: give a smaller margin, or scores in percent")


# ---------------------------------------------------------------- the commands


def _train_forms() -> Any:
    rules = rule_choice("What is back-propagated of each output gradient.", {DENSE: "everything"})

    def default(name: str, entry: TaskEntry) -> Any:
        return Train(entry.config(), entry.training, Path("runs") / f"train-{name}", entry.rule)

    return with_tasks(
        Train, lambda entry: Train[entry.config, type(entry.training), rules], default, tasks.with_script()
    )


def _compare_forms() -> Any:
    rules = rule_choice("What the sparse runs back-propagate of each output gradient.")

    def default(name: str, entry: TaskEntry) -> Any:
        return Compare(entry.config(), entry.training, Path("runs") / f"compare-{name}", entry.rule)

    return with_tasks(
        Compare, lambda entry: Compare[entry.config, type(entry.training), rules], default, tasks.with_script()
    )


TRAIN = Command("train", str(Train.__doc__), _train_forms)
COMPARE = Command("compare", str(Compare.__doc__), _compare_forms)

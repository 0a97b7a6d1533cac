"""`meprop train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from meprop.cli.commands import HELP
from meprop.cli.common import RuleName, TaskConfig, Training, rule_choice, show_runs, with_tasks
from meprop.cli.messages import note
from meprop.cli.session import Saved, Session
from meprop.training import checkpoint, tasks, tracking
from meprop.training.config import DENSE, check_dense
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry


@dataclass(frozen=True)
class Train(Generic[TaskConfig, Training, RuleName]):
    """`meprop train` with its options."""

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
    """Write live curves to --out/tensorboard as well: losses, metrics, density, energy, parts of the step."""

    def run(self) -> None:
        """Train, and write the result."""
        from meprop.reporting import figures

        if len(self.training.seeds) != 1:
            raise ValueError(f"meprop train is one run: give one seed to --seeds, got {list(self.training.seeds)}")
        if self.checkpoint_every < 0:
            raise ValueError(f"--checkpoint-every must be 0 or more, got {self.checkpoint_every}")
        entry = tasks.entry_of(self.task)
        if self.rule == DENSE:
            check_dense(vars(self.training), entry.training)
        session = Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=self.tensorboard)
        tracking.commit()
        task = entry.build(self.task)
        with session:
            run = self._begin(session, task)
            if run.trainer.rule is not None:
                print(run.trainer.report)

            def record(finished: Sequence[Run] = (), running: Sequence[Run] = ()) -> None:
                session.write_result(tracking.describe(task.name, tracking.plain(self), finished, running))

            try:
                runs = session.train([run], lambda running: record(running=running), self.checkpoint_every)
            except KeyboardInterrupt:
                if session.saved and checkpoint.exists(run.path):
                    note(f"stopped; {run.path} is kept: continue with --resume")
                else:
                    note("stopped before the first checkpoint: nothing is kept")
                raise
            try:
                record(runs)
                figures.draw_runs(runs, task.metric, session.out / tracking.FIGURE, unit=task.unit)
            finally:
                show_runs(runs, task)
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


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    rules = rule_choice("What is back-propagated of each output gradient.", {DENSE: "everything"})

    def default(name: str, entry: TaskEntry) -> Any:
        return Train(entry.config(), entry.training, Path("runs") / f"train-{name}", entry.rule)

    return with_tasks(
        HELP["train"], lambda entry: Train[entry.config, type(entry.training), rules], default, tasks.with_script()
    )

"""`meprop train` and `meprop compare`, and how the commands that train do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

from meprop.cli.common import Command, RuleName, TaskConfig, note, rule_choice, with_tasks
from meprop.training import checkpoint, tasks, tracking
from meprop.training.config import DEFAULT_RULE, DENSE, TrainingConfig
from meprop.training.loop import Trainer, fit
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry

TURN = 100  # steps: short enough for a lively progress bar, long enough to cost nothing


@dataclass(frozen=True)
class Train(Generic[TaskConfig, RuleName]):
    """Train once, dense or sparse, with checkpoints."""

    task: TaskConfig
    training: TrainingConfig
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
        if len(self.training.seeds) != 1:
            raise ValueError(f"meprop train is one run: give one seed to --seeds, got {list(self.training.seeds)}")
        if self.checkpoint_every < 0:
            raise ValueError(f"--checkpoint-every must be 0 or more, got {self.checkpoint_every}")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues an experiment and --overwrite replaces it: give one of them")
        tracking.commit()
        path, seed = self.out / tracking.CHECKPOINT, self.training.seeds[0]
        task = tasks.entry_of(self.task).build(self.task)
        rule = None if self.rule == DENSE else self.training.rule(self.rule)
        trainer = Trainer(task, self.training, rule, seed)
        settings = tracking.settings(self.task, self.training, self.rule)
        settings |= {"seed": seed, "data": task.fingerprint}
        if self.resume and path.exists():
            checkpoint.resume(path, trainer, settings, type(self.task))
            note(f"continuing {path} after {position(trainer)}")
        else:
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            if self.resume:
                note(f"{path} does not exist: starting from the beginning")
        if trainer.rule is not None:
            print(trainer.report)

        saver = CheckpointSaver([Saved(trainer, path, settings, beside=[])], self.checkpoint_every)
        turn = min(self.checkpoint_every or TURN, TURN)
        try:
            runs = train_in_turns([trainer], self.out, tensorboard=self.tensorboard, after_turn=saver.update, turn=turn)
        except KeyboardInterrupt:
            if path.exists():
                note(f"stopped; {path} is kept: continue with --resume")
            else:
                note("stopped before the first checkpoint: nothing is kept")
            raise
        _finish(self, task, self.out, runs)


@dataclass(frozen=True)
class Compare(Generic[TaskConfig, RuleName]):
    """Train dense and sparse side by side, with the same seeds and budget."""

    task: TaskConfig
    training: TrainingConfig
    out: Path
    """Folder for result.json and curves.png."""
    rule: RuleName
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train both, and write and show the result."""
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        tracking.claim_folder(self.out, overwrite=self.overwrite)
        runs: list[Run] = []
        for seed in self.training.seeds:
            pair = [Trainer(task, self.training, rule, seed) for rule in (None, self.training.rule(self.rule))]
            if not runs:
                print(pair[1].report)
            runs += train_in_turns(pair, self.out, tensorboard=self.tensorboard)
            if self.training.when == "auto":
                print(pair[1].report)  # now with what was decided
        _finish(self, task, self.out, runs)


# ---------------------------------------------------------------- what the commands that train share


def train_in_turns(
    trainers: Sequence[Trainer],
    out: Path,
    *,
    tensorboard: bool,
    after_turn: Callable[[Trainer], None] = lambda trainer: None,
    turn: int = TURN,
) -> list[Run]:
    """Train runs to the end, and show progress.

    Args:
        trainers: The runs.
        out: Folder for live curves.
        tensorboard: Whether to write these.
        after_turn: Called with each trainer after its turn.
        turn: Steps in a turn.
    """
    from meprop.reporting.terminal import TrainingProgress

    with TrainingProgress() as progress, tracking.LiveCurves(out, enabled=tensorboard) as curves:

        def after(trainer: Trainer) -> None:
            after_turn(trainer)
            progress.update(trainer)
            curves.update(trainer)

        return fit(trainers, after, turn)


def _finish(command: Train[Any, Any] | Compare[Any, Any], task: Task, out: Path, runs: list[Run]) -> None:
    """Write result.json and the figure, then print the table and, of a comparison, the verdict."""
    from rich.console import Console

    from meprop.reporting.figures import draw_runs
    from meprop.reporting.terminal import run_table, verdict

    result = tracking.describe(task.name, tracking.plain(command), runs)
    path = out / tracking.RESULT
    tracking.write_result(path, result)
    figure = out / tracking.FIGURE
    draw_runs(runs, task.metric, figure)
    Console().print(run_table(runs, task.metric))
    if isinstance(command, Compare):
        print(verdict(runs, task.metric))
    print(f"written: {path}, {figure}")


class Saved(NamedTuple):
    """A run that is saved while it is not finished."""

    trainer: Trainer
    path: Path
    """Of its checkpoint."""
    settings: dict[str, Any]
    """Its own, its seed and its data."""
    beside: list[str]
    """What has been trained in turns with it from its beginning, by name."""


class CheckpointSaver:
    """Saves runs together, so that they continue side by side.

    That is when the last of them ends an epoch, and, if `every` is not 0, when it has done that many steps.
    """

    def __init__(self, runs: Sequence[Saved], every: int = 0) -> None:
        self._runs, self._every = runs, every
        self._saved = self._slowest()

    def update(self, _trainer: Trainer) -> None:
        """Save if it is time to."""
        (epoch, step), (saved_epoch, saved_step) = self._slowest(), self._saved
        if epoch > saved_epoch or (self._every and step - saved_step >= self._every):
            for run in self._runs:
                checkpoint.save(run.path, {**run.trainer.state_dict(), "beside": run.beside}, run.settings)
            self._saved = epoch, step

    def _slowest(self) -> tuple[int, int]:
        return min((run.trainer.epoch, run.trainer.step) for run in self._runs)


def position(trainer: Trainer) -> str:
    """Return in words where a run is."""
    return f"epoch {trainer.epoch}, step {trainer.step}" if trainer.step else f"epoch {trainer.epoch}"


# ---------------------------------------------------------------- the commands


def _train_forms() -> Any:
    rules = rule_choice("What is back-propagated of each output gradient.", {DENSE: "everything"})

    def default(name: str, entry: TaskEntry) -> Any:
        return Train(entry.config(), entry.training, Path("runs") / f"train-{name}", DEFAULT_RULE)

    return with_tasks(Train, lambda config: Train[config, rules], default)


def _compare_forms() -> Any:
    rules = rule_choice("What the sparse runs back-propagate of each output gradient.")

    def default(name: str, entry: TaskEntry) -> Any:
        return Compare(entry.config(), entry.training, Path("runs") / f"compare-{name}", DEFAULT_RULE)

    return with_tasks(Compare, lambda config: Compare[config, rules], default)


TRAIN = Command("train", str(Train.__doc__), _train_forms)
COMPARE = Command("compare", str(Compare.__doc__), _compare_forms)

"""How the commands that train do it: in a folder of their own, in turns, with checkpoints, until they are to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from meprop import machine
from meprop.cli.messages import note
from meprop.cli.stop import StopRequest
from meprop.training import checkpoint, folder, tracking
from meprop.training.loop import Trainer, fit
from meprop.training.records import Run

TURN = 100  # steps: short enough for a lively progress bar, long enough to cost nothing
_STATE = 3  # numbers in a checkpoint for each parameter: Adam's moments are two


@dataclass(frozen=True)
class Saved:
    """A run that is saved while it is not finished."""

    trainer: Trainer
    path: Path
    """Of its checkpoint."""
    settings: dict[str, Any]
    """Its own, its seed and its data."""
    config: type[Any]
    """The class of its task's config."""
    beside: list[str] = field(default_factory=list[str])
    """What has been trained in turns with it from its beginning, by name."""

    def resume(self) -> dict[str, Any] | None:
        """Let the run go on from its checkpoint, and return the state that it had; None if there is no checkpoint."""
        if not checkpoint.exists(self.path):
            return None
        state = checkpoint.resume(self.path, self.trainer, self.settings, self.config)
        note(f"continuing {self.path} after {_position(self.trainer)}")
        return state

    def save(self) -> None:
        """Save the run."""
        checkpoint.save(self.path, {**self.trainer.state_dict(), "beside": self.beside}, self.settings)

    def check_room(self) -> None:
        """Find out before training whether there is room for the checkpoint; an OSError names it."""
        parameters = self.trainer.model.parameters()
        machine.check_room(self.path, _STATE * sum(each.numel() * each.element_size() for each in parameters))


class Session:
    """A command's hold on its folder, from before the first step until the last file is written.

    Args:
        out: The folder.
        resume: Whether to go on with the experiment that is there.
        overwrite: Whether to replace it. It stays until there is something of the new one to save.
        tensorboard: Whether to write live curves.

    Raises:
        ValueError: Both are asked for.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool, tensorboard: bool) -> None:
        if resume and overwrite:
            raise ValueError("--resume continues an experiment and --overwrite replaces it: give one of them")
        self.out, self.resume = out.absolute(), resume  # a file of the user's may change the working directory
        self.saved = resume
        """Whether something of this experiment is on disk."""
        self.stop = StopRequest()
        self._overwrite, self._tensorboard = overwrite, tensorboard
        self._held = ExitStack()

    def __enter__(self) -> Session:
        self._held.enter_context(folder.owned(self.out))
        self._held.enter_context(self.stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()

    def start(self, reason: str) -> None:
        """Begin a new experiment, unless there is one that must not be replaced.

        Args:
            reason: Why none is continued, if that was asked for.

        Raises:
            ValueError: There is one.
        """
        if not self._overwrite:
            folder.check_free(self.out)
        if self.resume:
            note(f"{reason}: starting from the beginning")
        self.saved = False

    def make_way(self) -> None:
        """Remove the experiment that is to be replaced: called before anything of this one is saved."""
        if self._overwrite and not self.saved:
            folder.clear(self.out)
        self.saved = True

    def write_result(self, result: Any) -> None:
        """Write result.json."""
        self.make_way()
        tracking.write_result(self.out / tracking.RESULT, result)

    def train(self, runs: Sequence[Saved], record: Callable[[list[Run]], None], every: int = 0) -> list[Run]:
        """Train runs to the end, see `train_in_turns`, and save them.

        Args:
            runs: The runs.
            record: Called with those that have completed an epoch, after each: to write result.json.
            every: Save checkpoints every so many steps as well; 0: after epochs alone.
        """
        self.saver = CheckpointSaver(runs, every, self.make_way, record)
        return train_in_turns(self.saver, self.stop, self.out if self._tensorboard else None)


class CheckpointSaver:
    """Saves runs together, so that they continue side by side.

    That is when the last of them ends an epoch, and, if `every` is not 0, when it has done that many steps. A disk that
    is full then does not end the training.

    Attributes:
        failure: Why the last save failed; None if it did not.
    """

    def __init__(
        self,
        runs: Sequence[Saved],
        every: int = 0,
        before: Callable[[], None] = lambda: None,
        record: Callable[[list[Run]], None] = lambda running: None,
    ) -> None:
        self.runs, self.every = runs, every
        self.failure: OSError | None = None
        self._before, self._record = before, record
        self._last = self._slowest()

    def update(self) -> None:
        """Save if it is time to."""
        (epoch, step), (last_epoch, last_step) = self._slowest(), self._last
        if epoch > last_epoch or (self.every and step - last_step >= self.every):
            self.save()
            self._last = epoch, step

    def save(self) -> None:
        """Save now."""
        self.failure = None
        try:
            self._before()
            for run in self.runs:
                run.save()
            self._record([run.trainer.result() for run in self.runs if run.trainer.epoch])
        except OSError as error:
            self.failure = error
            note(f"what is trained could not be saved: {error}")

    def _slowest(self) -> tuple[int, int]:
        return min((run.trainer.epoch, run.trainer.step) for run in self.runs)


def train_in_turns(saver: CheckpointSaver, stop: StopRequest, curves_in: Path | None = None) -> list[Run]:
    """Train the saver's runs to the end, save them after each epoch, and show progress.

    Args:
        saver: Of the runs.
        stop: When it asks, the runs finish the step, are saved, and `Stopped` is raised.
        curves_in: Folder for live curves; None: there are none.

    Raises:
        OSError: There is no room for the checkpoints, before the first step.
    """
    from meprop.reporting.terminal import TrainingProgress

    for run in saver.runs:
        run.check_room()
    trainers = [run.trainer for run in saver.runs]
    logger_of = None if curves_in is None else tracking.tensorboard_in(curves_in)
    with TrainingProgress() as progress, tracking.LiveCurves(trainers, logger_of) as curves:

        def after(trainer: Trainer) -> None:
            saver.update()
            with suppress(OSError):  # a terminal that is gone must not end a training
                progress.update(trainer)
            try:
                curves.update(trainer)
            except Exception as error:  # whatever a logger raises must not end a training
                note(f"live curves could not be written: {error}")
            if stop() and not all(each.finished for each in trainers):
                saver.save()
                stop.check()

        return fit(trainers, after, min(saver.every or TURN, TURN), stop)


def _position(trainer: Trainer) -> str:
    """Return in words where a run is."""
    return f"epoch {trainer.epoch}, step {trainer.step}" if trainer.step else f"epoch {trainer.epoch}"

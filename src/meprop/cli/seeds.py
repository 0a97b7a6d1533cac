"""Comparisons seed by seed: the finished seeds are in result.json, and the unfinished one has checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from meprop.cli.messages import note
from meprop.cli.session import Saved, Session
from meprop.errors import DataError
from meprop.training import checkpoint, tracking
from meprop.training.config import DENSE
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task

ResultT = TypeVar("ResultT", bound=tracking.Result)


class Seeds:
    """The seeds of a command that trains several runs side by side with each.

    Args:
        session: The command's hold on its folder.
        command: The command, with `task`, `training` and `rule`.
        task: What is trained.
    """

    def __init__(self, session: Session, command: Any, task: Task) -> None:
        self._session, self._command, self._task = session, command, task
        self.config: dict[str, Any] = {**tracking.plain(command), "data": task.fingerprint}
        """All settings and the digest of the data: what the record keeps."""
        self._done: set[int] = set()

    def begin(self, kind: type[ResultT], names: Sequence[str]) -> ResultT | None:
        """Return the record of the seeds that an earlier process finished, if it is to be continued; else begin anew.

        Args:
            kind: The class of the record.
            names: Of the runs of each seed.

        Raises:
            ValueError: It has other settings, or seeds that are not asked for; or there is one and it must stay.
            DataError: It is damaged, or another command's.
        """
        out, result = self._session.out, None
        path = out / tracking.RESULT
        if self._session.resume and path.exists():
            result = tracking.read_result(path, kind)
            self._check(result, names)
            self._done = {run.seed for run in result.runs}
            for name in names:
                for seed in self._done:  # killed between the record and this
                    checkpoint.delete(self._path(name, seed))
            note(f"continuing {path}, of which the finished seeds are {sorted(self._done) or 'none'}")
        elif not (self._session.resume and any(out.glob("checkpoint-*-seed*.pt"))):
            self._session.start(f"{out} holds nothing to continue")
        return result

    def _check(self, result: tracking.Result, names: Sequence[str]) -> None:
        path, wanted = self._session.out / tracking.RESULT, self._command.training.seeds
        config, found = result.config, {(run.rule, run.seed) for run in result.runs}
        if {"task", "training", "rule", "data"} <= config.keys():
            then, now = tracking.settings_of(config), tracking.settings_of(self.config)
            if different := tracking.changes(then, now, type(self._command.task)):
                raise ValueError(
                    f"{path} has other settings ({different}); give the same options and data, or another --out, or "
                    "start again with --overwrite"
                )
        if "data" not in config or found != {(name, seed) for name in names for _, seed in found}:
            raise DataError(f"{path} is not of this command; give another --out, or start again with --overwrite")
        if others := sorted({seed for _, seed in found} - set(wanted)):
            raise ValueError(f"{path} has results of the seeds {others}; give them to --seeds as well")

    def train(
        self,
        build: Callable[[int], Sequence[Trainer]],
        record: Callable[[list[Run]], None],
        finish: Callable[[Sequence[Trainer], list[Run]], None],
    ) -> None:
        """Train what is not finished.

        Args:
            build: Returns new runs of a seed.
            record: Called after each epoch with the runs of the seed as far as they are: to write result.json.
            finish: Called with the runs of a seed, trained to the end, and their outcome: to save it.
        """
        try:
            for seed in self._command.training.seeds:
                if seed in self._done:
                    continue
                self._session.stop.check()
                saved = [self._saved(trainer) for trainer in build(seed)]
                outcome = self._session.train(saved, record)
                finish([run.trainer for run in saved], outcome)
                for run in saved:
                    checkpoint.delete(run.path)
        except KeyboardInterrupt:
            if self._session.saved:
                note(f"stopped; what was done is kept in {self._session.out}: continue with --resume")
            else:
                note("stopped before the first checkpoint: nothing is kept")
            raise

    def _saved(self, trainer: Trainer) -> Saved:
        """Return a run, where an earlier process left it if that is to be continued."""
        command = self._command
        rule = DENSE if trainer.rule is None else trainer.rule.name
        settings = tracking.settings(command.task, trainer.config, rule)
        if trainer.simplifier is not None:
            settings["simplify"] = self.config["simplify"]
        settings |= {"seed": trainer.seed, "data": self._task.fingerprint}
        run = Saved(trainer, self._path(trainer.name, trainer.seed), settings, type(command.task))
        if self._session.resume:
            run.resume()
        return run

    def _path(self, name: str, seed: int) -> Any:
        return self._session.out / f"checkpoint-{name}-seed{seed}.pt"

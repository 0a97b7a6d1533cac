"""`meprop reproduce`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from meprop.cli.common import threads
from meprop.cli.messages import note
from meprop.cli.session import CheckpointSaver, Saved, train_in_turns
from meprop.cli.stop import StopRequest
from meprop.errors import DataError, MepropError
from meprop.training import checkpoint, folder, tasks, tracking
from meprop.training.config import TrainingConfig
from meprop.training.loop import DivergedError
from meprop.training.task import Task

if TYPE_CHECKING:
    from meprop.experiments import Experiment, Records, Variant

Names = TypeVar("Names", bound="tuple[str, ...]")


@dataclass(frozen=True)
class Reproduce(Generic[Names]):
    """`meprop reproduce` with its options."""

    names: Names
    """Experiments by name, or paths of .toml files of your own in the same form. Both train our tasks. A training of
    your own is for meprop compare."""
    list: bool = False
    """Show the names of the shipped experiments, and how many of their runs are finished."""
    out: Path = Path("runs/reproduce")
    """Folder for results. An experiment's folder in it has a file per finished run, a checkpoint per unfinished one."""
    seeds: tuple[int, ...] = ()
    """Seeds to run instead of the experiment's; with --list, seeds to count. The table shows all that are finished."""
    data_dir: Path | None = None
    """Folder of the task's data. Default: $MEPROP_DATA, then the cache, then a download."""
    threads: int = 0
    """Threads of dense and sparse alike; 0: torch's own choice."""
    page: Path | None = None
    """Markdown file whose sections, and the figures beside it, are replaced by the results in --out."""
    overwrite: bool = False
    """Repeat the runs that were made with other settings than the experiment has now, or on other data."""

    def run(self) -> None:
        """Run what is not finished, and show the results."""
        from meprop import experiments
        from meprop.reporting import pages
        from meprop.reporting import reproduce as report

        tracking.commit()
        if not (self.names or self.list or self.page):
            raise ValueError(f"which experiment? There are {', '.join(experiments.built_in())}")
        if self.seeds:
            TrainingConfig(seeds=self.seeds)  # checks them
        configs = {name: entry.config for name, entry in tasks.table().items()}
        chosen = [experiments.load(name, configs) for name in self.names]
        shown: list[Experiment] = []
        if self.page:
            on_page, ours = report.experiments_of(self.page), {experiment.name: experiment for experiment in chosen}
            for name in ours.keys() - on_page:
                pages.check_section(self.page, f"{report.SECTION}{name}")
            shown = [ours.get(name) or experiments.load(name, configs) for name in on_page]

        if self.list:
            for name in experiments.built_in():
                print(self._line(experiments.load(name, configs)))
        with threads(self.threads):
            diverged = [failure for experiment in chosen for failure in self._reproduce(experiment)]
        if self.page:
            report.write_page(self.page, [(experiment, self._records(experiment)) for experiment in shown])
            print(f"written: {self.page}")
        if diverged:
            raise MepropError(f"not finished: {'; '.join(diverged)}")

    def _records(self, experiment: Experiment) -> Records:
        from meprop.experiments import Records

        return Records(self.out / experiment.name)

    def _line(self, experiment: Experiment) -> str:
        records, seeds = self._records(experiment), self.seeds or experiment.seeds
        finished = sum(len(records.all(variant).keys() & set(seeds)) for variant in experiment.variants)
        runs = len(experiment.variants) * len(seeds)
        return f"{experiment.name:24} {experiment.title} ({finished} of {runs} runs finished)"

    def _reproduce(self, experiment: Experiment) -> list[str]:
        """Run what is not finished of an experiment, show its results, and return what diverged."""
        from meprop.reporting import reproduce as report

        records = self._records(experiment)
        with folder.owned(records.folder), StopRequest() as stop:
            records, diverged = self._run_missing(experiment, records, stop)
        print(f"\n{experiment.title}\n\n{report.table(experiment, records)}\n\n{report.LEGEND}")
        drawn = report.draw_densities(experiment, records, records.folder / report.FIGURE)
        print(f"written: {records.folder}" + (f", {records.folder / report.FIGURE}" if drawn else ""))
        return diverged

    def _run_missing(self, experiment: Experiment, records: Records, stop: StopRequest) -> tuple[Records, list[str]]:
        """Run what is not finished; return the records, with the data if they were read, and what diverged."""

        @functools.cache
        def load(config: Any) -> Task:
            return tasks.entry_of(config).build(replace(config, data_dir=self.data_dir))

        def missing(group: Sequence[Variant], seed: int) -> list[Variant]:
            return [variant for variant in group if records.read(variant, seed) is None]

        def check() -> None:
            if not self.overwrite:
                records.check(experiment)

        check()
        seeds = self.seeds or experiment.seeds
        if any(missing(experiment.variants, seed) for seed in seeds):  # the data are read for that alone
            data = {variant.name: load(variant.task).fingerprint for variant in experiment.variants}
            records = replace(records, data=data)
            check()
        diverged: list[str] = []
        for seed in seeds:
            for group in experiment.groups():
                unfinished = missing(group, seed)
                for variant in group:
                    if variant not in unfinished:  # killed between its record and this
                        checkpoint.delete(records.checkpoint(variant, seed))
                diverged += self._train(records, unfinished, load, seed, stop)
        return records, diverged

    def _train(
        self,
        records: Records,
        variants: Sequence[Variant],
        load: Callable[[Any], Task],
        seed: int,
        stop: StopRequest,
    ) -> list[str]:
        """Train variants in turns, from checkpoints where there are any, record them, and return what diverged."""
        if not variants:
            return []
        saved = [self._saved(records, variant, variants, load(variant.task), seed) for variant in variants]
        try:
            stop.check()
            runs = train_in_turns(CheckpointSaver(saved), stop)
        except KeyboardInterrupt:
            note("stopped; the same command continues each run where it was saved")
            raise
        except DivergedError as error:
            failed = variants[[each.trainer for each in saved].index(error.trainer)]
            message = f"{failed.name} of {records.folder.name}: {error}"
            note(f"{message}; going on without it")
            others = [variant for variant in variants if variant is not failed]
            return [message, *self._train(records, others, load, seed, stop)]
        for variant, run, each in zip(variants, runs, saved, strict=True):
            try:
                records.write(variant, run, each.trainer.task, each.beside)
            except OSError:
                note(f"{variant.name}, seed {seed}, could not be saved; its test scores: {run.test}")
                raise
            checkpoint.delete(each.path)
        return []

    def _saved(self, records: Records, variant: Variant, variants: Sequence[Variant], task: Task, seed: int) -> Saved:
        """Return a run of a variant, from its checkpoint if there is one; it is trained in turns with the others."""
        settings = {**variant.settings(), "seed": seed, "data": records.data[variant.name]}
        beside = [other.name for other in variants if other is not variant]
        new = Saved(
            variant.trainer(task, seed), records.checkpoint(variant, seed), settings, type(variant.task), beside
        )
        try:
            state = new.resume()
        except (ValueError, DataError):
            if not self.overwrite:
                raise
            return replace(new, trainer=variant.trainer(task, seed))  # the other may be half read
        if state is None:
            return new
        before = state["beside"]
        return replace(new, beside=before if new.trainer.finished else [name for name in beside if name in before])


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    import tyro

    names: Any = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")]
    return Reproduce[names]

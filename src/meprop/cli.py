"""The command line: `meprop train`, `compare`, `simplify`, `reproduce`, `data`, `bench` and `doctor`.

Each command is a frozen dataclass: its fields are the options, their docstrings the help, its `run` what it does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union

import torch

import meprop
from meprop import machine
from meprop.errors import DataError, MepropError
from meprop.training import checkpoint, tracking
from meprop.training.loop import DivergedError, RuleName, Run, SimplifyConfig, Task, Trainer, TrainingConfig, fit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meprop.bench.record import Record
    from meprop.experiments import Experiment, Records, Variant

TaskConfig = TypeVar("TaskConfig")
Names = TypeVar("Names", bound="tuple[str, ...]")

_MOST_THREADS = 1024  # far above what helps, and below what the system refuses to start
_TURN = 100  # steps: short enough for a lively progress bar, long enough to cost nothing


class _TaskEntry(NamedTuple):
    """A task as the command line knows it."""

    config: type[Any]
    build: Callable[[Any], Task]
    """Reads the data."""
    locate: Callable[[Path | None], Path | None]
    """From --data-dir to the folder of the data, None if they are not here yet; downloads nothing."""
    load: Callable[[Any], object]
    """Reads the data, downloaded if needed; str() of them is a line about them."""
    training: TrainingConfig
    """Defaults of the shared settings."""


def _tasks() -> dict[str, _TaskEntry]:
    """Return all tasks by name: a new task is one entry here."""
    from meprop.tasks import mnist, parsing, tagging

    return {
        "mnist": _TaskEntry(
            mnist.MnistConfig, mnist.MnistTask, mnist.locate, mnist.load, TrainingConfig(epochs=10, k=20)
        ),
        "tagging": _TaskEntry(
            tagging.TaggingConfig,
            tagging.TaggingTask,
            tagging.locate,
            tagging.load,
            TrainingConfig(epochs=15, k=20, lr=2e-3),
        ),
        "parsing": _TaskEntry(
            parsing.ParsingConfig,
            parsing.ParsingTask,
            parsing.locate,
            parsing.load,
            TrainingConfig(epochs=6, k=20, lr=2e-3),
        ),
    }


def _entry(config: object) -> _TaskEntry:
    return next(entry for entry in _tasks().values() if entry.config is type(config))


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Train(Generic[TaskConfig]):
    """Train once, dense or sparse, with checkpoints."""

    task: TaskConfig
    training: TrainingConfig
    out: Path
    """Folder for checkpoint.pt, result.json and curves.png."""
    rule: RuleName | Literal["dense"] = "topk"
    """What to back-propagate: the k largest entries of each output gradient, k random ones, or everything."""
    resume: bool = False
    """Continue from the checkpoint in --out, bit for bit; without a checkpoint, start from the beginning."""
    checkpoint_every: int = 0
    """Besides after each epoch, save a checkpoint every so many steps, to within 100; 0 for epochs only."""
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
        task = _entry(self.task).build(self.task)
        rule = None if self.rule == "dense" else self.training.rule(self.rule)
        trainer = Trainer(task, self.training, rule, seed)
        settings = tracking.settings(self.task, self.training, self.rule)
        settings |= {"seed": seed, "data": task.fingerprint}
        if self.resume and path.exists():
            checkpoint.resume(path, trainer, settings, type(self.task))
            _note(f"continuing {path} after {_position(trainer)}")
        else:
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            if self.resume:
                _note(f"{path} does not exist: starting from the beginning")
        if trainer.rule is not None:
            print(trainer.report)

        saver = _CheckpointSaver([_Saved(trainer, path, settings, beside=[])], self.checkpoint_every)
        turn = min(self.checkpoint_every or _TURN, _TURN)
        try:
            runs = _train([trainer], self.out, tensorboard=self.tensorboard, after_turn=saver.update, turn=turn)
        except KeyboardInterrupt:
            if path.exists():
                _note(f"stopped; {path} is kept: continue with --resume")
            else:
                _note("stopped before the first checkpoint: nothing is kept")
            raise
        _finish(self, task, self.out, runs)


@dataclass(frozen=True)
class Compare(Generic[TaskConfig]):
    """Train dense and sparse side by side, with the same seeds and budget."""

    task: TaskConfig
    training: TrainingConfig
    out: Path
    """Folder for result.json and curves.png."""
    rule: RuleName = "topk"
    """What the sparse runs back-propagate: the k largest entries of each output gradient, or k random ones."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train both, and write and show the result."""
        tracking.commit()
        task = _entry(self.task).build(self.task)
        tracking.claim_folder(self.out, overwrite=self.overwrite)
        runs: list[Run] = []
        for seed in self.training.seeds:
            pair = [Trainer(task, self.training, rule, seed) for rule in (None, self.training.rule(self.rule))]
            if not runs:
                print(pair[1].report)
            runs += _train(pair, self.out, tensorboard=self.tensorboard)
            if self.training.when == "auto":
                print(pair[1].report)  # now with what was decided
        _finish(self, task, self.out, runs)


@dataclass(frozen=True)
class Simplify(Generic[TaskConfig]):
    """Train dense, sparse (meProp), and sparse and simplified (meSimp), side by side; and time the models then."""

    task: TaskConfig
    training: TrainingConfig
    simplify: SimplifyConfig
    out: Path
    """Folder for result.json, the pictures curves.png, widths.png and activity.png, and the simplified models, each as
    a plain torch module (compact-seed0.pt)."""
    rule: RuleName = "topk"
    """What the sparse runs back-propagate: the k largest entries of each output gradient, or k random ones."""
    seconds: float = 2.0
    """To spend on timing inference, for each seed."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train, measure, and write and show the result."""
        from rich.console import Console

        from meprop.reporting import figures, terminal
        from meprop.reporting import simplify as report

        _check_seconds(self.seconds)
        tracking.commit()
        task = _entry(self.task).build(self.task)
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
            runs += _train([*trainers, simplified], self.out, tensorboard=self.tensorboard)
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


@dataclass(frozen=True)
class Reproduce(Generic[Names]):
    """Repeat experiments of the paper, and set the results beside its own; runs that are finished are not repeated."""

    names: Names
    """Experiments by name, or paths of .toml files of your own in the same form."""
    list: bool = False
    """Show the names of the shipped experiments, and how many of their runs are finished."""
    out: Path = Path("benchmarks/results")
    """Folder for results: a folder per experiment, with a file per finished run and a checkpoint per unfinished one."""
    seeds: tuple[int, ...] = ()
    """Run, or with --list count, these seeds instead of the experiment's; the table shows all that are finished."""
    data_dir: Path | None = None
    """Folder of the task's data. Default: $MEPROP_DATA, then the cache, then a download."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    page: Path | None = None
    """Replace the sections of this Markdown file by the results in --out, and the figures beside it."""
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
        configs = {name: entry.config for name, entry in _tasks().items()}
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
        with _threads(self.threads):
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
        from filelock import FileLock, Timeout

        from meprop.reporting import reproduce as report

        records = self._records(experiment)
        records.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(records.folder / ".lock", timeout=0):
                records, diverged = self._run_missing(experiment, records)
        except Timeout as error:
            raise MepropError(
                f"{records.folder}: another meprop reproduce is at work there; wait for it, or give another --out"
            ) from error
        print(f"\n{experiment.title}\n\n{report.table(experiment, records)}\n\n{report.LEGEND}")
        drawn = report.draw_densities(experiment, records, records.folder / report.FIGURE)
        print(f"written: {records.folder}" + (f", {records.folder / report.FIGURE}" if drawn else ""))
        return diverged

    def _run_missing(self, experiment: Experiment, records: Records) -> tuple[Records, list[str]]:
        """Run what is not finished; return the records, with the data if they were read, and what diverged."""

        @functools.cache
        def load(config: Any) -> Task:
            return _entry(config).build(replace(config, data_dir=self.data_dir))

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
                        records.checkpoint(variant, seed).unlink(missing_ok=True)
                diverged += self._train(records, unfinished, load, seed)
        return records, diverged

    def _train(
        self, records: Records, variants: Sequence[Variant], load: Callable[[Any], Task], seed: int
    ) -> list[str]:
        """Train variants in turns, from checkpoints where there are any, record them, and return what diverged."""
        if not variants:
            return []
        saved: list[_Saved] = []
        for variant in variants:
            path, task = records.checkpoint(variant, seed), load(variant.task)
            settings = {**variant.settings(), "seed": seed, "data": records.data[variant.name]}
            beside = [other.name for other in variants if other is not variant]
            trainer = variant.trainer(task, seed)
            if path.exists():
                try:
                    earlier = checkpoint.resume(path, trainer, settings, type(variant.task))["beside"]
                    beside = earlier if trainer.finished else [name for name in beside if name in earlier]
                    _note(f"continuing {path} after {_position(trainer)}")
                except (ValueError, DataError):
                    if not self.overwrite:
                        raise
                    trainer = variant.trainer(task, seed)  # the other may be half read
            saved.append(_Saved(trainer, path, settings, beside))
        trainers = [each.trainer for each in saved]
        try:
            runs = _train(trainers, records.folder, tensorboard=False, after_turn=_CheckpointSaver(saved).update)
        except KeyboardInterrupt:
            _note("stopped; the same command continues each run after its last whole epoch")
            raise
        except DivergedError as error:
            failed = variants[trainers.index(error.trainer)]
            message = f"{failed.name} of {records.folder.name}: {error}"
            _note(f"{message}; going on without it")
            others = [variant for variant in variants if variant is not failed]
            return [message, *self._train(records, others, load, seed)]
        for variant, run, each in zip(variants, runs, saved, strict=True):
            records.write(variant, run, each.trainer.task, each.beside)
            each.path.unlink(missing_ok=True)
        return []


@dataclass(frozen=True)
class Data(Generic[TaskConfig]):
    """Find or download the data of a task, and say what is there."""

    task: TaskConfig

    def run(self) -> None:
        """Read the data, and print what and where they are."""
        entry = _entry(self.task)
        print(entry.load(self.task))
        print(f"in {entry.locate(getattr(self.task, 'data_dir', None))}")


@dataclass(frozen=True)
class Doctor:
    """Show what this installation can use: backends, versions, machine and data."""

    def run(self) -> None:
        """Print it; what is missing is told, and is no error."""
        for title, facts in (
            ("backends", meprop.backend_info()),
            ("versions", tracking.versions()),
            ("machine", machine.describe()),
        ):
            print(title)
            for name, value in facts.items():
                print(f"  {name}: {value}")
        print(f"commit: {tracking.commit() or 'unknown (not a source checkout)'}")
        print("data")
        for name, entry in _tasks().items():
            print(f"  {name}: {entry.locate(None) or f'not here yet; get them with: meprop data {name}'}")


@dataclass(frozen=True)
class BenchLinear:
    """Time the backward pass of a linear layer, sparse against dense, over shapes and densities."""

    out: Path = Path("runs/bench-linear")
    """Folder for result.json and curves.png."""
    cases: tuple[str, ...] = ("*",)
    """Patterns of the grid's cases, such as 'batch-*', or names of others, such as example-fp32-64x512x512-k20."""
    seconds: float = 3.0
    """To spend on the timing of each case; a slow one takes longer, for 9 rounds."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    page: Path | None = None
    """Replace the section of this Markdown file by the results, and the figure beside it."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Check and time the cases, and write and show the result."""
        from meprop.bench import linear
        from meprop.reporting import bench_linear as report
        from meprop.reporting import pages

        _check_seconds(self.seconds)
        cases = linear.choose_cases(self.cases)
        if self.page is not None:
            pages.check_section(self.page, report.SECTION)

        def show(result: linear.CaseResult) -> None:
            ratio = "WRONG" if result.wrong is not None else f"{result.ratios['dense'].p20:.2f}x"
            _note(f"{result.name}: {ratio}")

        with _threads(self.threads):
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            bench = linear.run(cases, self.seconds, tracking.plain(self), show)
        report.write(bench, self.out, self.page)
        _show_bench(bench, report.table(bench.cases), report.LEGEND, self.out)


@dataclass(frozen=True)
class BenchLstm:
    """Time a layer of an LSTM, sparse against torch's own: forward pass and backward pass, over sizes and k."""

    out: Path = Path("runs/bench-lstm")
    """Folder for result.json."""
    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, such as '*-k5', or names of others, such as example-25x32x190x500-k20."""
    seconds: float = 3.0
    """To spend on the timing of each pass of a case; a slow one takes longer, for 9 rounds."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    page: Path | None = None
    """Replace the section of this Markdown file by the results."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Check and time the cases, and write and show the result."""
        from meprop.bench import lstm
        from meprop.reporting import bench_lstm as report
        from meprop.reporting import pages

        _check_seconds(self.seconds)
        cases = lstm.choose_cases(self.cases)
        if self.page is not None:
            pages.check_section(self.page, report.SECTION)

        def show(result: lstm.CaseResult) -> None:
            _note(f"{result.name}: {'WRONG' if result.backward is None else f'{result.backward.p20:.2f}x'}")

        with _threads(self.threads):
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            bench = lstm.run(cases, self.seconds, tracking.plain(self), show)
        _write_bench(bench, self.out, self.page, report.SECTION, report.markdown(bench))
        _show_bench(bench, report.table(bench.cases), report.LEGEND, self.out)


@dataclass(frozen=True)
class BenchConv:
    """Time the backward pass of a convolution, sparse against torch's own in float32 and bfloat16."""

    out: Path = Path("runs/bench-conv")
    """Folder for result.json."""
    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, such as '*-last', or names of others, such as
    batch-conv2d-32x128x256-size28-kernel3-k26."""
    seconds: float = 3.0
    """To spend on the timing of each case; a slow one takes longer, for 9 rounds."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    page: Path | None = None
    """Replace the section of this Markdown file by the results."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Check and time the cases, and write and show the result."""
        from meprop.bench import conv
        from meprop.reporting import bench_conv as report
        from meprop.reporting import pages

        _check_seconds(self.seconds)
        cases = conv.choose_cases(self.cases)
        if self.page is not None:
            pages.check_section(self.page, report.SECTION)

        def show(result: conv.CaseResult) -> None:
            ratio = "WRONG" if result.wrong is not None else f"{result.ratios['dense_fp32'].p20:.2f}x"
            _note(f"{result.name}: {ratio}")

        with _threads(self.threads):
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            bench = conv.run(cases, self.seconds, tracking.plain(self), show)
        _write_bench(bench, self.out, self.page, report.SECTION, report.markdown(bench))
        _show_bench(bench, report.table(bench.cases), report.LEGEND, self.out)


@dataclass(frozen=True)
class BenchLayers(Generic[TaskConfig]):
    """Time the hidden layers of a task, sparse against dense, on what they see in training; and the whole step."""

    task: TaskConfig
    out: Path
    """Folder for result.json."""
    k: int | float
    """How many entries of each output gradient are kept: a count (20), or a share of the features (0.05)."""
    scope: Literal["example", "batch"]
    """Choose the k entries for each example, or once for the whole batch (simple unified top-k)."""
    optimizer: Literal["adam", "adagrad", "sgd"]
    """Optimizer of the whole step; torch's fused implementation."""
    steps: int = 200
    """Of dense training before gradients are recorded; at most an epoch."""
    batches: int = 4
    """Batches to record; times are means over them."""
    seconds: float = 5.0
    """To spend on the timing of each layer; a slow one takes longer, for 9 rounds."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    keep_memory: bool = False
    """Let the C library keep freed memory, as training from the command line does; dense gains more than sparse."""
    page: Path | None = None
    """Replace the task's section of this Markdown file by the results."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Train, check and time, and write and show the result."""
        from meprop.bench import layers
        from meprop.reporting import bench_layers as report
        from meprop.reporting import pages

        _check_seconds(self.seconds)
        _keep_memory(self.keep_memory)
        if self.steps < 0:
            raise ValueError(f"--steps must be 0 or more, got {self.steps}")
        if self.batches < 1:
            raise ValueError(f"--batches must be at least 1, got {self.batches}")
        entry = _entry(self.task)
        choices = {"k": self.k, "scope": self.scope, "optimizer": self.optimizer}
        training = replace(entry.training, epochs=1, schedule="constant", accelerator="cpu", **choices)
        task = entry.build(self.task)
        section = report.section(task.name)
        if self.page is not None:
            pages.check_section(self.page, section)

        def show(row: layers.Comparison) -> None:
            _note(f"{row.name}: {'WRONG' if row.ratio is None else f'{row.ratio.p20:.2f}x'}")

        with _threads(self.threads):
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            bench = layers.run(task, training, self.steps, self.batches, self.seconds, tracking.plain(self), show)
        _write_bench(bench, self.out, self.page, section, report.markdown(bench))
        _show_bench(bench, report.table(bench.layers), report.LEGEND, self.out)


@dataclass(frozen=True)
class BenchStep:
    """Time whole training steps of multilayer perceptrons, dense and sparse: forward pass, backward pass, optimizer."""

    out: Path = Path("runs/bench-step")
    """Folder for result.json and the figure."""
    models: tuple[str, ...] = ("841-2500-2000-1500-1000-500-10@100", "784-500-500-10@100", "784-500-500-10@10")
    """Widths and batch of each."""
    optimizers: tuple[Literal["sgd", "momentum", "adagrad", "adam", "adamw"], ...] = ("adam",)
    """With each of which to time each model; sgd is without momentum."""
    k: int | float = 0.04
    """How many entries of each hidden layer's output gradient are kept: a count (20), or a share of the features."""
    seconds: float = 3.0
    """To spend on each way of doing the step; a slow one takes longer, for 9 rounds."""
    threads: int = 0
    """Threads of dense and sparse alike; 0 for torch's own choice."""
    keep_memory: bool = False
    """Let the C library keep freed memory, as training from the command line does; dense gains more than sparse."""
    page: Path | None = None
    """Replace the section of this Markdown file by the results, and draw the figure beside it."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Check and time, and write and show the result."""
        from meprop.bench import step
        from meprop.reporting import bench_step as report
        from meprop.reporting import pages

        _check_seconds(self.seconds)
        _keep_memory(self.keep_memory)
        meprop.TopK(self.k)
        models = [step.Model.parse(name) for name in self.models]
        if not models or not self.optimizers:
            raise ValueError("--models and --optimizers: there must be at least one of each")
        if self.page is not None:
            pages.check_section(self.page, report.SECTION)

        def show(result: step.CaseResult) -> None:
            _note(f"{result.name}: {'WRONG' if any(way.wrong for way in result.ways) else 'timed'}")

        with _threads(self.threads):
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            bench = step.run(models, self.optimizers, self.k, self.seconds, tracking.plain(self), show)
        report.draw(bench, self.out / report.FIGURE)
        if self.page is not None:
            report.draw(bench, self.page.parent / report.FIGURE)
        _write_bench(bench, self.out, self.page, report.SECTION, report.markdown(bench))
        _show_bench(bench, report.table(bench.cases), report.LEGEND, self.out)


def _write_bench(bench: Record, out: Path, page: Path | None, section: str, content: str) -> None:
    """Write result.json, and the section of a page if one is given."""
    from meprop.reporting import pages

    tracking.write_result(out / tracking.RESULT, bench)
    if page is not None:
        pages.write_sections(page, {section: content})


def _show_bench(bench: Record, table: str, legend: str, out: Path) -> None:
    """Print what was measured.

    Raises:
        MepropError: Something was wrong.
    """
    print(f"{table}\n\n{legend}\nwritten: {out / tracking.RESULT}")
    if bench.wrong:
        raise MepropError(f"wrong, and not timed: {', '.join(bench.wrong)}")


def _keep_memory(wanted: bool) -> None:
    if wanted and not machine.keep_freed_memory():
        raise MepropError(
            "--keep-memory: the C library is not glibc, or MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or "
            "GLIBC_TUNABLES in the environment says what it does; leave out the one or the other"
        )


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds must be a positive number, got {seconds}")


# ---------------------------------------------------------------- what train and compare share


def _train(
    trainers: Sequence[Trainer],
    out: Path,
    *,
    tensorboard: bool,
    after_turn: Callable[[Trainer], None] = lambda trainer: None,
    turn: int = _TURN,
) -> list[Run]:
    """Train to the end, and show progress."""
    from meprop.reporting.terminal import TrainingProgress

    with TrainingProgress() as progress, tracking.LiveCurves(out, enabled=tensorboard) as curves:

        def after(trainer: Trainer) -> None:
            after_turn(trainer)
            progress.update(trainer)
            curves.update(trainer)

        return fit(trainers, after, turn)


def _finish(command: Train[Any] | Compare[Any], task: Task, out: Path, runs: list[Run]) -> None:
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


class _Saved(NamedTuple):
    """A run that is saved while it is not finished."""

    trainer: Trainer
    path: Path
    """Of its checkpoint."""
    settings: dict[str, Any]
    """Its own, its seed and its data."""
    beside: list[str]
    """What has been trained in turns with it from its beginning, by name."""


class _CheckpointSaver:
    """Saves runs together, so that they continue side by side.

    That is when the last of them ends an epoch, and, if `every` is not 0, when it has done that many steps.
    """

    def __init__(self, runs: Sequence[_Saved], every: int = 0) -> None:
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


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    """Lets torch use so many threads for a while; 0 for as many as it does."""
    if not 0 <= count <= _MOST_THREADS:
        raise ValueError(f"--threads must be from 0 to {_MOST_THREADS}, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _position(trainer: Trainer) -> str:
    return f"epoch {trainer.epoch}, step {trainer.step}" if trainer.step else f"epoch {trainer.epoch}"


def _note(text: str) -> None:
    print(f"meprop: {text}", file=sys.stderr)


# ---------------------------------------------------------------- from arguments to exit code


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done; 1 what was asked for failed; 2 the request is wrong; 130 interrupted.
    """
    if argv is None:
        # Adam's moments of weights that get no more gradient fade into denormal numbers, which make its step several
        # times as slow, dense or sparse. Said before the first parallel operation, so that its threads inherit it.
        torch.set_flush_denormal(True)
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        if argv is None and isinstance(command, Train | Compare | Simplify | Reproduce):
            machine.keep_freed_memory()
        command.run()
    except SystemExit as stop:  # --help, or what tyro rejects
        return stop.code if isinstance(stop.code, int) else 0
    except ValueError as error:
        _note(f"error: {error}")
        return 2
    except (MepropError, OSError) as error:
        _note(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "meprop":
            raise
        _note(f"error: {error.name} is not installed: pip install 'meprop[tasks]'")
        return 1
    except KeyboardInterrupt:
        _note("interrupted")
        return 130
    return 0


def _parse(argv: list[str]) -> Any:
    """Return the command that the arguments ask for.

    Raises:
        ValueError: If a value is refused by a dataclass.
        SystemExit: After help, or a message about arguments that do not parse.
    """
    import tyro
    from tyro.conf import subcommand

    def with_tasks(name: str, command: Any, defaults: Callable[[str, _TaskEntry], Any]) -> Any:
        of_task = [
            Annotated[command[entry.config], subcommand(task, default=defaults(task, entry))]
            for task, entry in _tasks().items()
        ]
        union: Any = Union[(*of_task, Annotated[None, tyro.conf.Suppress])]  # a union even while there is one task
        return Annotated[Any, subcommand(name, description=command.__doc__, constructor_factory=lambda: union)]

    def train(name: str, entry: _TaskEntry) -> Any:
        return Train(entry.config(), entry.training, Path("runs") / f"train-{name}")

    def compare(name: str, entry: _TaskEntry) -> Any:
        return Compare(entry.config(), entry.training, Path("runs") / f"compare-{name}")

    def simplify(name: str, entry: _TaskEntry) -> Any:
        training = replace(entry.training, k=160)  # that of the paper's code
        return Simplify(entry.config(), training, SimplifyConfig(), Path("runs") / f"simplify-{name}")

    def data(name: str, entry: _TaskEntry) -> Any:
        return Data(entry.config())

    def layers(name: str, entry: _TaskEntry) -> Any:
        training = entry.training
        out = Path("runs") / f"bench-layers-{name}"
        return BenchLayers(entry.config(), out, training.k, training.scope, training.optimizer)

    bench: Any = Union[  # noqa: UP007
        Annotated[BenchLinear, subcommand("linear")],
        Annotated[BenchLstm, subcommand("lstm")],
        Annotated[BenchConv, subcommand("conv")],
        with_tasks("layers", BenchLayers, layers),
        Annotated[BenchStep, subcommand("step")],
    ]
    names: Any = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")]
    commands: Any = Union[  # noqa: UP007 - `|` takes no Any
        with_tasks("train", Train, train),
        with_tasks("compare", Compare, compare),
        with_tasks("simplify", Simplify, simplify),
        Annotated[Reproduce[names], subcommand("reproduce")],
        with_tasks("data", Data, data),
        Annotated[Any, subcommand("bench", description="Measure speed.", constructor_factory=lambda: bench)],
        Annotated[Doctor, subcommand("doctor")],
    ]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                commands,
                prog="meprop",
                description="Cheaper training: back-propagate only the part of the gradient that matters (meProp).",
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        # tyro would show a dataclass's ValueError under its own internal names; what it could not read itself
        # ("--epochs x") has a message that names the option, and is left alone.
        for error in _causes(stop):
            if isinstance(error, ValueError) and _raised_by_us(error):
                raise error from None
        print(messages.getvalue(), end="", file=sys.stderr)
        raise


def _raised_by_us(error: BaseException) -> bool:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("meprop.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__context__) is not None:
        yield (error := cause)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `meprop train`, `compare`, `data`, `bench` and `doctor`.

Each command is a frozen dataclass: its fields are the options, their docstrings the help, its `run` what it does.
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union

import torch

import meprop
from meprop import machine
from meprop.errors import MepropError
from meprop.training import checkpoint, tracking
from meprop.training.loop import Run, Task, Trainer, TrainingConfig, fit

if TYPE_CHECKING:
    from collections.abc import Sequence

TaskConfig = TypeVar("TaskConfig")

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
    from meprop.tasks import mnist

    return {
        "mnist": _TaskEntry(
            mnist.MnistConfig, mnist.MnistTask, mnist.locate, mnist.load, TrainingConfig(epochs=10, k=20)
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
    rule: Literal["topk", "dense"] = "topk"
    """What to back-propagate: the k largest entries of each output gradient, or everything."""
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
        path = self.out / tracking.CHECKPOINT
        resumed = self.resume and path.exists()
        settings = {**tracking.plain(self.task), **tracking.plain(self.training), "rule": self.rule}
        settings.pop("data_dir", None)  # data may be moved
        saved = checkpoint.load(path, settings) if resumed else None

        task = _entry(self.task).build(self.task)
        rule = self.training.rule() if self.rule == "topk" else None
        trainer = Trainer(task, self.training, rule, self.training.seeds[0])
        if saved is not None:
            trainer.load_state_dict(saved)
            _note(f"continuing {path} after {_position(trainer)}")
        else:
            tracking.claim_folder(self.out, overwrite=self.overwrite)
            if self.resume:
                _note(f"{path} does not exist: starting from the beginning")
        if trainer.rule is not None:
            print(trainer.report)

        saver = _CheckpointSaver(trainer, path, settings, self.checkpoint_every)
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
    overwrite: bool = False
    """Replace an earlier experiment in --out."""
    tensorboard: bool = False
    """Write live curves to --out/tensorboard as well."""

    def run(self) -> None:
        """Train both, and write and show the result."""
        task = _entry(self.task).build(self.task)
        tracking.claim_folder(self.out, overwrite=self.overwrite)
        runs: list[Run] = []
        for seed in self.training.seeds:
            pair = [Trainer(task, self.training, rule, seed) for rule in (None, self.training.rule())]
            if not runs:
                print(pair[1].report)
            runs += _train(pair, self.out, tensorboard=self.tensorboard)
            if self.training.when == "auto":
                print(pair[1].report)  # now with what was decided
        _finish(self, task, self.out, runs)


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
        import torch

        from meprop.bench import linear
        from meprop.reporting import bench_linear as report

        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds must be a positive number, got {self.seconds}")
        if self.threads < 0:
            raise ValueError(f"--threads must be 0 or more, got {self.threads}")
        cases = linear.choose_cases(self.cases)
        if self.page is not None:
            report.check_page(self.page)
        tracking.claim_folder(self.out, overwrite=self.overwrite)

        def show(result: linear.CaseResult) -> None:
            ratio = "WRONG" if result.wrong is not None else f"{result.ratios['dense'].p20:.2f}x"
            _note(f"{result.name}: {ratio}")

        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads or threads)
        try:
            bench = linear.run(cases, self.seconds, tracking.plain(self), show)
        finally:
            torch.set_num_threads(threads)
        path = report.write(bench, self.out, self.page)
        print(report.table(bench.cases))
        print(f"\n{report.LEGEND}\nwritten: {path}")
        if bench.wrong:
            raise MepropError(f"differs from the oracle, and was not timed: {', '.join(bench.wrong)}")


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
    path = tracking.write_result(out, result)
    figure = out / tracking.FIGURE
    draw_runs(runs, task.metric, figure)
    Console().print(run_table(runs, task.metric))
    if isinstance(command, Compare):
        print(verdict(runs, task.metric))
    print(f"written: {path}, {figure}")


class _CheckpointSaver:
    """Saves a trainer at each epoch's end, and, if `every` is not 0, when that many steps have passed."""

    def __init__(self, trainer: Trainer, path: Path, settings: dict[str, Any], every: int) -> None:
        self._path, self._settings, self._every = path, settings, every
        self._epoch, self._step = trainer.epoch, trainer.step

    def update(self, trainer: Trainer) -> None:
        """Save if it is time to."""
        if trainer.epoch > self._epoch or (self._every and trainer.step - self._step >= self._every):
            checkpoint.save(self._path, trainer.state_dict(), self._settings)
            self._epoch, self._step = trainer.epoch, trainer.step


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
        _parse(sys.argv[1:] if argv is None else argv).run()
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


def _parse(argv: list[str]) -> Train[Any] | Compare[Any] | Data[Any] | BenchLinear | Doctor:
    """Return the command that the arguments ask for.

    Raises:
        ValueError: If a value is refused by a dataclass.
        SystemExit: After help, or a message about arguments that do not parse.
    """
    import tyro
    from tyro.conf import subcommand

    def with_tasks(command: Any, defaults: Callable[[str, _TaskEntry], Any]) -> Any:
        of_task = [
            Annotated[command[entry.config], subcommand(name, default=defaults(name, entry))]
            for name, entry in _tasks().items()
        ]
        union: Any = Union[(*of_task, Annotated[None, tyro.conf.Suppress])]  # a union even while there is one task
        name, described = command.__name__.lower(), command.__doc__
        return Annotated[Any, subcommand(name, description=described, constructor_factory=lambda: union)]

    def train(name: str, entry: _TaskEntry) -> Any:
        return Train(entry.config(), entry.training, Path("runs") / f"train-{name}")

    def compare(name: str, entry: _TaskEntry) -> Any:
        return Compare(entry.config(), entry.training, Path("runs") / f"compare-{name}")

    def data(name: str, entry: _TaskEntry) -> Any:
        return Data(entry.config())

    # a union even while there is one benchmark
    bench: Any = Union[  # noqa: UP007
        Annotated[BenchLinear, subcommand("linear")], Annotated[None, tyro.conf.Suppress]
    ]
    commands: Any = Union[  # noqa: UP007 - `|` takes no Any
        with_tasks(Train, train),
        with_tasks(Compare, compare),
        with_tasks(Data, data),
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

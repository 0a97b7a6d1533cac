"""`meprop bench`: one command for all benchmarks, see `meprop.bench.base`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from meprop.cli.common import forms, threads, with_tasks
from meprop.cli.messages import note
from meprop.cli.stop import StopRequest
from meprop.errors import MepropError
from meprop.training import folder, tasks, tracking
from meprop.training.tasks import TaskEntry

if TYPE_CHECKING:
    from meprop.bench.base import Bench

BenchT = TypeVar("BenchT", bound="Bench[Any, Any]")


@dataclass(frozen=True)
class RunBench(Generic[BenchT]):
    """Measure speed: run a benchmark, and write and show the result."""

    bench: BenchT
    out: Path | None = None
    """Folder for result.json, and for the figure if there is one. None: a folder in runs/ that has the name of the
    benchmark and of its task, or of your file and function."""
    threads: int = 0
    """Threads of dense and sparse alike; 0: torch's own choice."""
    page: Path | None = None
    """Markdown file whose section for this benchmark, and the figure beside it, are replaced by the results."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    @property
    def config(self) -> dict[str, Any]:
        """All options by name, as plain data: what the record keeps."""
        options = tracking.plain(replace(self, out=self.folder))
        return {**options.pop("bench"), **options}

    @property
    def folder(self) -> Path:
        """The folder that is written to."""
        return self.out or Path("runs") / self.bench.folder

    def run(self) -> None:
        """Measure, and write and show the result.

        Raises:
            MepropError: Something was wrong, and was not timed.
        """
        from meprop.reporting import pages

        bench = self.bench.on_device()
        measure = bench.prepare()
        if self.page is not None:
            pages.check_section(self.page, bench.section)
        with threads(self.threads), folder.owned(self.folder), StopRequest() as stop:
            if not self.overwrite:
                folder.check_free(self.folder)

            def after(result: Any) -> None:
                note(bench.outcome(result))
                stop.check()

            record = measure(self.config, after)
            try:
                folder.clear(self.folder)
                tracking.write_result(self.folder / tracking.RESULT, record)
                if bench.figure is not None:
                    bench.draw(record, self.folder / bench.figure)
                if self.page is not None and not stop():
                    bench.write_page(record, self.page)
            finally:
                print(f"{bench.table(record.results)}\n\n{bench.legend}")
            print(f"written: {self.folder / tracking.RESULT}")
            stop.check()
        if record.wrong:
            raise MepropError(f"wrong, and not timed: {', '.join(record.wrong)}")


def options() -> Any:
    """Return the type that `tyro` reads the options from: a new benchmark is one line here."""
    from meprop.bench import conv, linear, lstm, step

    return forms(_form(linear.Linear), _form(lstm.Lstm), _form(conv.Conv), _layers_form(), _form(step.Step))


def _form(bench: type[Bench[Any, Any]]) -> Any:
    import tyro

    about = tyro.conf.subcommand(bench.name, description=bench.__doc__, default=RunBench(bench()))
    return Annotated[RunBench[bench], about]


def _layers_form() -> Any:
    """That of the benchmark which has a form for each task."""
    import tyro

    from meprop.bench.layers import Layers, of_task

    def default(_name: str, entry: TaskEntry) -> Any:
        return RunBench(of_task(entry.config(), entry.training))

    def form(entry: TaskEntry) -> Any:
        bench: Any = type(of_task(entry.config(), entry.training))
        return RunBench[bench[entry.config]]

    each_task = with_tasks(str(Layers.__doc__), form, default, tasks.with_script())
    about = tyro.conf.subcommand(Layers.name, description=Layers.__doc__, constructor_factory=lambda: each_task)
    return Annotated[Any, about]

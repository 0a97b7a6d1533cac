"""What a benchmark is: the protocol that `meprop bench NAME` runs.

A new benchmark is one file, and a line in `meprop.cli.bench`. The file has a frozen dataclass, which is a subclass of
`Bench`, `TableBench` or `cases.CasesBench`. Its fields are the options. Its docstrings are the help.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from meprop import machine
from meprop.bench.measure import Ratio
from meprop.bench.record import Record
from meprop.errors import MepropError
from meprop.reporting import pages
from meprop.table import text_table

ResultT = TypeVar("ResultT")
RecordT = TypeVar("RecordT", bound=Record)

Measure = Callable[[Mapping[str, Any], Callable[[ResultT], None]], RecordT]
"""Measures, and returns the record. It takes settings, which the record keeps, and what is called with each result."""


class Bench(ABC, Generic[ResultT, RecordT]):
    """A benchmark.

    Attributes:
        name: Of the command, e.g. "conv".
        legend: What a reader of the tables needs to know.
        figure: The file name of the figure in the folder of the results; None: there is no figure.
        figure_title: What a page says in place of the figure to those who cannot see it.
    """

    name: ClassVar[str]
    legend: ClassVar[str]
    figure: ClassVar[str | None] = None
    figure_title: ClassVar[str] = ""

    @property
    def section(self) -> str:
        """The name of a page's section for the results."""
        return f"bench {self.name}"

    @property
    def folder(self) -> str:
        """The name of a folder for the results."""
        return self.section.replace(" ", "-")

    def on_device(self) -> Bench[Any, Any]:
        """Return itself, or the benchmark of the same thing on the device that its options name."""
        return self

    @abstractmethod
    def prepare(self) -> Measure[ResultT, RecordT]:
        """Check the options, read what is needed, and return what measures.

        Raises:
            ValueError: An option is wrong; the message names it.
        """

    @abstractmethod
    def outcome(self, result: ResultT) -> str:
        """Return a line about a result, for those who wait."""

    @abstractmethod
    def table(self, results: Sequence[ResultT]) -> str:
        """Return the results as plain text, with what is wrong."""

    @abstractmethod
    def blocks(self, results: Sequence[ResultT]) -> list[str]:
        """Return the results as paragraphs of Markdown."""

    def about(self, record: RecordT) -> str:
        """Return in words how the results came about."""
        return record.circumstances

    def markdown(self, record: RecordT, figure: str | None = None) -> str:
        """Return the section of a page.

        Args:
            record: What was measured.
            figure: The name of the figure's file beside the page; None if there is none.
        """
        picture = [f"![{self.figure_title}]({figure})"] if figure else []
        return "\n\n".join([self.about(record), *picture, *self.blocks(record.results), self.legend])

    def draw(self, record: RecordT, path: Path) -> bool:
        """Draw the figure into a PNG, which is replaced if it exists. Return whether there was something to draw."""
        del record, path
        return False

    def figure_beside(self, page: Path) -> Path:
        """Return the path of a page's figure."""
        return page.with_name(f"{page.stem}-{self.name}.png")

    def write_page(self, record: RecordT, page: Path) -> None:
        """Replace the section of a page, and the figure beside it; the text around the section stays.

        Raises:
            ValueError: The page has no such section.
        """
        pages.check_section(page, self.section)
        figure = self.figure_beside(page)
        drawn = self.draw(record, figure)
        pages.write_sections(page, {self.section: self.markdown(record, figure.name if drawn else None)})


class TableBench(Bench[ResultT, RecordT]):
    """A benchmark whose results, with `name` and `wrong`, are the rows of one table.

    Attributes:
        head: The titles of the columns.
    """

    head: ClassVar[Sequence[str]]

    @abstractmethod
    def cells(self, result: Any) -> list[str]:
        """Return the row of a result. A wrong one has WRONG in the place of its ratio, and no times."""

    @abstractmethod
    def ratio(self, result: Any) -> Ratio:
        """Return the ratio that tells most about a result that is right."""

    def outcome(self, result: Any) -> str:
        """Return the name and the ratio."""
        return f"{result.name}: " + ("WRONG" if result.wrong is not None else f"{self.ratio(result).p20:.2f}x")

    def table(self, results: Sequence[Any]) -> str:
        """Return a line per result, and below them why some are wrong."""
        return table_of(self.head, results, self.cells)

    def blocks(self, results: Sequence[Any]) -> list[str]:
        """Return the table."""
        return [pages.markdown_table([self.head, *map(self.cells, results)])]


def table_of(head: Sequence[str], results: Sequence[Any], cells: Callable[[Any], Sequence[str]]) -> str:
    """Return a table of plain text with a line per result, and below it a line for each that is wrong."""
    wrong = (f"WRONG: {result.name}: {result.wrong}" for result in results if result.wrong is not None)
    return "\n".join([text_table([head, *map(cells, results)]), *wrong])


def keep_freed_memory(wanted: bool) -> None:
    """Let the C library keep freed memory for the rest of the process, if that is wanted.

    Raises:
        MepropError: It is wanted and cannot be had.
    """
    if wanted and not machine.keep_freed_memory():
        raise MepropError(
            "--keep-memory: the C library is not glibc, or MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or "
            "GLIBC_TUNABLES in the environment says what it does; leave out the one or the other"
        )

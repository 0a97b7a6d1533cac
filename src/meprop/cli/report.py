"""`meprop report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

Runs = TypeVar("Runs", bound=tuple[Path, ...])
Out = TypeVar("Out", bound=Path | None)


@dataclass(frozen=True)
class Report(Generic[Runs, Out]):
    """`meprop report` with its options."""

    runs: Runs
    """Folders with a result.json of train, compare or simplify, or such files, those of reproduce too."""
    out: Out = None  # pyright: ignore[reportAssignmentType]
    """The file of the page, which needs no network. By default it is report.html beside the first result."""
    overwrite: bool = False
    """Replace --out if it is no such page. A page of this command is always replaced."""

    def run(self) -> None:
        """Write the page."""
        from meprop.reporting.page import write_report

        print(f"written: {write_report(self.runs, self.out, overwrite=self.overwrite)}")


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    import tyro

    runs: Any = Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)")
    ]
    out: Any = Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    return Report[runs, out]

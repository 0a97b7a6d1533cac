"""`meprop committee`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from meprop import machine
from meprop.table import text_table
from meprop.training import tracking
from meprop.training.committee import Errors, Member, errors_of, read_member

Runs = TypeVar("Runs", bound=tuple[Path, ...])
Out = TypeVar("Out", bound=Path | None)


@dataclass(frozen=True)
class Record(tracking.Provenance):
    """The content of the file of a committee."""

    members: list[dict[str, Any]]
    """The settings of each run."""
    test: dict[str, Any]
    """`training.committee.Errors` on the test images."""


@dataclass(frozen=True)
class Committee(Generic[Runs, Out]):
    """`meprop committee` with its options."""

    runs: Runs
    """Folders of meprop train mnist or digits, two or more, whose runs are finished. Those of compare keep no network.
    The test images are the same. Networks, rules, seeds, training images and --digit-width may differ."""
    data_dir: Path | None = None
    """Folder of the data. By default it is the one that each run was given."""
    out: Out = None  # pyright: ignore[reportAssignmentType]
    """JSON file for the errors, with settings, machine, versions and commit."""
    overwrite: bool = False
    """Replace --out."""

    def run(self) -> None:
        """Let the members look at the test images, and write and show their errors."""
        if len({folder.resolve() for folder in self.runs}) < len(self.runs):
            raise ValueError("a run is given twice: each member of a committee is another network")
        if self.out is not None:
            self._check_out(self.out)
        members = [read_member(folder, self.data_dir) for folder in self.runs]
        found = errors_of(members)
        print(table(members, found))
        if self.out is not None:
            self._write(self.out, members, found)

    def _check_out(self, path: Path) -> None:
        """Refuse a file that is there, unless it is to be replaced; and a folder, or a file of a run, in any case."""
        of_runs = {(folder / name).resolve() for folder in self.runs for name in (tracking.RESULT, tracking.CHECKPOINT)}
        if path.is_dir() or path.resolve() in of_runs:
            raise ValueError(f"--out {path} is {'a folder' if path.is_dir() else 'of a run'}; give another file")
        if path.exists() and not self.overwrite:
            raise ValueError(f"{path} exists; give another --out, or --overwrite to replace it")

    def _write(self, path: Path, members: list[Member], found: Errors) -> None:
        record = Record(
            task="committee",
            config=tracking.plain(self),
            machine=machine.describe(),
            versions=tracking.versions(),
            commit=tracking.commit(),
            members=[each.settings for each in members],
            test=asdict(found),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        tracking.write_result(path, record)
        print(f"written: {path}")


def table(members: list[Member], found: Errors) -> str:
    """Return the errors of members, their mean, and that of all together, as lines of text."""
    rows = [
        (str(each.folder), str(each.settings["rule"]), str(each.settings["seed"]), f"{error:.2f}")
        for each, error in zip(members, found.members, strict=True)
    ]
    ratio = "no member errs" if found.ratio is None else f"{found.ratio:.2f}"
    return text_table(
        [
            ("run", "rule", "seed", "test error, %"),
            *rows,
            ("mean", "", "", f"{found.mean:.2f}"),
            ("committee", "", "", f"{found.committee:.2f}"),
            ("committee / mean", "", "", ratio),
        ]
    )


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    import tyro

    runs: Any = Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)")
    ]
    out: Any = Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    return Committee[runs, out]

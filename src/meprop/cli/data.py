"""`meprop data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from meprop.cli.commands import HELP
from meprop.cli.common import TaskConfig, with_tasks
from meprop.training import tasks


@dataclass(frozen=True)
class Data(Generic[TaskConfig]):
    """`meprop data` with its options."""

    task: TaskConfig

    def run(self) -> None:
        """Read the data, and print what and where they are."""
        entry = tasks.entry_of(self.task)
        print(entry.load(self.task))
        print(f"in {entry.locate(getattr(self.task, 'data_dir', None))}")


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    return with_tasks(HELP["data"], lambda entry: Data[entry.config], lambda _name, entry: Data(entry.config()))

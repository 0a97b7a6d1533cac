"""`meprop data` and `meprop doctor`: what is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import meprop
from meprop import machine
from meprop.cli.common import Command, TaskConfig, absent, extras, missing, with_tasks
from meprop.errors import MepropError
from meprop.training import tasks, tracking


@dataclass(frozen=True)
class Data(Generic[TaskConfig]):
    """Find or download the data of a task, and say what is there."""

    task: TaskConfig

    def run(self) -> None:
        """Read the data, and print what and where they are."""
        entry = tasks.entry_of(self.task)
        print(entry.load(self.task))
        print(f"in {entry.locate(getattr(self.task, 'data_dir', None))}")


@dataclass(frozen=True)
class Doctor:
    """Show what this installation can use: backends, extras, versions, machine and data."""

    def run(self) -> None:
        """Print it; what is missing is told, and is no error."""
        for title, facts in (
            ("backends", meprop.backend_info()),
            ("extras", {extra: self._state(extra, modules) for extra, modules in extras().items()}),
            ("versions", tracking.versions()),
            ("machine", machine.describe()),
        ):
            print(title)
            for name, value in facts.items():
                print(f"  {name}: {value}")
        print(f"commit: {tracking.commit() or 'unknown (not a source checkout)'}")
        print("data")
        try:
            for name, entry in tasks.table().items():
                print(f"  {name}: {entry.locate(None) or f'not here yet; get them with: meprop data {name}'}")
        except ModuleNotFoundError as error:
            print(f"  not looked for: {missing(error)}")
        except (MepropError, ValueError) as error:  # such as a machine without a home directory
            print(f"  not looked for: {error}")

    @staticmethod
    def _state(extra: str, modules: Sequence[str]) -> str:
        lacking = absent(modules)
        return f"without {', '.join(lacking)}: pip install 'meprop[{extra}]'" if lacking else "installed"


def _data_forms() -> Any:
    return with_tasks(Data, lambda entry: Data[entry.config], lambda _name, entry: Data(entry.config()))


DATA = Command("data", str(Data.__doc__), _data_forms)
DOCTOR = Command("doctor", str(Doctor.__doc__), lambda: Doctor)

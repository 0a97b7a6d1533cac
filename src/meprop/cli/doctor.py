"""`meprop doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import meprop
from meprop import machine
from meprop.cli.messages import absent, extras, missing
from meprop.errors import MepropError
from meprop.training import tasks, tracking


@dataclass(frozen=True)
class Doctor:
    """`meprop doctor`, which has no options."""

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


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    return Doctor

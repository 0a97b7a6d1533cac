"""`meprop init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from meprop import machine
from meprop.cli.common import Command

File = TypeVar("File", bound=Path)


@dataclass(frozen=True)
class Init(Generic[File]):
    """Write a file to fill in: a training of your own, for train, compare and simplify."""

    file: File
    """The file, which must not be there yet."""

    def run(self) -> None:
        """Write it."""
        from meprop.training import template

        if self.file.suffix != ".py":
            raise ValueError(f"{self.file}: give a name that ends with .py")
        if self.file.exists():
            raise ValueError(f"{self.file} exists; give another name")
        text = Path(template.__file__).read_bytes()
        machine.write_atomically(self.file, lambda file: file.write(text))
        print(f"written: {self.file}; it works as it is: meprop compare {self.file}:make")


def _options() -> Any:
    import tyro

    file: Any = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]
    return Init[file]


INIT = Command("init", str(Init.__doc__), _options)

"""`meprop init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from meprop import machine

File = TypeVar("File", bound=Path)


@dataclass(frozen=True)
class Init(Generic[File]):
    """`meprop init` with its options."""

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


def options() -> Any:
    """Return the type that `tyro` reads the options from."""
    import tyro

    file: Any = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]
    return Init[file]

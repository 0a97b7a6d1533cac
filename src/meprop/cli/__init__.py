"""The command line: `meprop train`, `compare`, `simplify`, `reproduce`, `data`, `bench` and `doctor`.

Each command is a frozen dataclass. Its fields are the options, their docstrings are the help, and `run` does the work.
"""

from meprop.cli.main import main

__all__ = ["main"]

"""The command line. Its commands are listed in `commands.py`.

Each command is a frozen dataclass in a module of its name. Its fields are the options, their docstrings are the help,
and `run` does the work. `options` returns the type that `tyro` reads.
"""

from meprop.cli.main import main

__all__ = ["main"]

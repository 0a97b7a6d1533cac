"""The command line: `meprop train`, `compare`, `simplify`, `reproduce`, `data`, `bench` and `doctor`.

Each command is a frozen dataclass. Its fields are the options, their docstrings are the help, and `run` does the work.
"""

import sys

try:
    from meprop.cli.main import main
except KeyboardInterrupt:  # the imports take a while
    sys.exit(130)

__all__ = ["main"]

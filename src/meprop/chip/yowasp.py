"""yosys and nextpnr as the Python packages of YoWASP, which need no installation beside pip's."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Literal

from meprop.errors import MepropError

Tool = Literal["yosys", "nextpnr_ecp5"]
_CALL = "import sys; from yowasp_{0} import run_{0}; sys.exit(run_{0}(sys.argv[1:]))"


def require(tool: Tool) -> None:
    """Do nothing if the package of a tool is installed.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    importlib.import_module(f"yowasp_{tool}")


def call(tool: Tool, folder: Path, *arguments: str) -> None:
    """Run a tool in a folder. It sees the files in it, and not each place of the disk.

    Raises:
        MepropError: The tool failed.
        ModuleNotFoundError: Its package is not installed.
    """
    require(tool)  # or it is missed in the other process, where the command line names no remedy
    command = [sys.executable, "-c", _CALL.format(tool), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise MepropError(f"{tool} failed: {done.stderr.strip()[-500:] or f'exit status {done.returncode}'}")

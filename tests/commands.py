"""The command `meprop` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

# Lightning Fabric imports torchmetrics where it is installed, and with it transformers. That takes seconds, and the
# extra [tasks] has neither.
WITHOUT = ["torchmetrics"]


def command(*arguments: str, without: Iterable[str] = (), before: str = "") -> list[str]:
    """As the script `meprop` starts it, where some modules are not installed, and after some other code."""
    missing = [*WITHOUT, *without]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n{before}\n"
    return [sys.executable, "-c", f"{code}from meprop.cli import main; sys.exit(main())", *arguments]


def run(*arguments: str, without: Iterable[str] = (), before: str = "", **options: Any) -> subprocess.CompletedProcess:
    """Its exit code, and what it says."""
    options = {"capture_output": True, "text": True, "check": False, **options}
    return subprocess.run(command(*arguments, without=without, before=before), **options)

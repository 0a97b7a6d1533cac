"""Lines on standard error, and what is said of packages that are not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.metadata import requires

_FOR_DEVELOPERS = ("test", "lint", "sweep")  # extras

_MODULES = {"scikit_learn": "sklearn"}  # of packages with another name than their module


def note(text: str) -> None:
    """Prints a line about what goes on, on standard error, if that is still there."""
    with contextlib.suppress(OSError):
        print(f"meprop: {text}", file=sys.stderr)


def extras() -> dict[str, list[str]]:
    """Return the modules of each extra for users, by its name, as the installed package declares them."""
    found: dict[str, list[str]] = {}
    for requirement in requires("meprop") or []:
        asked = re.fullmatch(r"([\w.-]+)[^;]*; *extra *== *[\"'](\w+)[\"']", requirement)
        if asked is not None and asked[1] != "meprop" and asked[2] not in _FOR_DEVELOPERS:
            name = asked[1].replace("-", "_")
            found.setdefault(asked[2], []).append(_MODULES.get(name, name))
    return found


def absent(modules: Sequence[str]) -> list[str]:
    """Return those of the modules that cannot be imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def missing(error: ModuleNotFoundError) -> str:
    """Return in words which module is not installed, and the command that installs it."""
    name = str(error.name).partition(".")[0]
    extra = next((extra for extra, modules in extras().items() if name in modules), "tasks")
    return f"{name} is not installed: pip install 'meprop[{extra}]'"

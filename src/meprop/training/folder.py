"""The folder of an experiment: one command owns it at a time, and only what is meprop's is replaced in it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Generator
from pathlib import Path

from meprop import machine
from meprop.errors import MepropError
from meprop.training import tracking

_OURS = re.compile(
    r"result\.json|report\.html|(curves|widths|activity|performance-step|explore)\.png|compact-seed\d+\.pt"
    r"|checkpoint(-[][\w:=,.+-]+-seed\d+)?(-before)*\.pt"
)
"""The files that an experiment may have, of whatever command."""


@contextlib.contextmanager
def owned(out: Path) -> Generator[None]:
    """Make a folder if it is not there, and keep other commands out of it for a while.

    What killed commands left unfinished there is removed.

    Raises:
        ValueError: It is a file.
        MepropError: Another command owns it.
        OSError: It cannot be written to.
    """
    from filelock import FileLock, Timeout

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MepropError(
            f"{out}: another meprop command is at work there; wait for it, or give another --out"
        ) from error
    except NotImplementedError:
        warnings.warn(f"{out}: its file system has no locks; let no other command write there", stacklevel=3)
    try:
        machine.remove_remains(out)
        yield
    finally:
        lock.release()


def check_free(out: Path) -> None:
    """Refuse a folder that holds an earlier experiment.

    Raises:
        ValueError: It does.
    """
    if earlier := _files(out):
        raise ValueError(f"{earlier[0]} exists; give another --out, or --overwrite to replace it")


def clear(out: Path) -> None:
    """Remove the files of an earlier experiment. Whatever else lies in the folder stays."""
    for path in _files(out):
        path.unlink(missing_ok=True)
    curves = out / tracking.TENSORBOARD
    for folder in (*(curves.iterdir() if curves.is_dir() else ()), curves):
        with contextlib.suppress(OSError):  # it has other files too, or is none
            folder.rmdir()


def _files(out: Path) -> list[Path]:
    """Return the files of an experiment that are there."""
    if not out.is_dir():
        return []
    curves = (out / tracking.TENSORBOARD).glob("*-seed*/events.out.tfevents.*")
    found = [*(path for path in out.iterdir() if _OURS.fullmatch(path.name)), *curves]
    there = [path for path in found if path.is_file() or path.is_symlink()]
    return sorted(there, key=lambda path: (path.name != tracking.RESULT, path))

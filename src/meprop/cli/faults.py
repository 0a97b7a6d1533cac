"""Telling a request that is refused from a fault of meprop, and what is left behind of a fault."""

from __future__ import annotations

import dis
import os
import sys
import tempfile
import traceback
from types import TracebackType

from meprop.cli.messages import note

FAULT = 70
"""The exit code after a fault of meprop, as in sysexits.h."""

_RAISES = {dis.opmap["RAISE_VARARGS"]}


def is_refusal(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` of meprop's own, with a message for the user.

    Any other error, such as that of a function that was given what it cannot take, is a fault.
    """
    last = _last(error.__traceback__)
    if last is None or not str(last.tb_frame.f_globals.get("__name__", "")).startswith("meprop."):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] in _RAISES


def report(error: BaseException) -> int:
    """Write a traceback to a file, say where it is, and return the exit code."""
    lines = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="meprop-fault-", suffix=".txt", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{lines}")
    except OSError:
        print(lines, end="", file=sys.stderr)
        path = "above"
    text = (str(error).splitlines() or [""])[0]
    note(f"internal error: {type(error).__name__}: {text}")
    note(f"this is a fault of meprop, not of the request; its traceback, to be reported, is {path}")
    return FAULT


def _last(found: TracebackType | None) -> TracebackType | None:
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    return found

"""What the command does before torch is imported, which takes seconds.

It answers Ctrl-C, gives the help of all commands, and does what needs no torch.
A program that imports meprop is left alone.
"""

import gc
import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _end(signum: int, frame: FrameType | None) -> None:
    """End with one line, the exit code, and no traceback."""
    with suppress(OSError):  # standard error may be gone
        os.write(2, b"meprop: interrupted\n")
    os._exit(128 + signum)


def _is_the_command() -> bool:
    """Whether the process is `meprop`, `python -m meprop` or `python -m meprop.cli`."""
    if sys.argv[0] == "-m":  # as long as Python imports the package of the module to be run
        return sys.orig_argv[-len(sys.argv)] in ("meprop", "meprop.cli")
    return os.path.basename(sys.argv[0]) == "meprop"


if _is_the_command():
    for _signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(_signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(_signum, _end)
    from meprop.cli.commands import HELP, WITHOUT_TORCH

    # None of them is --help or --version, or a mistake: torch has no part in the answer.
    if (HELP.keys() - WITHOUT_TORCH).isdisjoint(sys.argv[1:2]):
        from meprop.cli import main

        sys.exit(main())
    gc.disable()  # no garbage is made by imports; `meprop.cli.main` turns it on again

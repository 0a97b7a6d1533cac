"""Ctrl-C, and a request to end, while a command imports what it needs: one line, the exit code, and no traceback."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _end(signum: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # standard error may be gone
        os.write(2, b"meprop: interrupted\n")
    os._exit(128 + signum)


# Python sets argv[0] to "-m" while it imports the package of a module to be run. A program that imports meprop is left
# alone.
if os.path.basename(sys.argv[0]) == "meprop" or (sys.argv[0] == "-m" and {"meprop", "meprop.cli"} & {*sys.orig_argv}):
    for _signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(_signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(_signum, _end)

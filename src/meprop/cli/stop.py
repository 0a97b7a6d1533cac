"""Stopping a command from outside: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """The command was asked to stop.

    Args:
        signum: The number of the signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class StopRequest:
    """Within it, Ctrl-C and the system's requests to end are noted.

    The second one raises `Stopped` at once. One more ends the process without any clean-up.

    Args:
        at_once: Whether the first one raises `Stopped` already.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self._signum: int | None = None
        self._left = 0 if at_once else 1  # requests that are only noted
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                    self._before[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._signum is not None

    def check(self) -> None:
        """Raise `Stopped` if it is time to stop."""
        if self._signum is not None:
            raise Stopped(self._signum)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._left < 0:
            os._exit(128 + signum)
        self._signum, self._left = signum, self._left - 1
        if self._left < 0:
            raise Stopped(signum)

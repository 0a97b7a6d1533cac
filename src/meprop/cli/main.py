"""From arguments to exit code."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union

import torch

from meprop import machine
from meprop.cli.bench import BENCH
from meprop.cli.common import Command, note
from meprop.cli.doctor import DATA, DOCTOR
from meprop.cli.reproduce import REPRODUCE, Reproduce
from meprop.cli.simplify import SIMPLIFY, Simplify
from meprop.cli.train import COMPARE, TRAIN, Compare, Train
from meprop.errors import MepropError

_COMMANDS = (TRAIN, COMPARE, SIMPLIFY, REPRODUCE, DATA, BENCH, DOCTOR)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done; 1 what was asked for failed; 2 the request is wrong; 130 interrupted.
    """
    if argv is None:
        # Adam's moments of weights that get no more gradient fade into denormal numbers, which make its step several
        # times as slow, dense or sparse. Said before the first parallel operation, so that its threads inherit it.
        torch.set_flush_denormal(True)
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        if argv is None and isinstance(command, Train | Compare | Simplify | Reproduce):
            machine.keep_freed_memory()
        command.run()
    except SystemExit as stop:  # --help, or what tyro rejects
        return stop.code if isinstance(stop.code, int) else 0
    except ValueError as error:
        note(f"error: {error}")
        return 2
    except (MepropError, OSError) as error:
        note(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "meprop":
            raise
        note(f"error: {error.name} is not installed: pip install 'meprop[tasks]'")
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    return 0


def parse(argv: list[str]) -> Any:
    """Return the command that the arguments ask for.

    Raises:
        ValueError: If a value is refused by a dataclass.
        SystemExit: After help, or a message about arguments that do not parse.
    """
    import tyro

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                _commands(argv),
                prog="meprop",
                description="Cheaper training: back-propagate only the part of the gradient that matters (meProp).",
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        # tyro would show a dataclass's ValueError under its own internal names; what it could not read itself
        # ("--epochs x") has a message that names the option, and is left alone.
        for error in _causes(stop):
            if isinstance(error, ValueError) and _raised_by_us(error):
                raise error from None
        print(messages.getvalue(), end="", file=sys.stderr)
        raise


@dataclass(frozen=True)
class _Unread:
    """Stands for the options of a command that is not asked for."""


def _commands(argv: list[str]) -> Any:
    """The union of all commands, of which the one that is asked for has its options."""
    import tyro

    def command_type(command: Command) -> Any:
        if command.name not in argv[:1]:
            return Annotated[_Unread, tyro.conf.subcommand(command.name, description=command.help)]
        about = tyro.conf.subcommand(command.name, description=command.help, constructor_factory=command.options)
        return Annotated[Any, about]

    return Union[tuple(map(command_type, _COMMANDS))]  # noqa: UP007


def _raised_by_us(error: BaseException) -> bool:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("meprop.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__context__) is not None:
        yield (error := cause)

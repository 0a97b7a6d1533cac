"""From arguments to exit code."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import torch

import meprop
from meprop import machine
from meprop.cli import faults
from meprop.cli.advise import ADVISE, Advise
from meprop.cli.bench import BENCH
from meprop.cli.common import Command, missing, note
from meprop.cli.compare import COMPARE, Compare
from meprop.cli.doctor import DATA, DOCTOR, Doctor
from meprop.cli.init import INIT
from meprop.cli.report import REPORT
from meprop.cli.reproduce import REPRODUCE, Reproduce
from meprop.cli.simplify import SIMPLIFY, Simplify
from meprop.cli.stop import Stopped, StopRequest
from meprop.cli.train import TRAIN, Train
from meprop.cli.tune import TUNE, Tune
from meprop.errors import MepropError, nearest
from meprop.training.script import ScriptTask

_TRAINING = ("advise", "train", "compare", "tune", "simplify")
"""The commands that take FILE.py:FUNCTION where they take the name of a task."""
_SCRIPT = re.compile(r".+\.py(:\w*)?")


def _chip() -> Any:
    from meprop.cli import chip  # it imports numpy

    return chip.options()


_CHIP = Command("chip", "Train in fixed point on one physical layer that serves for all: models, and a core.", _chip)
_COMMANDS = (INIT, ADVISE, TRAIN, COMPARE, TUNE, SIMPLIFY, REPRODUCE, REPORT, DATA, BENCH, _CHIP, DOCTOR)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done; 1 what was asked for failed; 2 the request is wrong; 70 a fault of meprop itself; 128 and
        the number of the signal if it was stopped (Ctrl-C: 130, SIGTERM: 143).
    """
    with StopRequest(at_once=True) as stop:
        try:
            if argv is None:
                _prepare_process()
            return _run(sys.argv[1:] if argv is None else argv, of_process=argv is None)
        except BaseException as error:
            try:  # libraries hide the interruption of an import in errors of their own
                stop.check()
                return _ended(error)
            except KeyboardInterrupt as interruption:
                note("interrupted")
                return 128 + (interruption.signum if isinstance(interruption, Stopped) else signal.SIGINT)


def _ended(error: BaseException) -> int:
    """Say why a command has ended before it was done, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, SystemExit):  # --help, or what tyro rejects
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "meprop":
        note(f"error: {missing(error)}")
        return 1
    if isinstance(error, MepropError | OSError | MemoryError):
        note(f"error: {error if str(error) else 'out of memory'}")
        return 1
    if isinstance(error, ValueError) and faults.is_refusal(error):
        note(f"error: {error}")
        return 2
    return faults.report(error)


def _prepare_process() -> None:
    """Set up what belongs to the process, where meprop is all of it."""
    # Adam's moments of weights that get no more gradient fade into denormal numbers, which make its step several times
    # as slow, dense or sparse. Said before the first parallel operation, so that its threads inherit it.
    torch.set_flush_denormal(True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show must not end a training
            stream.reconfigure(errors="replace")


def _run(arguments: list[str], *, of_process: bool) -> int:
    if arguments == ["--version"]:
        print(f"meprop {meprop.__version__}")
        return 0
    command = parse(arguments)
    if of_process and isinstance(command, Advise | Train | Compare | Tune | Simplify | Reproduce):
        machine.keep_freed_memory()
    command.run()
    return 0


def parse(argv: list[str]) -> Any:
    """Return the command that the arguments ask for.

    Raises:
        ValueError: If a value is refused by a dataclass.
        SystemExit: After help, or a message about arguments that do not parse.
    """
    if argv == ["doctor"]:  # which also works where tyro is missing: that is for it to say
        return Doctor()
    import tyro

    if argv[:1] and argv[0] in _TRAINING and len(argv) > 1 and _SCRIPT.fullmatch(argv[1]):
        argv = [argv[0], ScriptTask.name, "--script", *argv[1:]]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                _commands(argv),
                prog="meprop",
                description="Cheaper training: back-propagate only the part of the gradient that matters (meProp). "
                "`meprop --version` prints the version.",
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
                registry=_registry(),
            )
    except SystemExit as stop:
        # tyro would show a dataclass's ValueError under its own internal names; what it could not read itself
        # ("--epochs x") has a message that names the option, and is left alone.
        for error in _causes(stop):
            if isinstance(error, ValueError) and faults.is_refusal(error):
                raise error from None
        print(messages.getvalue(), end="", file=sys.stderr)
        if (name := _meant(argv, messages.getvalue())) is not None:
            note(f"did you mean {name}?")
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


def _registry() -> Any:
    """How `tyro` reads paths: with the home directory for `~`, which a shell leaves alone in --out=~/runs."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:  # pyright: ignore[reportUnusedFunction]
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda texts: machine.expanded(texts[0]),
            is_instance=lambda each: isinstance(each, Path),
            str_from_instance=lambda each: [str(each)],
        )

    return registry


def _meant(argv: list[str], message: str) -> str | None:
    """Return the name that is most like one of the arguments, of the names that tyro's message says are allowed.

    A wrong option is not looked at: for that tyro's message has the nearest one.
    """
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", message).split()).partition(" For full helptext")[0]
    listed = re.search(r"(?:Available subcommands: |Expected one of )(.*)", text)
    if listed is None:
        return None
    allowed = re.findall(r"[\w-]+", listed[1])
    words = [word for argument in argv for word in argument.split("=") if not word.startswith("-")]
    said = set(re.findall(r"[^\s,']+", text)) - set(allowed)
    wrong = (word for word in words if word in said)
    return next((name for word in wrong if (name := nearest(word, allowed)) is not None), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__context__) is not None:
        yield (error := cause)

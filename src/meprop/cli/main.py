"""From arguments to exit code.

What takes long to import is imported by the command that is asked for: help of all commands does not wait for torch.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, Union

from meprop.cli import faults
from meprop.cli.commands import HELP, WITHOUT_TORCH
from meprop.cli.messages import missing, note
from meprop.cli.registry import registry
from meprop.cli.stop import Stopped, StopRequest
from meprop.errors import MepropError, nearest

_TRAINING = ("advise", "train", "compare", "tune", "simplify")
"""The commands that train."""
_OF_TASKS = (*((name,) for name in _TRAINING), ("bench", "layers"))
"""The commands that take FILE.py:FUNCTION where they take the name of a task."""
_OF_FILES = ("--out", "--script", "--data-dir")
"""Their options with a value that can look like a task."""
_SCRIPT = re.compile(r"(?!-).+\.py(:\w*)?")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done; 1 what was asked for failed; 2 the request is wrong; 70 a fault of meprop itself; 128 and
        the number of the signal if it was stopped (Ctrl-C: 130, SIGTERM: 143, the reader of its output left: 141).
    """
    with StopRequest(at_once=True) as stop:
        try:
            if argv is None:
                _show_what_can_be_shown()
            code = _run(sys.argv[1:] if argv is None else argv, of_process=argv is None)
            print(end="", flush=True)
            return code
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
    if isinstance(error, BrokenPipeError) and _is_reader_gone():
        return 128 + signal.SIGPIPE
    if isinstance(error, MepropError | OSError | MemoryError):
        note(f"error: {error if str(error) else 'out of memory'}")
        return 1
    if isinstance(error, ValueError) and faults.is_refusal(error):
        note(f"error: {error}")
        return 2
    return faults.report(error)


def _is_reader_gone() -> bool:
    """Whether nobody reads the output any more, such as `head` that has its lines. The rest of it is dropped then."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # there is no output, or it is no file
        return False
    pipe = select.poll()
    pipe.register(output, 0)  # only errors are told
    if not pipe.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


def _show_what_can_be_shown() -> None:
    """Let no character that a terminal cannot show end a training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _run(arguments: list[str], *, of_process: bool) -> int:
    if arguments == ["--version"]:
        print(f"meprop {version('meprop')}")
        return 0
    command = parse(arguments)
    if of_process and arguments[0] not in WITHOUT_TORCH:
        _prepare_process(trains=arguments[0] in (*_TRAINING, "reproduce"))
    command.run()
    return 0


def _prepare_process(*, trains: bool) -> None:
    """Set up what belongs to the process, where meprop is all of it."""
    import torch

    from meprop import machine

    gc.freeze()  # what is imported stays: to look through it again and again takes a quarter of a second each time
    gc.enable()
    # Adam's moments of weights that get no more gradient fade into denormal numbers, which make its step several times
    # as slow, dense or sparse. Said before the first parallel operation, so that its threads inherit it.
    torch.set_flush_denormal(True)
    if trains:
        machine.keep_freed_memory()


def parse(argv: list[str]) -> Any:
    """Return the command that the arguments ask for.

    Raises:
        ValueError: If a value is refused by a dataclass.
        SystemExit: After help, or a message about arguments that do not parse.
    """
    if argv == ["doctor"]:  # which also works where tyro is missing: that is for it to say
        from meprop.cli.doctor import Doctor

        return Doctor()
    import tyro

    argv = _with_task_first(argv)
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
                registry=registry(),
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


def _with_task_first(argv: list[str]) -> list[str]:
    """Return the arguments with the task before its options. FILE.py:FUNCTION becomes the task of a user's file."""
    command = next((names for names in _OF_TASKS if tuple(argv[: len(names)]) == names), argv)
    if len(argv) > (first := len(command)):
        from meprop.training.script import ScriptTask
        from meprop.training.tasks import table

        for at, argument in enumerate(argv[first:], first):
            if argv[at - 1] in _OF_FILES:
                continue
            others = [*argv[first:at], *argv[at + 1 :]]
            if argument in table():
                return [*command, argument, *others]
            if _SCRIPT.fullmatch(argument):
                return [*command, ScriptTask.name, "--script", argument, *others]
            if at == first and not argument.startswith("-"):
                break
    return argv


@dataclass(frozen=True)
class _Unread:
    """Stands for the options of a command that is not asked for."""


def _commands(argv: list[str]) -> Any:
    """The union of all commands, of which the one that is asked for has its options."""
    import tyro

    def command_type(name: str, about: str) -> Any:
        if name not in argv[:1]:
            return Annotated[_Unread, tyro.conf.subcommand(name, description=about)]
        options = import_module(f"meprop.cli.{name}").options
        return Annotated[Any, tyro.conf.subcommand(name, description=about, constructor_factory=options)]

    return Union[tuple(command_type(name, about.partition("\n")[0]) for name, about in HELP.items())]  # noqa: UP007


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

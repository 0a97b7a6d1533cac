"""What the commands share: a form for each task, the choice of a rule, threads, tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args

import torch

from meprop import rules
from meprop.cli.messages import note
from meprop.training import tasks
from meprop.training.config import MARGIN, RunConfig, rule_names
from meprop.training.tasks import TaskEntry

if TYPE_CHECKING:
    from meprop.training.records import Run
    from meprop.training.task import Task
    from meprop.training.verdict import Verdict

TaskConfig = TypeVar("TaskConfig")
Training = TypeVar("Training", bound=RunConfig)
RuleName = TypeVar("RuleName", bound=str)
"""Stands for the names of the rules, which are known when the arguments are read: `rule_choice`."""

RuleTexts = TypeVar("RuleTexts", bound=tuple[str, ...])
"""Stands for rules with settings of their own, as texts, with the help that lists the rules: `rule_texts`."""

_MOST_THREADS = 1024  # far above what helps, and below what the system refuses to start


def forms(*each: Any) -> Any:
    """Return the union of the forms of a command: a union even while there is one."""
    import tyro

    return Union[(*each, Annotated[None, tyro.conf.Suppress])]


def with_tasks(
    about: str,
    options: Callable[[TaskEntry], Any],
    default: Callable[[str, TaskEntry], Any],
    entries: Mapping[str, TaskEntry] | None = None,
) -> Any:
    """Return the union of a form for each task.

    Args:
        about: The help.
        options: From a task's entry to the class of the command with the task's config.
        default: From a task's name and entry to the command with all its defaults.
        entries: The tasks by name. None: ours.
    """
    import tyro

    def form(task: str, entry: TaskEntry) -> Any:
        named = tyro.conf.subcommand(task, description=about, default=default(task, entry))
        return Annotated[options(entry), named]

    return forms(*(form(task, entry) for task, entry in (entries or tasks.table()).items()))


def rule_choice(question: str, others: Mapping[str, str] | None = None) -> Any:
    """Return the type of an option that names a rule, with its help, for `tyro`.

    Args:
        question: What is chosen.
        others: What else can be chosen, by name, and what that means.
    """
    import tyro

    meanings = {name: rule.label for name, rule in rules.named().items()} | (dict(others) if others else {})
    names = rule_names(*(others or ()))
    listed = "; ".join(f"{name}: {meanings[name]}" for name in get_args(names))
    return Annotated[names, tyro.conf.arg(help=f"{question} {listed}.")]


def rule_texts() -> Any:
    """Return the type of an option that takes rules with settings of their own, with its help, for `tyro`."""
    import tyro

    listed = "; ".join(f"{name}: {rule.label}" for name, rule in rules.named().items())
    about = (
        f"What is compared with dense: one rule or more. {listed}. dense: everything. Each can have settings of its "
        "own, which go before the options: sampled:noise=0.5 topk:k=0.04,scope=global dense:precision=bf16-mixed"
    )
    return Annotated[tuple[str, ...], tyro.conf.arg(help=about, metavar="RULE [RULE ...]")]


@contextlib.contextmanager
def threads(count: int) -> Generator[None]:
    """Lets torch use so many threads for a while; 0 for as many as it does.

    Raises:
        ValueError: The count is out of range.
    """
    if not 0 <= count <= _MOST_THREADS:
        raise ValueError(f"--threads must be from 0 to {_MOST_THREADS}, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show_runs(runs: list[Run], task: Task, verdicts: Sequence[Verdict] = (), margin: float = MARGIN) -> None:
    """Print the table of what is finished and, of a comparison, the verdicts."""
    from rich.console import Console

    from meprop.reporting.terminal import run_table, verdict_line

    if runs:
        Console().print(run_table(runs, task.metric, verdicts, task.unit))
        for verdict in verdicts:
            print(verdict_line(verdict))
        if verdicts and margin == MARGIN and not task.unit and all(abs(run.dev[task.metric]) <= 1 for run in runs):
            note(f"{task.metric} is within 1, and --margin is {margin}: give a smaller margin, or scores in percent")

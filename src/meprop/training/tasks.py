"""The tasks by name: a new one is a module in `meprop.tasks` and one entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from meprop.training.config import DEFAULT_RULE, ScriptTraining, TrainingConfig
from meprop.training.script import ScriptConfig, ScriptTask
from meprop.training.task import Task


class TaskEntry(NamedTuple):
    """A task as the command line knows it."""

    config: type[Any]
    """The dataclass of its settings."""
    build: Callable[[Any], Task]
    """Reads the data and returns the task, from its settings."""
    locate: Callable[[Path | None], Path | None]
    """Returns the folder of the data for a --data-dir, or None if they are not here yet. It downloads nothing."""
    load: Callable[[Any], object]
    """Reads the data, after a download if needed; str() of what it returns is a line about them."""
    training: Any
    """The task's defaults of the shared settings: a `TrainingConfig` unless the task has its own optimizer."""
    rule: str = DEFAULT_RULE
    """The rule of its sparse runs, by default."""


def _nowhere(_folder: Path | None) -> None:
    """A file of the user's own knows where its data lie."""


SCRIPT = TaskEntry(ScriptConfig, ScriptTask, _nowhere, str, ScriptTraining(), "sampled")
"""The task of a user's file, which the commands take where they take one of ours."""


def table() -> dict[str, TaskEntry]:
    """Return all tasks of ours by name."""
    from meprop.tasks import digits, mnist, parsing, tagging

    return {
        "mnist": TaskEntry(
            mnist.MnistConfig, mnist.MnistTask, mnist.locate, mnist.load, TrainingConfig(epochs=10, k=20)
        ),
        "digits": TaskEntry(
            digits.DigitsConfig,
            digits.DigitsTask,
            mnist.locate,
            digits.load,
            TrainingConfig(epochs=20, noise=0.25, lr=3e-4),
            "sampled",
        ),
        "tagging": TaskEntry(
            tagging.TaggingConfig,
            tagging.TaggingTask,
            tagging.locate,
            tagging.load,
            TrainingConfig(epochs=15, k=20, lr=2e-3),
        ),
        "parsing": TaskEntry(
            parsing.ParsingConfig,
            parsing.ParsingTask,
            parsing.locate,
            parsing.load,
            TrainingConfig(epochs=6, k=20, lr=2e-3),
        ),
    }


def name_of(config: object) -> str:
    """Return the name of the task that settings are of."""
    return next(name for name, entry in with_script().items() if entry.config is type(config))


def entry_of(config: object) -> TaskEntry:
    """Return the task that settings are of."""
    return with_script()[name_of(config)]


def with_script() -> dict[str, TaskEntry]:
    """Return all tasks that can be trained by name: ours, and the user's."""
    return {**table(), ScriptTask.name: SCRIPT}

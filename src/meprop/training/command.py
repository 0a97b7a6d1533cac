"""The command that makes a result again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from meprop.training import tasks, tracking
from meprop.training.config import MARGIN, SimplifyConfig
from meprop.training.script import ScriptTask

_NO_OPTIONS = ("task", "training", "simplify", "data", "out", "resume", "overwrite", "script")


def command_of(task: str, config: Mapping[str, Any]) -> str | None:
    """Return the command that makes a result again, with the options that are no defaults.

    Args:
        task: The name of the task.
        config: The settings as the command records them.

    Returns:
        The command; None if the settings are not those of train, compare or simplify, or the task is not known to them.
    """
    of_task = config.get("task", {})
    entry = tasks.with_script().get(ScriptTask.name if "script" in of_task else task)
    if entry is None or "training" not in config:
        return None
    name = "simplify" if "simplify" in config else "compare" if "margin" in config else "train"
    values = {**config, **of_task, **config["training"], **config.get("simplify", {})}
    shared = {**tracking.plain(entry.config()), **tracking.plain(entry.training), **tracking.plain(SimplifyConfig())}
    defaults = {**shared, "rule": entry.rule, "margin": MARGIN, "seconds": 2.0}
    if name == "simplify":  # it has a default of its own
        del defaults["k"]
    return shlex.join(["meprop", name, of_task.get("script", task), *_options(values, defaults)])


def _options(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        default = defaults.get(name, False)
        if name in _NO_OPTIONS or value == default or (name not in defaults and not value):
            continue
        yield f"--{name.replace('_', '-')}"
        if not (value is True and default is False):
            yield from map(str, value if isinstance(value, list) else [value])

"""The command that makes a result again, from what the result says of itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from meprop import experiments
from meprop.reporting.page.sources import Source
from meprop.training import tracking
from meprop.training.config import MARGIN, SimplifyConfig

_NO_OPTIONS = ("task", "training", "simplify", "data", "out", "resume", "overwrite", "script")


def command_of(source: Source) -> str | None:
    """Return the command that makes a result again, with the options that are no defaults; None if it is not known."""
    config = source.config
    if "settings" in config:
        experiment = source.path.resolve().parent.name
        return f"meprop reproduce {experiment}" if experiment in experiments.built_in() else None
    name = "simplify" if "simplify" in config else "compare" if "margin" in config else "train"
    entry, task, training = source.entry, config.get("task", {}), config.get("training")
    if entry is None or training is None:
        return None
    values = {**config, **task, **training, **config.get("simplify", {})}
    shared = {**tracking.plain(entry.config()), **tracking.plain(entry.training), **tracking.plain(SimplifyConfig())}
    defaults = {**shared, "rule": entry.rule, "margin": MARGIN, "seconds": 2.0}
    if name == "simplify":  # it has a default of its own
        del defaults["k"]
    return shlex.join(["meprop", name, source.title, *_options(values, defaults)])


def _options(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        default = defaults.get(name, False)
        if name in _NO_OPTIONS or value == default or (name not in defaults and not value):
            continue
        yield f"--{name.replace('_', '-')}"
        if not (value is True and default is False):
            yield from map(str, value if isinstance(value, list) else [value])

"""In what results that are set side by side differ, so that their numbers are not to be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from meprop.reporting.page.series import OF_RULE
from meprop.reporting.page.sources import Source


class Difference(NamedTuple):
    """One thing that is not the same in all results."""

    name: str
    values: list[tuple[str, str]]
    """Each value, and the results that have it."""


_OF_MACHINE = ("cpu", "gpu", "threads", "keeps_freed_memory")
_SHOWN = 3  # names of results


def differences(sources: Sequence[Source]) -> list[Difference]:
    """Return the settings, data, machines and versions of torch that differ. Those of rules are meant to."""
    facts = [(f"{source.folder}/{source.name}", dict(_facts(source))) for source in sources]
    names = dict.fromkeys(name for _, each in facts for name in each)
    found: list[Difference] = []
    for name in names:
        values: dict[str, list[str]] = {}
        for result, each in facts:
            if name in each:
                values.setdefault(each[name], []).append(result)
        if len(values) > 1:
            found.append(Difference(name, [(value, _listed(of)) for value, of in values.items()]))
    return found


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    yield "task", source.task
    yield "margin", _text(source.margin)
    for name, value in source.settings.items():
        if name not in OF_RULE:
            yield "digest of the data" if name == "data" else name, _text(value)
    for name in _OF_MACHINE:
        if name in source.content["machine"]:
            yield name, _text(source.content["machine"][name])
    if "torch" in source.content["versions"]:
        yield "torch", _text(source.content["versions"]["torch"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    more = len(different) - _SHOWN
    return ", ".join(different[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

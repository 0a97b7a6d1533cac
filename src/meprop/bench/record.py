"""What all benchmarks have in common: what is recorded beside their results, and how cases are chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import meprop
from meprop import machine
from meprop.bench.measure import Disturbance, DisturbanceMeter
from meprop.training import tracking

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Record(tracking.Provenance):
    """The content of result.json of a benchmark; the results themselves are the subclasses' own."""

    backends: dict[str, Any]
    disturbance: Disturbance | None
    """By others, during the whole run; None if unknown."""

    @classmethod
    def of(cls, task: str, config: dict[str, Any], meter: DisturbanceMeter, *results: Any) -> Self:
        """Return the record of a run that has just ended.

        Args:
            task: The benchmark's name.
            config: Its settings, as plain data.
            meter: Made when it began.
            results: The subclass's own fields.
        """
        return cls(
            task,
            config,
            machine.describe(),
            tracking.versions(),
            tracking.commit(),
            meprop.backend_info(),
            meter.read(),
            *results,
        )

    @property
    def wrong(self) -> list[str]:
        """Return the names of what was found wrong, and hence not timed."""
        raise NotImplementedError


class _Named(Protocol):
    @property
    def name(self) -> str: ...


CaseT = TypeVar("CaseT", bound=_Named)


def choose(
    patterns: Sequence[str], grid: Sequence[CaseT], parse: Callable[[str], CaseT | None], examples: str
) -> list[CaseT]:
    """Return the cases of a grid whose names match a pattern (`*` and `?`), and those beyond it that are named.

    Args:
        patterns: Of names.
        grid: The default cases.
        parse: From a name to its case; None if it is no name of one.
        examples: Names, for the message.

    Raises:
        ValueError: A pattern matches nothing and names nothing.
    """
    chosen: list[CaseT] = []
    for pattern in patterns:
        case = parse(pattern)
        found = [case] if case else [case for case in grid if fnmatchcase(case.name, pattern)]
        if not found:
            raise ValueError(f"--cases {pattern}: no such case; a case is named like {examples}, in any size")
        chosen += found
    return list(dict.fromkeys(chosen))

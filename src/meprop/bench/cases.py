"""Benchmarks of many cases, which are chosen by name: what one file of such a benchmark builds on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from meprop.bench.base import Measure, TableBench
from meprop.bench.measure import Times, check_seconds, until_stopped
from meprop.bench.record import Record
from meprop.disturbance import DisturbanceMeter

if TYPE_CHECKING:
    from typing_extensions import Self


T = TypeVar("T")
U = TypeVar("U")


class Case(ABC):
    """What one row of the table is of; a subclass is a frozen dataclass.

    Attributes:
        pattern: What the names look like.
    """

    pattern: ClassVar[re.Pattern[str]]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name, as `parse` takes it."""

    @classmethod
    @abstractmethod
    def from_groups(cls, groups: Sequence[Any]) -> Self:
        """Return the case of what the groups of `pattern` are in a name."""

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the case of this name; None if it is no such name.

        Raises:
            ValueError: It is, but a size in it is out of range.
        """
        match = cls.pattern.fullmatch(name)
        return None if match is None else cls.from_groups(match.groups())


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True)
class CaseResult(Generic[CaseT]):
    """What was found for one case.

    Attributes:
        name: The case's.
        case: The case.
        wrong: How it differs from torch or from the oracle; None if it does not. A wrong case has nothing but this.
        times: By side.
    """

    name: str
    case: CaseT
    wrong: str | None = None
    times: dict[str, Times] = field(default_factory=dict[str, Times])


ResultT = TypeVar("ResultT", bound=CaseResult[Any])


@dataclass(frozen=True)
class CasesRecord(Record, Generic[ResultT]):
    """The content of result.json."""

    cases: list[ResultT]

    @property
    def results(self) -> list[ResultT]:
        """Return those of the cases."""
        return self.cases

    @classmethod
    def run(
        cls,
        name: str,
        cases: Sequence[CaseT],
        run_case: Callable[[CaseT], ResultT],
        config: Mapping[str, Any],
        after: Callable[[ResultT], None],
    ) -> CasesRecord[ResultT]:
        """Return the record of cases that need nothing but themselves.

        Args:
            name: The benchmark's.
            cases: What to run.
            run_case: Checks and times one.
            config: Kept in the record.
            after: Called with each result.
        """
        meter = DisturbanceMeter()
        results = run_each(cases, run_case, after)
        return CasesRecord[ResultT].of(f"bench-{name}", dict(config), meter, results)


@dataclass(frozen=True)
class CasesBench(TableBench[ResultT, Record], Generic[CaseT, ResultT]):
    """A benchmark of such cases: a subclass says which there are, how one is run, and what its row shows."""

    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, or names of others in any size."""
    seconds: float = 3.0
    """Seconds to spend on the timing of each case. A slow case takes longer, for 9 rounds."""

    @staticmethod
    @abstractmethod
    def default_cases() -> list[CaseT]:
        """Return the cases that are run if no others are asked for."""

    @abstractmethod
    def run(self, cases: Sequence[CaseT], config: Mapping[str, Any], after: Callable[[ResultT], None]) -> Record:
        """Check and time the cases, and call `after` with each result; see `CasesRecord.run`."""

    @classmethod
    def choose(cls, patterns: Sequence[str]) -> list[CaseT]:
        """Return the default cases whose names match a pattern (`*` and `?`), and those beyond them that are named.

        Raises:
            ValueError: A pattern matches nothing and names nothing.
        """
        defaults = cls.default_cases()
        chosen: list[CaseT] = []
        for pattern in patterns:
            case = type(defaults[0]).parse(pattern)
            found = [case] if case else [case for case in defaults if fnmatchcase(case.name, pattern)]
            if not found:
                names = " or ".join(cls.example_names())
                raise ValueError(f"--cases {pattern}: no such case; a case is named like {names}, in any size")
            chosen += found
        return list(dict.fromkeys(chosen))

    @classmethod
    def example_names(cls) -> list[str]:
        """Return names of cases, for the message that refuses others."""
        return [cls.default_cases()[0].name]

    def prepare(self) -> Measure[ResultT, Record]:
        """Choose the cases."""
        check_seconds(self.seconds)
        return partial(self.run, self.choose(self.cases))


def run_each(cases: Iterable[T], run: Callable[[T], U], after: Callable[[U], None]) -> list[U]:
    """Return what `run` gives for each case; `after` is called with each as soon as it is there."""
    results: list[U] = []
    with until_stopped(results):
        for case in cases:
            results.append(run(case))
            after(results[-1])
    return results

"""What is recorded of a benchmark beside its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import meprop
from meprop import machine
from meprop.disturbance import Disturbance, DisturbanceMeter
from meprop.reporting import pages
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
    def results(self) -> Sequence[Any]:
        """Return the results, each with its `name`, and with what is `wrong` with it or None."""
        raise NotImplementedError

    @property
    def wrong(self) -> list[str]:
        """Return the names of what was found wrong, and hence not timed."""
        return [result.name for result in self.results if result.wrong is not None]

    @property
    def circumstances(self) -> str:
        """Where, by what and how undisturbed it was made, in words."""
        cpu, threads = self.machine["cpu"], self.machine["threads"]
        memory = "Freed memory is kept. " if self.machine.get("keeps_freed_memory") else ""
        seen = self.disturbance
        taken = "unknown" if seen is None else f"{seen.stolen:.0%} by the host, {seen.others:.0%} by other processes"
        return (
            f"{cpu}, {threads} threads, kernels: {self.backends['isa'] or 'none'}; torch {self.versions['torch']}, "
            f"meprop {self.versions['meprop']}, {pages.short_commit(self.commit)}. {memory}Processor time taken "
            f"meanwhile: {taken}."
        )

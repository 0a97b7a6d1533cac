"""`meprop chip`: back-propagation on one physical layer, in fixed point, with top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from meprop.chip.data import DataName
from meprop.chip.design import Settings
from meprop.chip.explore import Training, Trial, explore
from meprop.cli.common import Command, forms, note
from meprop.cli.stop import StopRequest
from meprop.training import folder, tracking

Name = TypeVar("Name", bound=str)
"""Stands for the name of a data set as a positional argument."""


@dataclass(frozen=True)
class Train(Generic[Name]):
    """Train a net in float64, in fixed point, and in fixed point with top-k: accuracy and cycles side by side."""

    data: Name
    """Which data set of scikit-learn."""
    settings: Settings
    training: Training
    out: Path
    """Folder for result.json."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Train, and write and show the result."""
        from meprop.reporting import chip as report

        data: Any = self.data
        settings = self.settings
        points = [(None, None), (settings.word, None), *([] if settings.k is None else [(settings.word, settings.k)])]

        def trials(after: Callable[[Trial], None]) -> list[Trial]:
            return [each for word, k in points for each in explore(data, settings, [word], [k], self.training, after)]

        found = _recorded("train", self, trials)
        print(report.trial_table(found))


def _recorded(name: str, command: Any, measure: Callable[[Callable[[Any], None]], Sequence[Any]]) -> Sequence[Any]:
    """Measure, write result.json, and return what was measured. A stop is obeyed after each part."""
    from meprop.reporting import chip as report

    tracking.commit()
    with folder.owned(command.out), StopRequest() as stop:
        if not command.overwrite:
            folder.check_free(command.out)

        def after(result: Any) -> None:
            note(report.outcome(result))
            stop.check()

        results = measure(after)
        folder.clear(command.out)
        record = report.ChipRecord.of(name, tracking.plain(command), results)
        tracking.write_result(command.out / tracking.RESULT, record)
        note(f"written: {command.out / tracking.RESULT}")
    return results


def _forms() -> Any:
    import tyro

    def form(command: Any, name: str, **options: Any) -> Any:
        default = command(**options, out=Path("runs") / f"chip-{name}")
        return Annotated[command, tyro.conf.subcommand(name, description=command.__doc__, default=default)]

    data: Any = Annotated[DataName, tyro.conf.Positional]
    return forms(
        form(Train[data], "train", data="iris", settings=Settings(k=0.25), training=Training()),
    )


CHIP = Command("chip", "Train in fixed point on one physical layer that serves for all: models, and a core.", _forms)

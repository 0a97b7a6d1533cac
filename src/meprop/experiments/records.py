"""The records of the runs of an experiment that are finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from meprop.errors import DataError
from meprop.training import tracking
from meprop.training.records import Run
from meprop.training.tracking import Result

if TYPE_CHECKING:
    from meprop.experiments import Experiment, Variant
    from meprop.training.task import Task


class RecordConfig(TypedDict):
    """`config` of a run's record."""

    settings: dict[str, Any]
    """The variant's, and the digest of the data."""
    metric: str
    """The quality to compare by."""
    beside: list[str]
    """The variants that were trained in turns with it, to the end: with those its seconds can be compared."""


@dataclass(frozen=True)
class Records:
    """The finished runs of an experiment, a file each, in the format of result.json; a checkpoint of each unfinished.

    Attributes:
        folder: Where they lie; it need not exist yet.
        data: The digest of each variant's data by its name, where they have been read: runs on others do not count.
    """

    folder: Path
    data: Mapping[str, str] = field(default_factory=dict[str, str])

    def path(self, variant: Variant, seed: int) -> Path:
        """Return the file of a finished run."""
        return self.folder / f"{variant.name}-seed{seed}.json"

    def checkpoint(self, variant: Variant, seed: int) -> Path:
        """Return the file of an unfinished run."""
        return self.path(variant, seed).with_suffix(".pt")

    def write(self, variant: Variant, run: Run, task: Task, beside: list[str]) -> None:
        """Write the record of a finished run, with this machine, the versions and the commit.

        Args:
            variant: Whose run it is.
            run: Its outcome.
            task: What it was trained on.
            beside: The variants that were trained in turns with it, from beginning to end.
        """
        settings = {**variant.settings(), "data": task.fingerprint}
        config = RecordConfig(settings=settings, metric=task.metric, beside=beside)
        self.folder.mkdir(parents=True, exist_ok=True)
        tracking.write_result(self.path(variant, run.seed), tracking.describe(task.name, {**config}, [run]))

    def read(self, variant: Variant, seed: int) -> Result | None:
        """Return a finished run; None if there is none with the variant's settings and data.

        Raises:
            DataError: Its file is damaged.
        """
        path = self.path(variant, seed)
        if not path.exists():
            return None
        result = _read(path)
        return None if self._changes(result, variant) else result

    def seeds(self, variant: Variant) -> list[int]:
        """Return the seeds of a variant's finished runs, whatever their settings."""
        prefix = f"{variant.name}-seed"
        seeds = (path.stem.removeprefix(prefix) for path in self.folder.glob(f"{prefix}*.json"))
        return sorted(int(seed) for seed in seeds if seed.isdecimal())

    def all(self, variant: Variant) -> dict[int, Result]:
        """Return the finished runs of a variant by seed."""
        found = {seed: self.read(variant, seed) for seed in self.seeds(variant)}
        return {seed: result for seed, result in found.items() if result is not None}

    def check(self, experiment: Experiment) -> None:
        """Refuse finished runs with other settings or on other data than the experiment's.

        Raises:
            ValueError: There is such a run; the message says what differs.
        """
        for variant in experiment.variants:
            for seed in self.seeds(variant):
                path = self.path(variant, seed)
                if changes := self._changes(_read(path), variant):
                    raise ValueError(
                        f"{path} was made with other settings ({changes}); give another --out, or --overwrite to "
                        "repeat such runs"
                    )

    def _changes(self, result: Result, variant: Variant) -> str:
        then = result.config["settings"]
        data = self.data.get(variant.name, then.get("data"))
        return tracking.changes(then, {**variant.settings(), "data": data}, type(variant.task))


def _read(path: Path) -> Result:
    """Read the record of a run."""
    try:
        result = Result.of(tracking.read_content(path))
        (run,) = result.runs
        check_type(result.config, RecordConfig, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        for known, needed in ((result.machine, ("cpu", "gpu", "threads")), (result.versions, ("torch", "meprop"))):
            if lacking := [name for name in needed if name not in known]:
                raise KeyError(lacking)
        _ = run.selected(result.config["metric"]).test[result.config["metric"]]
    except (*tracking.DAMAGE, TypeCheckError) as error:
        raise DataError(
            f"{path} is damaged or not a result of meprop ({type(error).__name__}: {error}); restore it from a copy, "
            "or delete it to have the run repeated"
        ) from error
    return result

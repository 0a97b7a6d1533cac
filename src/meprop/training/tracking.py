"""The record of an experiment: result.json with all that is needed to judge and repeat it, and live curves."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from meprop import machine
from meprop.errors import DataError
from meprop.training.config import DENSE, OF_RULES, RunConfig, SimplifyConfig, TrainingConfig
from meprop.training.records import Run

if TYPE_CHECKING:
    from lightning_fabric.loggers import Logger
    from typing_extensions import Self

    from meprop.training.loop import Trainer

RESULT = "result.json"
CHECKPOINT = "checkpoint.pt"
FIGURE = "curves.png"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Provenance:
    """What every result.json says of how its numbers came about."""

    task: str
    config: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    """Of meprop's source checkout, with `-dirty` if its code had changes; None if it is not a checkout."""


@dataclass(frozen=True)
class Result(Provenance):
    """The content of result.json of an experiment: of its runs those that are finished."""

    runs: list[Run]
    running: list[Run] = field(default_factory=list[Run])
    """Those that are not finished, as far as their last epoch."""
    command: str | None = None
    """The command that makes it again. None in records of `reproduce` and of earlier versions."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """Return the record from plain data."""
        runs = {key: [Run(**run) for run in content.get(key, ())] for key in ("runs", "running")}
        fields: dict[str, Any] = {**content, **runs}
        return cls(**fields)


@dataclass(frozen=True)
class Comparison(Result):
    """The content of result.json of a comparison."""

    verdicts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`training.verdict.Verdict` of each rule, on the seeds that are finished."""


ResultT = TypeVar("ResultT", bound=Result)


def describe(task: str, config: dict[str, Any], runs: Sequence[Run], running: Sequence[Run] = ()) -> Result:
    """Return the record of `runs`, with this machine, the versions, the commit and the command."""
    from meprop.training.command import command_of

    about = (task, config, machine.describe(), versions(), commit())
    return Result(*about, [*runs], [*running], command_of(task, config))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    import torch

    found = {"python": platform.python_version(), "torch": str(torch.__version__), "meprop": version("meprop")}
    for package in ("numpy", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """Return the commit of meprop's source checkout, with `-dirty` if its code has changes; None if it is not one.

    It is read once: long runs call this before anything else, so that it is that of the code that runs.
    """
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        # Without the lock of an index that is refreshed: a process that is killed would leave it behind.
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "src", "csrc") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None


def plain(settings: Any) -> dict[str, Any]:
    """Return a dataclass as nested JSON data: tuples as lists, paths as strings."""
    return json.loads(json.dumps(asdict(settings), default=str))


def settings(task: Any, training: RunConfig, rule: str) -> dict[str, Any]:
    """Return all that a run's outcome depends on beside its seed and data, as plain data by option name."""
    return settings_of({"task": plain(task), "training": plain(training), "rule": rule})


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `settings` does, of the `config` of a result; with data and simplifying, if it has them."""
    rule = config["rule"][0] if isinstance(config["rule"], list) and len(config["rule"]) == 1 else config["rule"]
    others = {name: config[name] for name in ("data", "simplify") if name in config}
    return _without_unused({**config["task"], **config["training"], "rule": rule, **others})


def _without_unused(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings on which the outcome of a run of this rule depends."""
    unused = ("data_dir", "seeds", "ahead", *(OF_RULES if found.get("rule") == DENSE else ()))
    return {name: value for name, value in found.items() if name not in unused}


def changes(then: Mapping[str, Any], now: Mapping[str, Any], task: type[Any]) -> str:
    """Return in words how settings differ; empty if they do not.

    Args:
        then: The settings of a run that was saved. An option that did not exist then had what is its default now.
        now: The settings today.
        task: The class of the task's config, which has the defaults.
    """
    defaults = {**plain(task()), **plain(TrainingConfig())}
    then = {**{name: value for name, value in defaults.items() if name in now}, **_without_unused(then)}
    if "simplify" in then:
        then["simplify"] = {**plain(SimplifyConfig()), **then["simplify"]}
    return ", ".join(
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )


def read_result(path: Path, kind: type[ResultT]) -> ResultT:
    """Read the record of an experiment.

    Raises:
        DataError: The file is damaged, or of another kind.
    """
    try:
        return kind.of(read_content(path))
    except DAMAGE as error:
        raise DataError(
            f"{path} is damaged or not a result of this command ({type(error).__name__}: {error}); restore it from a "
            "copy, or start again with --overwrite"
        ) from error


DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading a damaged result raises."""


def read_content(path: Path) -> dict[str, Any]:
    """Return the plain data of a file of `write_result`. Those of earlier versions have no digest.

    Raises:
        ValueError: It is no JSON, or its digest is not that of its content. Others of `DAMAGE`: it is no object.
    """
    content = json.loads(path.read_bytes())
    if content.pop("sha256", None) not in (None, _digest(content)):
        raise ValueError("its digest, sha256, is not that of its content")
    return content


def write_result(path: Path, result: Any) -> None:
    """Write a `Result`, or the dataclass of a benchmark, as JSON, with a digest of it as the last entry."""
    content = plain(result)
    for name in ("running", "command"):  # there are none of a finished experiment, or of one of `reproduce`
        if not content.get(name, True):
            del content[name]
    text = json.dumps({**content, "sha256": _digest(content)}, indent=2, allow_nan=False) + "\n"
    machine.write_atomically(path, lambda file: file.write(text.encode()))


def _digest(content: dict[str, Any]) -> str:
    """Return the digest of data, however their file is laid out."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


LoggerOf: TypeAlias = "Callable[[Trainer], Logger]"
"""From a run to the logger of Lightning Fabric that gets its curves: TensorBoard's, or that of wandb or MLflow."""


def tensorboard_in(out: Path) -> LoggerOf:
    """Return the loggers of TensorBoard that write into the folder of an experiment, one folder per run."""

    def logger_of(trainer: Trainer) -> Logger:
        from lightning_fabric.loggers import TensorBoardLogger

        # A resumed run writes its earlier epochs again, in place of those that are there.
        run = f"{trainer.name}-seed{trainer.seed}"
        return TensorBoardLogger(out / TENSORBOARD, name="", version=run, purge_step=1)

    return logger_of


class LiveCurves:
    """Curves of runs, updated after each epoch: loss, dev and test, and the numbers of `training.live.Live`.

    Args:
        trainers: The runs, before they train.
        logger_of: Gives the logger of each run, when its first epoch is done. None: there are no curves.
    """

    def __init__(self, trainers: Sequence[Trainer], logger_of: LoggerOf | None) -> None:
        self._logger_of = logger_of
        self._loggers: dict[Trainer, Logger] = {}
        self._written: dict[Trainer, int] = {}
        for trainer in trainers if logger_of is not None else ():
            trainer.go_live()

    def __enter__(self) -> LiveCurves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for logger in self._loggers.values():
            logger.finalize("success" if error is None else "failed")

    def update(self, trainer: Trainer) -> None:
        """Write the epochs that are new since the last call. It raises what the logger does."""
        new = trainer.curve[self._written.get(trainer, 0) :]
        if self._logger_of is None or not new:
            return
        if trainer not in self._loggers:
            self._loggers[trainer] = self._logger_of(trainer)
        for record in new:
            found = {"loss": record.loss, **record.live}
            for split, metrics in (("dev", record.dev), ("test", record.test)):
                found |= {f"{split}/{name}": value for name, value in metrics.items()}
            self._loggers[trainer].log_metrics(found, record.epoch)
        self._loggers[trainer].save()
        self._written[trainer] = trainer.epoch

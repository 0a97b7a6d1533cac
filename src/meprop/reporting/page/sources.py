"""The results that a page is made of, read and checked: of `meprop train`, `compare`, `simplify` and `reproduce`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

from meprop import experiments
from meprop.errors import DataError
from meprop.reporting.look import PHASE_COLORS
from meprop.training import tracking
from meprop.training.config import MARGIN
from meprop.training.records import EpochRecord, Run
from meprop.training.verdict import Budget

_NOT_SETTINGS = frozenset(
    ["task", "training", "data_dir", "seeds", "out", "resume", "overwrite", "tensorboard", "checkpoint_every", "margin"]
)


@dataclass(frozen=True)
class Source:
    """A result."""

    path: Path
    """Its file."""
    text: str
    """The file's content as JSON without white space."""
    content: Mapping[str, Any]
    """The same as plain data, without the digest."""
    runs: list[Run]
    """Those that are finished."""
    running: list[Run]
    """Those that are not; their numbers are those of the last epoch."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The settings of options that it does not record."""

    @property
    def name(self) -> str:
        """What to call it: the folder of a result.json; of a file of `reproduce` the name of its variant."""
        if self.path.name == tracking.RESULT:
            return self.path.resolve().parent.name
        return re.sub(r"-seed\d+$", "", self.path.stem)

    @property
    def folder(self) -> str:
        """The folder that it lies in."""
        folder = self.path.resolve().parent
        return folder.parent.name if self.path.name == tracking.RESULT else folder.name

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.content["task"]

    @property
    def title(self) -> str:
        """The name of the task, or the user's file and function."""
        return str(self.config.get("task", {}).get("script", self.task))

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings as the command recorded them."""
        return self.content["config"]

    @property
    def is_single(self) -> bool:
        """Whether it is of a command that leaves one run in a file."""
        return len(self.runs) + len(self.running) == 1

    @cached_property
    def metric(self) -> str:
        """The quality to compare by. Where a command does not record it, that is the first of the scores."""
        named = [each["metric"] for each in (*self.content.get("verdicts", ()), self.config) if "metric" in each]
        return next(iter([*named, *(name for run in (*self.runs, *self.running) for name in run.dev), "score"]))

    @property
    def command(self) -> str | None:
        """The command that makes it again; None if it is not known."""
        experiment = self.path.resolve().parent.name
        if "settings" in self.config:
            return f"meprop reproduce {experiment}" if experiment in experiments.built_in() else None
        return self.content.get("command")

    @property
    def unit(self) -> str:
        """What follows the name of the quality: that of a user's file says itself what it is."""
        return "" if self.is_script else ", %"

    @property
    def is_script(self) -> bool:
        """Whether the task is one of a user's file."""
        return "script" in self.config.get("task", {})

    @property
    def margin(self) -> float:
        """How much lower the score may be."""
        return self.config.get("margin", MARGIN)

    @property
    def budget(self) -> Budget:
        """What all runs have had the same of. Where no verdict says it, that is epochs if they have the same."""
        for verdict in self.content.get("verdicts", ()):
            return verdict["budget"]
        of_seconds = self.settings.get("budget_seconds") is not None or len({run.epochs for run in self.runs}) > 1
        return "seconds" if of_seconds else "epochs"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the outcome depends on beside seeds, by option."""
        config = self.config
        found = config.get("settings") or {**config, **config.get("task", {}), **config.get("training", {})}
        return {name: value for name, value in {**self.defaults, **found}.items() if name not in _NOT_SETTINGS}


def read_all(paths: Sequence[Path]) -> list[Source]:
    """Read results that are set side by side; see `read`. What was no option yet when one was made has its default."""
    found = [read(path) for path in paths]
    if len({frozenset(each.settings) for each in found}) == 1:
        return found  # to ask the options for their defaults would take the import of torch
    return [replace(each, defaults=_defaults(each)) for each in found]


def _defaults(source: Source) -> dict[str, Any]:
    from meprop.training import tasks

    entry = tasks.SCRIPT if source.is_script else tasks.table().get(source.task)
    return {} if entry is None else {**tracking.plain(entry.config()), **tracking.plain(type(entry.training)())}


def read(path: Path) -> Source:
    """Read a result.

    Args:
        path: A result.json or the like, or a folder with a result.json.

    Raises:
        ValueError: There is no such file.
        DataError: It is damaged, or of something else.
    """
    file = path / tracking.RESULT if path.is_dir() else path
    if not file.is_file():
        where = f"{path} holds no {tracking.RESULT}" if path.is_dir() else f"{path} does not exist"
        raise ValueError(f"{where}; give a folder that meprop train, compare or simplify has written, or its file")
    try:
        content = tracking.read_content(file)
        runs, running = ([_run(each) for each in content.get(name, [])] for name in ("runs", "running"))
        text = json.dumps(json.loads(file.read_bytes()), separators=(",", ":"), allow_nan=False)
        source = Source(file, text, content, runs, running)
        _check(source)
    except tracking.DAMAGE as error:
        raise DataError(
            f"{file} is damaged or not a result of meprop train, compare, simplify or reproduce "
            f"({type(error).__name__}: {error}); restore it from a copy, or leave it out"
        ) from error
    return source


_RUN, _EPOCH = get_type_hints(Run), get_type_hints(EpochRecord)
_LAYER: dict[str, Any] = {
    "name": str,
    "kind": str,
    "in_features": int,
    "out_features": int,
    "status": str,
    "density": float | None,
    "rule": dict[str, Any] | None,
    "reason": str,
}
_CHECK: dict[str, Any] = {"step": int, "prunes": bool, "widths": dict[str, int]}
_MODEL: dict[str, Any] = {
    "rule": str,
    "seed": int,
    "width": float,
    "parameters": int,
    "first_step": float,
    "last_step": float,
    "inference": dict[str, Any],
}
_CONFIG = dict.fromkeys(("task", "training", "simplify", "settings"), dict[str, Any])
_LATER = {"command": str | None}
_CONTENT: dict[str, Any] = {
    "task": str,
    "config": dict[str, Any],
    "machine": dict[str, Any],
    "versions": dict[str, Any],
    "commit": str | None,
}


def _check_entries(content: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise TypeError where an entry is of another kind, and KeyError where there is none."""
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    for name, kind in kinds.items():
        try:
            check_type(content[name], kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            raise TypeError(f"{name}: {error}") from error


def _run(content: dict[str, Any]) -> Run:
    run = Run(**content)
    _check_entries(vars(run), _RUN)
    for record in run.curve:
        _check_entries(vars(EpochRecord(**record)), _EPOCH)
    for layer in run.layers:
        _check_entries(layer, _LAYER)
    for check in run.checks:
        _check_entries(check, _CHECK)
        if check["widths"].keys() != run.checks[0]["widths"].keys():
            raise ValueError("the checks are of different layers")
    if run.activity and run.checks and run.activity.keys() != run.checks[0]["widths"].keys():
        raise ValueError("the activity is of other layers than the checks")
    if run.disturbance is not None:
        _check_entries(run.disturbance, {"stolen": float, "others": float})
    return run


def _check(source: Source) -> None:
    """Raise an error of `tracking.DAMAGE` where something is missing that a page shows or calculates with."""
    runs = [*source.runs, *source.running]
    if not runs:
        is_search = "rounds" in source.content
        raise ValueError("it is of meprop tune: give its folder confirm, or round-1" if is_search else "it has no runs")
    _check_entries(source.content, _CONTENT)
    for content, kinds in ((source.content, _LATER), (source.config, _CONFIG)):
        _check_entries(content, {name: kind for name, kind in kinds.items() if name in content})
    for model in source.content.get("models", []):
        _check_entries(model, _MODEL)
        _check_entries(model["inference"], {"p20": float})
    if source.budget not in get_args(Budget):
        raise ValueError(f"budget is {source.budget!r}")
    if not source.margin > 0:
        raise ValueError(f"margin is {source.margin}")
    if source.budget == "epochs" and len({run.epochs for run in source.runs}) > 1:
        raise ValueError("the runs have different epochs")
    for run in source.runs:
        seconds = [run.seconds[phase] for phase in (*PHASE_COLORS, "step")]
        times = [seconds[-1], *(record["seconds"] for record in run.curve)]
        if run.epochs < 1 or not run.curve or min(seconds) < 0 or min(times) <= 0 or (run.steps or 1) < 1:
            raise ValueError(
                f"the run of seed {run.seed} has {run.epochs} epochs, {run.steps} steps, the seconds {seconds}, {times}"
            )
    scores = [score for run in source.runs for score in ([run.dev, run.test] if run.test else [run.dev])]
    scores += [record["dev"] for run in runs for record in run.curve]
    if any(source.metric not in each for each in scores):
        raise LookupError(f"a score of {source.metric} is missing")

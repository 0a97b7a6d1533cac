"""Experiments as files: what `meprop reproduce` runs, written down in TOML, and the records of the runs that finished.

An experiment compares variants of one training: each is run with each seed. Its file:

    title = "Tables 1 to 3: MNIST, Adam"
    seeds = [0, 1, 2]

    [task]                  # the task's name, and its settings where they are not the default
    name = "mnist"
    dropout = 0.0

    [training]              # settings that all tasks share: fields of TrainingConfig
    epochs = 20

    [variants.dense]        # what the variant's files and its row of the table are called
    rule = "dense"
    published = { test = 97.82 }

    [variants.topk-20]      # compared with the dense variant above it, unless `against` names another
    rule = "topk"
    k = 20
    task.hidden = [500, 500]            # settings of this variant alone, as are training.scope and the like
    published = { test = 98.01, backprop = 21.4 }

    [variants.simplified]   # meSimp: the network shrinks while it trains
    rule = "topk"
    k = 20
    simplify.of_mean = 0.5              # fields of SimplifyConfig
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meprop.errors import did_you_mean
from meprop.experiments.records import RecordConfig, Records
from meprop.training import tracking
from meprop.training.config import DENSE, OF_RULES, SimplifyConfig, TrainingConfig, check_dense, rule_names
from meprop.training.settings import checked, hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from meprop.training.loop import Trainer
    from meprop.training.task import Task

__all__ = ["FOLDER", "Experiment", "Published", "RecordConfig", "Records", "Variant", "built_in", "load"]

FOLDER = Path(__file__).resolve().parent / "shipped"
"""The experiments of the paper, and ours."""

_OF_NOISE = ("noise", "noise_of", "noise_start")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Published:
    """What the paper says of a variant; None where it says nothing."""

    epochs: int | None = None
    """The epoch with the best dev score."""
    dev: float | None = None
    """The best dev score, in percent."""
    test: float | None = None
    """The test score at that epoch, in percent."""
    backprop: float | None = None
    """Dense / sparse time of the hidden layers' back-propagation."""
    overall: float | None = None
    """Dense / sparse time of forward pass and back-propagation."""
    width: float | None = None
    """Units of a hidden layer at the end, on average."""


@dataclass(frozen=True)
class Variant:
    """One way to train, which each seed is a run of."""

    name: str
    rule: str
    """The name of a rule, or "dense"."""
    task: Any
    """The task's config; its `data_dir` is not part of the experiment."""
    training: TrainingConfig
    """With the variant's k; `seeds` are the experiment's."""
    against: str | None
    """The variant that it is compared with, and trained in turns with."""
    published: Published
    simplify: SimplifyConfig | None = None
    """None: the network keeps its widths."""

    def trainer(self, task: Task, seed: int) -> Trainer:
        """Return a run of it; `task` is that of its config."""
        from meprop.training.loop import Trainer

        rule = None if self.rule == DENSE else self.training.rule(self.rule)
        return Trainer(task, self.training, rule, seed, self.simplify)

    def settings(self) -> dict[str, Any]:
        """Return all that the outcome depends on beside seed and data, as plain data by option name."""
        simplify = {} if self.simplify is None else {"simplify": tracking.plain(self.simplify)}
        return {**tracking.settings(self.task, self.training, self.rule), **simplify}


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's file."""

    name: str
    title: str
    task: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    def variant(self, name: str) -> Variant:
        """Return the variant of this name."""
        return next(variant for variant in self.variants if variant.name == name)

    def groups(self) -> list[list[Variant]]:
        """Return the variants in groups that are to be trained in turns: those that are compared with one another."""
        groups: dict[str, list[Variant]] = {}
        for variant in self.variants:
            head = variant
            while head.against is not None:
                head = self.variant(head.against)
            groups.setdefault(head.name, []).append(variant)
        return list(groups.values())


# ---------------------------------------------------------------- reading the file


def built_in() -> list[str]:
    """Return the names of the shipped experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, tasks: Mapping[str, type[Any]]) -> Experiment:
    """Read and check an experiment.

    Args:
        name: That of a shipped one, or the path of a .toml file.
        tasks: The class of each task's config by the task's name.

    Raises:
        ValueError: There is no such experiment, or its file is wrong; the message names file and key.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise ValueError(f"{path}: there is no such file")
        names = built_in()
        raise ValueError(
            f"experiment {name!r}: there are {', '.join(names)}; or give the path of a .toml file"
            + did_you_mean(name, names)
        )
    try:
        return _experiment(path.stem, tomllib.loads(path.read_text(encoding="utf-8")), tasks)
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError too
        raise ValueError(f"{path}: {error}") from error


def _experiment(name: str, content: dict[str, Any], tasks: Mapping[str, type[Any]]) -> Experiment:
    allowed: dict[str, Any] = {
        "title": str,
        "seeds": tuple[int, ...],
        "task": dict[str, Any],
        "training": dict[str, Any],
        "variants": dict[str, dict[str, Any]],
    }
    found = checked(content, allowed, "", required=("title", "seeds", "task", "variants"))
    task_settings = dict(found["task"])
    task = task_settings.pop("name", None)
    if not isinstance(task, str) or task not in tasks:
        raise ValueError(f"[task] name is {task!r}; the tasks are {', '.join(tasks)}{did_you_mean(str(task), tasks)}")
    if not found["variants"]:
        raise ValueError("[variants] is empty; give one or more")
    task_settings = checked(task_settings, _task_hints(tasks[task]), "[task] ")
    training = checked(found.get("training", {}), _training_hints(), "[training] ")
    variants: dict[str, Variant] = {}
    for key, table in found["variants"].items():
        if not _NAME.fullmatch(key):
            raise ValueError(f"[variants] {key!r}: a name has letters, digits, - and _ only, as files are called by it")
        variants[key] = _variant(key, table, tasks[task], task_settings, training, list(variants.values()))
    seeds = TrainingConfig(seeds=found["seeds"]).seeds
    return Experiment(name, found["title"], task, seeds, tuple(variants.values()))


def _variant(
    name: str,
    table: dict[str, Any],
    config: type[Any],
    task_settings: dict[str, Any],
    training: dict[str, Any],
    above: list[Variant],
) -> Variant:
    where = f"[variants.{name}] "
    allowed: dict[str, Any] = {
        "rule": rule_names(DENSE),
        "k": int | float,
        "against": str,
        "task": dict[str, Any],
        "training": dict[str, Any],
        "published": dict[str, Any],
        "simplify": dict[str, Any],
    }
    found = checked(table, allowed, where, required=("rule",))
    dense = found["rule"] == DENSE
    own = checked(found.get("training", {}), _training_hints(), f"{where}training ")
    if "k" in found:  # instead of a noise that [training] shares
        training = {name: value for name, value in training.items() if name not in _OF_NOISE}
    needs_k = not dense and {**training, **own}.get("noise") is None
    if ("k" in found) != needs_k:
        reason = "dense has no k" if dense else "give its k" if needs_k else "a noise decides how many, instead of k"
        raise ValueError(f"{where}rule is {found['rule']!r}; {reason}")
    if dense and "simplify" in found:
        raise ValueError(f"{where}simplify: what is not selected shows what to remove; dense selects nothing")
    against = found.get("against")
    if against is None and not dense:
        against = next((variant.name for variant in reversed(above) if variant.rule == DENSE), None)
    if against is not None and against not in (variant.name for variant in above):
        raise ValueError(f"{where}against is {against!r}; it must be a variant above this one")
    settings = {**task_settings, **checked(found.get("task", {}), _task_hints(config), f"{where}task ")}
    published = checked(found.get("published", {}), hints(Published), f"{where}published ")
    simplify = checked(found.get("simplify", {}), hints(SimplifyConfig), f"{where}simplify ")
    try:
        if dense:
            check_dense(own, TrainingConfig())
            training = {name: value for name, value in training.items() if name not in OF_RULES}
        k = {"k": found["k"]} if needs_k else {}
        task, shared = config(**settings), TrainingConfig(**{**training, **own}, **k)
        if not dense:
            shared.rule(found["rule"])  # whether it takes these settings
        simplified = SimplifyConfig(**simplify) if "simplify" in found else None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    return Variant(name, found["rule"], task, shared, against, Published(**published), simplified)


def _training_hints() -> dict[str, Any]:
    return hints(TrainingConfig, but=("seeds", "k"))  # which have keys of their own


def _task_hints(config: type[Any]) -> dict[str, Any]:
    return hints(config, but=("data_dir",))  # where the data lie is the reader's own affair

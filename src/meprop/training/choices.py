"""What is compared with dense: rules, each with settings of its own, written as `sampled:noise=0.5`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from meprop import rules
from meprop.errors import did_you_mean
from meprop.training.config import DENSE, RunConfig, check_dense
from meprop.training.loop import Trainer
from meprop.training.settings import checked, hints
from meprop.training.task import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_SHARED = ("epochs", "budget_seconds", "seeds", "accelerator")  # what runs that are compared have in common
_COMMA = re.compile(r",(?![^\[]*\])")
"""Between settings, and not within a list."""
_NOISE = {"noise": None, "noise_of": "layer", "noise_start": None}


@dataclass(frozen=True)
class Choice:
    """A rule, or dense, with its settings of training."""

    name: str
    """How it is written, which its runs are called."""
    rule: str
    """The name of a rule, or "dense"."""
    training: RunConfig

    def trainer(self, task: Task, seed: int) -> Trainer:
        """Return a run of it."""
        return Trainer(task, self.training, self.make_rule(), seed, name=self.name)

    def make_rule(self) -> rules.Rule | None:
        """Return the rule; None if dense."""
        return None if self.rule == DENSE else self.training.rule(self.rule)


def read_choices(texts: Sequence[str], training: RunConfig) -> list[Choice]:
    """Return dense, and what is compared with it.

    Settings in a text go before those of `training`. A rule with a k of its own has no noise. Where several rules are
    compared, those that have no noise leave aside that of `training`.

    Args:
        texts: Each is the name of a rule or "dense", with settings after a colon or none: "topk:k=0.04,scope=global"
            or "topk:k=20,k_ratio=[1,3]".
        training: The settings that they share.

    Raises:
        ValueError: There is none, or one twice; or one has a rule or a setting that does not exist or does not fit.
    """
    if not texts:
        raise ValueError("--rule has no rule; give one or more, such as --rule sampled topk:k=0.04")
    choices = [_read(text, training, len(texts) > 1) for text in texts]
    names = [choice.name for choice in choices]
    if DENSE in names:
        raise ValueError(f"--rule {DENSE}: dense is always trained; give rules to compare with it")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--rule has {', '.join(twice)} twice; give each once")
    return [Choice(DENSE, DENSE, training), *choices]


def _read(text: str, training: RunConfig, one_of_several: bool) -> Choice:
    rule, _, given = text.partition(":")
    names = [DENSE, *rules.named()]
    if rule not in names:
        raise ValueError(f"--rule {text}: the rules are {', '.join(names)}{did_you_mean(rule, names)}")
    try:
        own = checked(dict(map(_setting, _COMMA.split(given) if given else [])), hints(type(training), but=_SHARED), "")
        if rule == DENSE:
            check_dense(own, type(training)())
            training = training.of_dense()  # a precision of its own must not meet the compute_dtype of the others
        no_noise = "noise" not in own and ("k" in own or (one_of_several and rule != rules.Sampled.name))
        settings = ",".join(f"{key}={_written(value)}" for key, value in own.items())
        changed = {**(_NOISE if no_noise else {}), **own}
        choice = Choice(f"{rule}:{settings}" if own else rule, rule, replace(training, **changed))
        choice.make_rule()
    except ValueError as error:
        raise ValueError(f"--rule {text}: {error}") from error
    return choice


def _written(value: Any) -> str:
    """Return a value as a name of a run has it, which is part of the names of files."""
    return str([*value]).replace(" ", "") if isinstance(value, tuple) else str(value)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is no setting; write NAME=VALUE, such as k=0.04")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a word
    return name.strip().replace("-", "_"), parsed

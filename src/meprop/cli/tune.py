"""`meprop tune`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic

from meprop.cli.commands import HELP
from meprop.cli.common import RuleTexts, TaskConfig, Training, rule_texts, with_tasks
from meprop.cli.compare import Compare
from meprop.cli.session import Session
from meprop.training import tasks, tracking
from meprop.training.choices import Choice, read_choices
from meprop.training.config import DENSE, MARGIN
from meprop.training.halving import read_duration, rounds
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.task import Task
from meprop.training.tasks import TaskEntry
from meprop.training.verdict import SEEDS_TO_USE, Verdict, check_margin, judge_all

CANDIDATES = (
    *(f"sampled:noise={noise}" for noise in (0.1, 0.25, 0.5, 1.0)),
    *(f"{rule}:k={k},scope=global" for rule in ("sampled", "topk") for k in (0.04, 0.1)),
    "compensated:k=0.04,scope=example",
    "topk:k=0.1,scope=batch",
)
"""What is tried if nothing else is asked for."""
_SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Round:
    """One round of the search: all that is left, and dense, with the same seconds."""

    seconds: float
    """Of training, of each run."""
    scores: dict[str, float]
    """The dev score of each after the last of these seconds, the best first."""


@dataclass(frozen=True)
class Tuning(tracking.Provenance):
    """The content of result.json."""

    rounds: list[Round]
    winner: str
    """The best of the last round."""
    verdict: dict[str, Any] | None
    """On the winner, with seeds that the search has not seen; None if it was too far below dense for that."""
    line: str
    """The line of code to use; empty: leave it dense."""


@dataclass(frozen=True)
class Tune(Generic[TaskConfig, Training, RuleTexts]):
    """`meprop tune` with its options."""

    task: TaskConfig
    training: Training
    out: Path
    """Folder for result.json, and for a comparison of each round and of the end."""
    rule: RuleTexts
    budget: str = "10min"
    """Time of training in all, such as 90s, 10min or 1.5h. Loading data and evaluation are not in it."""
    margin: float = MARGIN
    """How much lower the dev score may be for sparse to count as good as dense."""
    resume: bool = False
    """Go on with the search in --out."""
    overwrite: bool = False
    """Replace an earlier search in --out."""

    def run(self) -> None:
        """Search, confirm, and write and show the answer."""
        seconds = read_duration(self.budget)
        choices = self._checked()
        session = Session(self.out, resume=self.resume, overwrite=self.overwrite, tensorboard=False)
        tracking.commit()
        task = tasks.entry_of(self.task).build(self.task)
        with session:
            if not self.resume:
                session.start("")
            whole = self._steps(task)
            found, names = [], [choice.name for choice in choices[1:]]
            longest = float("inf")
            for number, count in enumerate(sizes := rounds(len(names)), start=1):
                each = min(longest, seconds / 2 / len(sizes) / (count + 1))
                runs = self._compare(task, names[:count], each, self.training.seeds[:1], f"round-{number}")
                found.append(Round(each, _scores(runs, task.metric)))
                names = [name for name in found[-1].scores if name != DENSE]
                longest = min(longest, _dense_step(runs) * whole)
                print(_round_line(number, found[-1], task))
            winner, scores = names[0], found[-1].scores
            verdict = None
            if scores[winner] >= scores[DENSE] - self.margin:
                seeds = self.training.seeds[1:]
                runs = self._compare(task, [winner], min(longest, seconds / 4 / len(seeds)), seeds, "confirm")
                (verdict,) = judge_all(runs, task.metric, self.margin, "seconds")
            choice = next(each for each in choices if each.name == winner)
            line = _line(choice) if verdict is not None and verdict.word == "USE" else ""
            record = tracking.describe(task.name, {**tracking.plain(self), "data": task.fingerprint}, [])
            session.write_result(
                Tuning(
                    **{name: getattr(record, name) for name in ("task", "config", "machine", "versions", "commit")},
                    rounds=found,
                    winner=winner,
                    verdict=verdict and asdict(verdict),
                    line=line,
                )
            )
        _show(winner, scores, verdict, line)
        print(f"written: {self.out}")

    def _checked(self) -> list[Choice]:
        check_margin(self.margin)
        if len(self.training.seeds) <= SEEDS_TO_USE:
            raise ValueError(
                f"--seeds: the first one searches, and {SEEDS_TO_USE} or more others confirm what it finds; got "
                f"{[*self.training.seeds]}"
            )
        if self.training.budget_seconds is not None:
            raise ValueError("--budget-seconds: the seconds of each run follow from --budget; leave it out")
        return read_choices(self.rule, self.training)

    def _steps(self, task: Task) -> int:
        """Return how many steps a whole training has."""
        return self.training.epochs * Trainer(task, self.training, None, self.training.seeds[0]).steps_per_epoch

    def _compare(self, task: Task, names: list[str], seconds: float, seeds: tuple[int, ...], folder: str) -> list[Run]:
        """Return the runs of dense and these rules, with so many seconds each."""
        out = self.out / folder
        resume = self.resume and out.exists()
        training = replace(self.training, budget_seconds=seconds, seeds=seeds)
        compare = Compare(self.task, training, out, tuple(names), self.margin, resume, self.overwrite)
        return compare.train(task, quietly=True)


def _scores(runs: list[Run], metric: str) -> dict[str, float]:
    """Return the score of each run, the best first; of equals the one that was named first."""
    scores = {run.rule: run.dev[metric] for run in runs}
    return dict(sorted(scores.items(), key=lambda each: -each[1]))


def _dense_step(runs: list[Run]) -> float:
    """Return the seconds of a dense step."""
    dense = next(run for run in runs if run.rule == DENSE)
    assert dense.steps  # it is of this version
    return dense.seconds["step"] / dense.steps


def _line(choice: Choice) -> str:
    """Return the code that trains by a choice, and how that is written: it may have more settings than the code."""
    from meprop.advice.text import code

    rule, training = choice.make_rule(), choice.training
    if rule is None:
        return f"# {choice.name}"
    narrow = ", compute_dtype=torch.bfloat16" if training.compute_dtype == "bfloat16" else ""
    fuse = ", fuse=True" if training.fuse else ""
    skips = ", skip_zeros=True" if training.skip_zeros else ""
    return f'meprop.convert(model, {code(rule)}{narrow}, when="{training.when}"{fuse}{skips})  # {choice.name}'


def _round_line(number: int, found: Round, task: Task) -> str:
    scores = ", ".join(f"{name} {score:.2f}" for name, score in found.scores.items())
    return f"round {number}, {found.seconds:.1f} s of training each, dev {task.metric}{task.unit}: {scores}"


def _show(winner: str, scores: dict[str, float], verdict: Verdict | None, line: str) -> None:
    """Print the answer."""
    from meprop.reporting.terminal import verdict_line

    if verdict is None:
        print(f"Leave it dense: the best, {winner}, has {scores[winner]:.2f} in the time in which dense has "
              f"{scores[DENSE]:.2f}.")  # fmt: skip
        return
    print(verdict_line(verdict))
    print(line or "Leave it dense.")


def options() -> Any:
    """Return the type that `tyro` reads the options from."""

    def default(name: str, entry: TaskEntry) -> Any:
        training = replace(entry.training, seeds=_SEEDS)
        return Tune(entry.config(), training, Path("runs") / f"tune-{name}", CANDIDATES)

    return with_tasks(
        HELP["tune"], lambda entry: Tune[entry.config, type(entry.training), rule_texts()], default, tasks.with_script()
    )

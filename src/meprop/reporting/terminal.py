"""What a person sees in the terminal: progress while training, and at the end a table and the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean, mean, stdev
from time import monotonic
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table

from meprop.training.config import DENSE
from meprop.training.loop import Trainer
from meprop.training.records import Run
from meprop.training.verdict import Verdict

_REFRESH_SECONDS = 0.25


class TrainingProgress:
    """A progress bar per run on standard error; a plain line per epoch where that is no terminal, or a dumb one.

    The bars are drawn from `update` alone, never from a thread of their own: that would take time from the steps.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars_show = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            RemainingColumn(),
            console=self._console,
            auto_refresh=False,
            disable=not self._bars_show,
        )
        self._bars: dict[Trainer, TaskID] = {}
        self._epochs_shown: dict[Trainer, int] = {}
        self._drawn = 0.0

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, trainer: Trainer) -> None:
        """Show where a run is; cheap enough to be called every few milliseconds."""
        if self._bars_show:
            self._draw(trainer)
        elif trainer.epoch > self._epochs_shown.get(trainer, 0):
            self._epochs_shown[trainer] = trainer.epoch
            last = trainer.curve[-1]
            self._console.print(
                f"{_name(trainer)}: epoch {last.epoch}/{trainer.config.epochs}, loss {last.loss:.4f}, "
                f"{_dev(trainer)}, {last.seconds:.1f} s of training",
                highlight=False,
                soft_wrap=True,
            )

    def _draw(self, trainer: Trainer) -> None:
        now = monotonic()
        if trainer in self._bars and not trainer.finished and now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        total = int(trainer.config.budget_seconds or trainer.config.epochs * trainer.steps_per_epoch)
        if trainer not in self._bars:
            self._bars[trainer] = self._progress.add_task(_name(trainer), total=total, status="")
        status = [f"epoch {min(trainer.epoch + 1, trainer.config.epochs)}/{trainer.config.epochs}"]
        if trainer.step:
            status.append(f"loss {trainer.loss_sum / trainer.step:.4f}")
        if trainer.curve:
            status.append(_dev(trainer))
        self._progress.update(self._bars[trainer], completed=int(trainer.share * total), status=" ".join(status))
        self._progress.refresh()


def _name(trainer: Trainer) -> str:
    kept = "" if trainer.k is None or ":" in trainer.name else f" k={trainer.k}"
    return f"{trainer.name}{kept}, seed {trainer.seed}"


def _dev(trainer: Trainer) -> str:
    metric = trainer.task.metric
    return f"dev {metric} {trainer.curve[-1].dev[metric]:.2f}"


def run_table(runs: Sequence[Run], metric: str, verdicts: Sequence[Verdict] = (), unit: str = ", %") -> Table:
    """Return a table of one column per rule; those beside dense have the ratios of its times to theirs.

    Args:
        runs: The runs of one experiment; those of the same rule are averaged over their seeds.
        metric: The quality to show.
        verdicts: What `training.verdict.judge_all` says of them: adds the times to the target.
        unit: What follows the metric's name.
    """
    by_rule = {rule: [run for run in runs if run.rule == rule] for rule in dict.fromkeys(run.rule for run in runs)}
    seconds, per = _measure(runs)
    table = Table(
        title=_length(runs, verdicts),
        caption=_caption(by_rule),
        caption_justify="left",
        min_width=60,
        box=box.SIMPLE_HEAD,  # four rules fit into 80 columns
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("")
    for rule in by_rule:
        table.add_column(rule.replace(":", ":\n").replace(",", ",\n"), justify="right")  # with a line for each setting
    for split in ("dev", "test") if all(run.test for run in runs) else ("dev",):
        scores = (spread([getattr(run, split)[metric] for run in group], 2) for group in by_rule.values())
        table.add_row(f"{split} {metric}{unit}", *scores)
    table.add_section()
    if verdicts:
        table.add_row(f"time to {verdicts[0].target:.2f}, s", *_times_to_target(list(by_rule), verdicts))
    for phase in ("step", "forward", "backward", "optimizer"):
        label = "whole step" if phase == "step" else phase
        table.add_row(f"{label}, {seconds}", *_times(by_rule, phase, per))
    table.add_section()
    counts = [(rule, group[0].k) for rule, group in by_rule.items()]
    table.add_row(
        "k",
        *("all" if rule.partition(":")[0] == DENSE else "by gradient" if k is None else str(k) for rule, k in counts),
    )
    densities = [group[0].density for group in by_rule.values()]
    table.add_row("density", *("by gradient" if density is None else f"{density:.1%}" for density in densities))
    return table


def _length(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    """Return in words how long the runs trained."""
    if verdicts and verdicts[0].budget == "seconds":
        return f"After {mean(run.seconds['step'] for run in runs):.1f} seconds of training each"
    epochs = sorted({run.epochs for run in runs})
    return f"After {' to '.join(map(str, dict.fromkeys((epochs[0], epochs[-1]))))} epoch{'s' * (epochs[-1] > 1)}"


def _measure(runs: Sequence[Run]) -> tuple[str, Callable[[Run], float]]:
    """Return the unit that the runs' times are comparable in, and from a run what its seconds are divided by."""
    if len({(run.epochs, run.steps) for run in runs}) == 1:
        return "s", lambda run: 1.0
    if all(run.steps for run in runs):
        return "ms/step", lambda run: 1e-3 * (run.steps or 1)
    return "s/epoch", lambda run: run.epochs


def _caption(by_rule: Mapping[str, Sequence[Run]]) -> str:
    text = ["Scores: after the last epoch. Seconds: of training steps, without waiting for data and evaluation."]
    seeds = max(map(len, by_rule.values()))
    if seeds > 1:
        text.append(f"Mean of {seeds} seeds; of scores, with the standard deviation.")
    if DENSE in by_rule and len(by_rule) > 1:
        text.append("In brackets: dense's seconds / these; above 1, this rule is faster.")
    return " ".join(text)


def _times(by_rule: Mapping[str, Sequence[Run]], phase: str, per: Callable[[Run], float]) -> list[str]:
    """Return a cell for each rule: the mean, and the geometric mean of the ratios of the same seeds."""
    seconds = {rule: {run.seed: run.seconds[phase] / per(run) for run in group} for rule, group in by_rule.items()}
    dense = seconds.get(DENSE, {})
    cells: list[str] = []
    for rule, found in seconds.items():
        ratios = [dense[seed] / found[seed] for seed in found if seed in dense and rule != DENSE]
        cells.append(_seconds(mean(found.values()), geometric_mean(ratios) if ratios else None))
    return cells


def _times_to_target(rules: Sequence[str], verdicts: Sequence[Verdict]) -> list[str]:
    """Return a cell for each rule: the mean if all its runs reach the target, else how many do."""
    times = {verdict.rule: verdict.seconds_to_target for verdict in verdicts}
    times[DENSE] = verdicts[0].dense_seconds_to_target
    ratios = {verdict.rule: None if verdict.to_target is None else verdict.to_target.value for verdict in verdicts}
    cells: list[str] = []
    for rule in rules:
        reached = [seconds for seconds in times[rule] if seconds is not None]
        if len(reached) == len(times[rule]):
            cells.append(_seconds(mean(reached), ratios.get(rule)))
        else:
            cells.append(f"in {len(reached)} of {len(times[rule])} seeds" if reached else "never")
    return cells


def _seconds(seconds: float, ratio: float | None) -> str:
    text = f"{seconds:.{1 if seconds >= 100 else 2}f}"
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def verdict_line(verdict: Verdict) -> str:
    """Return the verdict in a line: the word, the rule, and the numbers that decide."""
    return f"{verdict.word} {verdict.rule}: {verdict.why}."


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean, and of two values or more the standard deviation; `sign` as in a format, such as "+"."""
    text = f"{mean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"

"""What a person sees in the terminal: progress while training, and at the end a table and a plain verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table

from meprop.training.config import DENSE
from meprop.training.loop import Trainer
from meprop.training.records import Run

_REFRESH_SECONDS = 0.25
# Student's t, two-sided 95%, for 2, 3, ... seeds; the last also for more, where it is a little too strict.
_T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


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
        steps = trainer.steps_per_epoch
        if trainer not in self._bars:
            self._bars[trainer] = self._progress.add_task(
                _name(trainer), total=trainer.config.epochs * steps, status=""
            )
        status = [f"epoch {min(trainer.epoch + 1, trainer.config.epochs)}/{trainer.config.epochs}"]
        if trainer.step:
            status.append(f"loss {trainer.loss_sum / trainer.step:.4f}")
        if trainer.curve:
            status.append(_dev(trainer))
        done = trainer.epoch * steps + trainer.step
        self._progress.update(self._bars[trainer], completed=done, status=" ".join(status))
        self._progress.refresh()


def _name(trainer: Trainer) -> str:
    kept = "" if trainer.k is None else f" k={trainer.k}"
    return f"{trainer.name}{kept}, seed {trainer.seed}"


def _dev(trainer: Trainer) -> str:
    metric = trainer.task.metric
    return f"dev {metric} {trainer.curve[-1].dev[metric]:.2f}"


def run_table(runs: Sequence[Run], metric: str) -> Table:
    """Return a table of one column per rule, and dense against sparse if both are there.

    Args:
        runs: The runs of one experiment; those of the same rule are averaged over their seeds.
        metric: The quality to show, in percent.
    """
    by_rule = {rule: [run for run in runs if run.rule == rule] for rule in dict.fromkeys(run.rule for run in runs)}
    seeds = max(len(group) for group in by_rule.values())
    caption = ["Seconds are totals of training; waiting for data and evaluation are not in them."]
    if seeds > 1:
        caption.append(f"Mean and standard deviation of {seeds} seeds.")
    if len(by_rule) == 2:
        caption.append("Ratio: dense seconds / sparse seconds; above 1, sparse is faster.")
    table = Table(
        title="After 1 epoch" if runs[0].epochs == 1 else f"After {runs[0].epochs} epochs",
        caption=" ".join(caption),
        caption_justify="left",
        min_width=60,
    )
    table.add_column("")
    for rule in by_rule:
        table.add_column(rule, justify="right")
    if len(by_rule) == 2:
        table.add_column("ratio", justify="right")

    def add_row(label: str, value: Callable[[Run], float], digits: int, *, ratio: bool = False) -> None:
        cells = [spread([value(run) for run in group], digits) for group in by_rule.values()]
        if len(by_rule) == 2:
            dense = by_rule[DENSE]
            (sparse,) = (group for rule, group in by_rule.items() if rule != DENSE)
            cells.append(f"{_ratio(dense, sparse, value):.2f}x" if ratio else "")
        table.add_row(label, *cells)

    if all(run.test for run in runs):
        add_row(f"test {metric}, %", lambda run: run.test[metric], 2)
    add_row(f"dev {metric}, %", lambda run: run.dev[metric], 2)
    table.add_section()
    for phase in ("forward", "backward", "optimizer", "step"):
        label = "whole step, s" if phase == "step" else f"{phase}, s"
        add_row(label, lambda run, phase=phase: run.seconds[phase], 2, ratio=True)
    table.add_section()
    counts = [(rule, group[0].k) for rule, group in by_rule.items()]
    table.add_row("k", *("all" if rule == DENSE else "by gradient" if k is None else str(k) for rule, k in counts))
    densities = [group[0].density for group in by_rule.values()]
    table.add_row("density", *("by gradient" if density is None else f"{density:.1%}" for density in densities))
    return table


def verdict(runs: Sequence[Run], metric: str) -> str:
    """Return in plain words whether sparse training was faster than dense, and whether it learned as well."""
    dense = sorted((run for run in runs if run.rule == DENSE), key=lambda run: run.seed)
    sparse = sorted((run for run in runs if run.rule != DENSE), key=lambda run: run.seed)
    if all(run.density == 1 for run in sparse):
        return "No layer was sparse, so the two runs did the same work: see the reasons above."

    backward = _ratio(dense, sparse, lambda run: run.seconds["backward"])
    step = _ratio(dense, sparse, lambda run: run.seconds["step"])
    speed = "faster" if step > 1.03 else "slower" if step < 1 / 1.03 else "as fast as dense, within 3%,"
    sentence = f"Backward {backward:.2f}x and the whole step {step:.2f}x the speed of dense: sparse is {speed} here."

    gaps = [s.test[metric] - d.test[metric] for d, s in zip(dense, sparse, strict=True)]
    gap = f"Test {metric} is {abs(mean(gaps)):.2f} points {'higher' if mean(gaps) > 0 else 'lower'} than dense"
    if mean(gaps) == 0:
        gap = f"Test {metric} is the same as dense"
    if len(gaps) == 1:
        return f"{sentence} {gap}; one seed cannot tell a small difference from chance (--seeds 0 1 2)."
    # The 95% interval of a paired t test: with few seeds two standard errors would promise too much.
    quantile = _T_QUANTILES[min(len(gaps) - 2, len(_T_QUANTILES) - 1)]
    certain = abs(mean(gaps)) > quantile * stdev(gaps) / len(gaps) ** 0.5
    meaning = (
        "more than chance explains (paired t test, 95%)"
        if certain
        else "within what chance explains (paired t test, 95%)"
    )
    return f"{sentence} {gap} (standard deviation {stdev(gaps):.2f} over {len(gaps)} seeds): {meaning}."


def _ratio(dense: Iterable[Run], sparse: Iterable[Run], value: Callable[[Run], float]) -> float:
    return mean(map(value, dense)) / mean(map(value, sparse))


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean, and of two values or more the standard deviation; `sign` as in a format, such as "+"."""
    text = f"{mean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"

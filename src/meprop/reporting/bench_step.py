"""What `meprop bench step` shows: a table and a figure of stacked bars, also as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meprop.bench.step import BASELINES, PHASES, CaseResult, StepBench, WayResult
from meprop.machine import write_atomically
from meprop.reporting import pages
from meprop.reporting.bench_linear import circumstances, milliseconds
from meprop.reporting.figures import PHASE_COLORS

SECTION = "bench step"
FIGURE = "performance-step.png"
LEGEND = (
    "Times in ms. Step: 20th percentile / median / 80th percentile; its parts: 20th percentiles. Ratios: baseline / "
    "this row, of the 20th percentiles (of the medians), above 1 this row is faster."
)

_HEAD = ("", *PHASES, "step", *(f"against {base}" for base in BASELINES))


def _cells(result: WayResult) -> list[str]:
    if result.step is None:
        return [result.way.name, *[""] * len(PHASES), "WRONG", *[""] * len(BASELINES)]
    parts = [f"{1e3 * result.phases[phase].p20:.3g}" for phase in PHASES]
    found = [result.ratios.get(base) for base in BASELINES]  # None: that baseline is wrong
    ratios = ["" if ratio is None else f"{ratio.p20:.2f}x ({ratio.p50:.2f}x)" for ratio in found]
    return [result.way.name, *parts, milliseconds(result.step), *ratios]


def table(cases: Sequence[CaseResult]) -> str:
    """Return tables of plain text, one per case."""
    blocks: list[str] = []
    for case in cases:
        wrong = [f"WRONG: {result.way.name}: {result.wrong}" for result in case.ways if result.wrong]
        blocks.append("\n".join([case.name, pages.text_table([_HEAD, *map(_cells, case.ways)]), *wrong]))
    return "\n\n".join(blocks)


def markdown(bench: StepBench) -> str:
    """Return the results as Markdown; the figure lies beside the page."""
    blocks = [f"{circumstances(bench)} k = {bench.config['k']}.", f"![Parts of the step]({FIGURE})"]
    for case in bench.cases:
        blocks += [f"**{case.name}**", pages.markdown_table([_HEAD, *map(_cells, case.ways)])]
    return "\n\n".join([*blocks, LEGEND])


def draw(bench: StepBench, path: Path) -> None:
    """Draw the parts of the step of every case into a PNG, a panel per case.

    Args:
        bench: The results.
        path: The file; it is replaced if it exists.
    """
    cases = bench.cases
    figure = Figure(figsize=(6.2 * len(cases), 4.4), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        _draw_case(axes, case)
    panels[0].legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_case(axes: Axes, case: CaseResult) -> None:
    results = [result for result in case.ways if result.step is not None]
    names = [result.way.name for result in results]
    left = [0.0] * len(results)
    for phase in PHASES:
        widths = [1e3 * result.phases[phase].p20 for result in results]
        axes.barh(names, widths, left=left, color=PHASE_COLORS[phase], label=phase, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end, result in zip(names, left, results, strict=True):
        ratio = result.ratios.get(BASELINES[0])
        text = "" if ratio is None else f"{ratio.p20:.1f}x"
        axes.annotate(text, (end, name), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left, default=1.0))
    axes.set_xlabel("ms per step (ratios: dense fp32 / this row)")
    axes.set_title(case.name)
    axes.spines[["top", "right"]].set_visible(False)

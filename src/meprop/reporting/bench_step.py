"""The figure of `meprop bench step`: the parts of each step as stacked bars."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meprop.bench.step import CaseResult, StepBench
from meprop.bench.ways import BASELINES, PHASES
from meprop.machine import write_atomically
from meprop.reporting.figures import PHASE_COLORS


def draw(bench: StepBench, path: Path) -> None:
    """Draw the parts of the step of every case into a PNG, a panel per case.

    Args:
        bench: The results.
        path: The file; it is replaced if it exists.
    """
    cases = bench.cases
    rows = max((len(case.ways) for case in cases), default=0)
    figure = Figure(figsize=(6.2 * len(cases), 1.4 + 0.3 * rows), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        _draw_case(axes, case)
    panels[0].legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_case(axes: Axes, case: CaseResult) -> None:
    results = [result for result in case.ways if result.step is not None]
    names = [result.name for result in results]
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

"""The figure of `meprop bench linear`: ratio over density, and where sparse stops being faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from meprop.bench.linear import CaseResult, Kind
from meprop.bench.problem import Dtype
from meprop.machine import write_atomically

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

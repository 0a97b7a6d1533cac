"""What `meprop bench layers` shows: a table, also as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence

from meprop.bench.layers import Comparison, LayersBench
from meprop.reporting import pages
from meprop.reporting.bench_linear import circumstances, milliseconds

LEGEND = (
    "Times in ms per batch: 20th percentile / median / 80th percentile. Ratios: dense / sparse of the 20th "
    "percentiles, above 1 sparse is faster. Layers: their backward pass alone, on inputs and output gradients recorded "
    "in training. Whole step: forward pass, backward pass and optimizer."
)

_HEAD = ("", "kind", "N x I x O", "kept", "dense, ms", "sparse, ms", "ratio", "of medians")


def section(task: str) -> str:
    """Return the name of a page's section for this task."""
    return f"bench layers {task}"


def _cells(row: Comparison) -> list[str]:
    layer = row.layer
    about = [
        row.name,
        layer.kind if layer else "",
        f"{row.rows:.0f} x {layer.in_features} x {layer.out_features}" if layer and row.rows is not None else "",
        f"{layer.density:.1%}" if layer else "",
    ]
    if row.ratio is None:
        return [*about, "", "", "WRONG", ""]
    times = (milliseconds(row.times[side]) for side in ("dense", "sparse"))
    return [*about, *times, f"{row.ratio.p20:.2f}x", f"{row.ratio.p50:.2f}x"]


def table(rows: Sequence[Comparison]) -> str:
    """Return a table of plain text, a line per row."""
    lines = pages.text_table([_HEAD, *map(_cells, rows)])
    return "\n".join([lines, *(f"WRONG: {row.name}: {row.wrong}" for row in rows if row.wrong)])


def markdown(bench: LayersBench) -> str:
    """Return the results as Markdown."""
    settings = {**bench.config["task"], **{name: bench.config[name] for name in ("k", "scope", "optimizer")}}
    shown = ", ".join(f"{name} = {value}" for name, value in settings.items() if name != "data_dir")
    rows = pages.markdown_table([_HEAD, *map(_cells, bench.layers)])
    return "\n\n".join([f"{circumstances(bench)} Settings: {shown}.", rows, LEGEND])

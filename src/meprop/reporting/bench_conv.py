"""What `meprop bench conv` shows: a table, also as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence

from meprop.bench.conv import CaseResult, ConvBench
from meprop.reporting import pages
from meprop.reporting.bench_linear import circumstances, milliseconds

SECTION = "bench conv"
LEGEND = (
    "Sparse is float32; times in ms: 20th percentile / median / 80th percentile. Ratios: torch's convolution / sparse "
    "of the 20th percentiles (of the medians), above 1 sparse is faster. The selection and autograd are included."
)

_SIDES = ("dense_fp32", "dense_bf16")
_HEAD = ("choice", "N x I x O", "memory", "kept", "sparse", "fp32", "ratio", "bf16", "ratio")


def _cells(result: CaseResult) -> list[str]:
    case = result.case
    memory = "channels last" if case.channels_last else "contiguous"
    cells = [case.scope, case.shape, memory, f"{case.k} ({case.k / case.outputs:.0%})"]
    if result.wrong is not None:
        return [*cells, "WRONG", *[""] * (2 * len(_SIDES))]
    cells.append(milliseconds(result.times["sparse"]))
    for side in _SIDES:
        ratio = result.ratios[side]
        cells += [milliseconds(result.times[side]), f"{ratio.p20:.2f}x ({ratio.p50:.2f}x)"]
    return cells


def table(results: Sequence[CaseResult]) -> str:
    """Return a table of plain text, a line per case."""
    lines = pages.text_table([_HEAD, *map(_cells, results)])
    return "\n".join([lines, *(f"WRONG: {result.name}: {result.wrong}" for result in results if result.wrong)])


def markdown(bench: ConvBench) -> str:
    """Return the results as Markdown."""
    return "\n\n".join([circumstances(bench), pages.markdown_table([_HEAD, *map(_cells, bench.cases)]), LEGEND])

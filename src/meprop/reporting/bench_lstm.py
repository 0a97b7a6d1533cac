"""What `meprop bench lstm` shows: a table, also as a section of a page."""

from __future__ import annotations

from collections.abc import Sequence

from meprop.bench.lstm import CaseResult, LstmBench
from meprop.reporting import pages
from meprop.reporting.bench_linear import circumstances, milliseconds

SECTION = "bench lstm"
LEGEND = (
    "float32; times in ms: 20th percentile / median / 80th percentile. Ratios: torch's LSTM / sparse of the 20th "
    "percentiles (of the medians), above 1 sparse is faster. The backward pass includes the selection and autograd."
)

_PASSES = [f"{name}, {side}" for name in ("forward", "backward") for side in ("torch", "sparse", "ratio")]
_HEAD = ("choice", "T x B x I x H", "k of each gate", *_PASSES)


def _cells(result: CaseResult) -> list[str]:
    case = result.case
    cells = [case.scope, case.shape, str(case.k)]
    for name, ratio in (("forward", result.forward), ("backward", result.backward)):
        if ratio is None:
            cells += ["", "", "WRONG"]
        else:
            cells += [milliseconds(result.times[f"{name} {side}"]) for side in ("dense", "sparse")]
            cells.append(f"{ratio.p20:.2f}x ({ratio.p50:.2f}x)")
    return cells


def table(results: Sequence[CaseResult]) -> str:
    """Return a table of plain text, a line per case."""
    lines = pages.text_table([_HEAD, *map(_cells, results)])
    return "\n".join([lines, *(f"WRONG: {result.name}: {result.wrong}" for result in results if result.wrong)])


def markdown(bench: LstmBench) -> str:
    """Return the results as Markdown."""
    return "\n\n".join([circumstances(bench), pages.markdown_table([_HEAD, *map(_cells, bench.cases)]), LEGEND])

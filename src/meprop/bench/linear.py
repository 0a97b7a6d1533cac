"""The backward pass of one linear layer on a CPU, sparse against dense, over shapes and densities.

A case is checked against the oracle first; one that is wrong is not timed. Timed is autograd's backward pass alone, for
the gradients of input, weight and bias, selection and autograd's own cost included, on random normal data; the graph is
made once, outside the timing, and kept.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import meprop
from meprop.bench import cases, oracle, problem
from meprop.bench.cases import run_each
from meprop.bench.measure import Ratio, Times, interleaved
from meprop.bench.problem import DTYPES, Device, Dtype, Problem
from meprop.bench.record import Record
from meprop.bench.roofline import Limits, Roofline, Work, measure_limits, roofline
from meprop.disturbance import Disturbance, DisturbanceMeter
from meprop.rules import Rule
from meprop.selection import FeatureSelection
from meprop.training import tracking

Kind = Literal["example", "batch", "rows", "topk"]

BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case(cases.Case):
    """One row of the table.

    Attributes:
        kind: The backward pass with a selection in each "example", for the whole "batch" or of whole "rows", or the
            selection "topk" in each row alone.
        dtype: Of all tensors.
        rows: N.
        inputs: I; 0 for "topk".
        outputs: O.
        k: How many of the O are kept; of "rows" how many of the N.

    Raises:
        ValueError: A size is out of range.
    """

    pattern = re.compile(r"(example|batch|rows|topk)-(fp32|bf16)-(\d+)x(?:(\d+)x)?(\d+)-k(\d+)")

    kind: Kind
    dtype: Dtype
    rows: int
    inputs: int
    outputs: int
    k: int

    def __post_init__(self) -> None:
        if min(self.rows, self.outputs) < 1 or not 1 <= self.k <= self._every:
            raise ValueError(f"case {self.name}: sizes must be at least 1, and k at most {self._every}")
        if (self.inputs > 0) != (self.kind != "topk"):
            raise ValueError(f"case {self.name}: example, batch and rows are N x I x O, topk is N x O")

    @classmethod
    def from_groups(cls, groups: Sequence[Any]) -> Case:
        """Return the case of a name such as example-fp32-64x512x512-k20 or topk-fp32-64x500-k20."""
        kind, dtype, *sizes = groups
        return cls(kind, dtype, *(int(size or 0) for size in sizes))

    @property
    def name(self) -> str:
        """Kind, dtype, sizes and k, as `parse` takes them."""
        return f"{self.kind}-{self.dtype}-{self.shape.replace(' ', '')}-k{self.k}"

    @property
    def shape(self) -> str:
        """N x I x O, or N x O."""
        return " x ".join(str(size) for size in (self.rows, self.inputs, self.outputs) if size)

    @property
    def density(self) -> float:
        """The share of the output gradient that is kept: k / O, or k / N of "rows"."""
        return self.k / self._every

    @property
    def _every(self) -> int:
        """Of how many k are kept."""
        return self.rows if self.kind == "rows" else self.outputs

    @property
    def rule(self) -> Rule:
        """What selects."""
        if self.kind == "rows":
            return problem.rule_of_rows(self.density)
        return meprop.TopK(self.k, scope="batch" if self.kind == "batch" else "example")


def default_cases() -> list[Case]:
    """Return the whole grid: shapes at 4%, small layers at k=20, densities at one shape, and the selection alone."""

    def case(kind: Kind, dtype: Dtype, shape: tuple[int, int, int], density: float) -> Case:
        return Case(kind, dtype, *shape, k=max(1, round(density * shape[2])))

    usual = (512, 2048, 2048)
    shapes = (usual, (1024, 4096, 4096), (2048, 768, 3072), (2048, 3072, 768))
    kinds: tuple[Kind, ...] = ("example", "batch")
    densities = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    found = [case("example", "fp32", shape, 0.04) for shape in shapes]
    found += [Case("example", "fp32", 64, 512, 512, k=20), Case("example", "fp32", 32, 784, 500, k=20)]
    found += [case(kind, dtype, usual, density) for kind in kinds for dtype in DTYPES for density in densities]
    found += [Case("topk", "fp32", n, 0, o, k) for n, o, k in ((512, 2048, 82), (64, 500, 20), (4096, 3072, 123))]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class CaseResult(cases.CaseResult[Case]):
    """What was found for one case.

    The sides are "dense_fp32", "dense_bf16", "sparse" and "converted"; of "batch", whose "sparse" has a row-sparse
    weight gradient, also "sparse_dense_form". Of "topk" they are "torch" (`torch.topk(g.abs(), k)`) and "sparse".

    Attributes:
        ratios: By name: "dense" (the baseline of the case's own dtype against "sparse"), "other_dtype" (the baseline of
            the other one), and of that first baseline "dense_form" and "converted".
        roofline: The floor under "sparse".
        share: Of the bound that "sparse" reaches: floor / 20th percentile.
        converted: What the layer decided that `meprop.convert` has converted.
        disturbance: By others, while it was timed; None if unknown.
    """

    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    roofline: Roofline | None = None
    share: float | None = None
    converted: str | None = None
    disturbance: Disturbance | None = None


@dataclass(frozen=True)
class LinearBench(Record):
    """The content of result.json."""

    limits: Limits
    """What the machine reached in this run."""
    cases: list[CaseResult]

    @property
    def results(self) -> list[CaseResult]:
        """Return those of the cases."""
        return self.cases


@contextmanager
def _fresh_decisions() -> Generator[None]:
    """Lets converted layers decide by today's kernels, not by what an earlier build left in the cache folder."""
    before = os.environ.get("MEPROP_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEPROP_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["MEPROP_CACHE"]
            else:
                os.environ["MEPROP_CACHE"] = before


def run_case(case: Case, seconds: float, limits: Limits) -> CaseResult:
    """Check one case, then time it."""
    return _run_topk(case, seconds, limits) if case.kind == "topk" else _run_backward(case, seconds, limits)


# ---------------------------------------------------------------- the selection alone


def _run_topk(case: Case, seconds: float, limits: Limits) -> CaseResult:
    grad = problem.normal(0, case.dtype, case.rows, case.outputs)
    wrong = oracle.selection_differs(case.rule, grad, oracle.select(case.rule, grad))
    if wrong is not None:
        return CaseResult(case.name, case, wrong)
    sides = {"torch": lambda: torch.topk(grad.abs(), case.k), "sparse": lambda: case.rule.select(grad)}
    meter = DisturbanceMeter()
    times = interleaved(sides, seconds)
    size = BYTES[case.dtype]
    work = Work(0, 0, case.rows * (case.outputs * size + case.k * (size + 4)))  # indices are int32
    bound = roofline(work, case.dtype, limits)
    ratios = {"dense": Ratio.of(times["torch"], times["sparse"])}
    share = bound.floor / times["sparse"].p20
    return CaseResult(case.name, case, None, times, ratios, bound, share, disturbance=meter.read())


# ---------------------------------------------------------------- the backward pass


def _run_backward(case: Case, seconds: float, limits: Limits) -> CaseResult:
    problems = {dtype: Problem.random(dtype, case.rows, case.inputs, case.outputs) for dtype in DTYPES}
    own, other = problems[case.dtype], "bf16" if case.dtype == "fp32" else "fp32"
    sides = {"sparse": problem.sparse(own, case.rule, sparse_grad=case.kind == "batch")}
    if case.kind == "batch":
        sides["sparse_dense_form"] = problem.sparse(own, case.rule, sparse_grad=False)
    selection = oracle.select(case.rule, own.grad_output)
    wrong = oracle.selection_differs(case.rule, own.grad_output, selection)
    for name, side in sides.items():
        wrong = wrong or problem.differs(name, side, selection, own)
    if wrong is not None:
        return CaseResult(case.name, case, wrong)

    sides |= {f"dense_{dtype}": problem.dense(each) for dtype, each in problems.items()}
    sides["converted"], converted = problem.converted(own, case.rule)
    meter = DisturbanceMeter()
    times = interleaved(sides, seconds)
    dense = times[f"dense_{case.dtype}"]
    ratios = {
        "dense": Ratio.of(dense, times["sparse"]),
        "other_dtype": Ratio.of(times[f"dense_{other}"], times["sparse"]),
        "converted": Ratio.of(dense, times["converted"]),
    }
    if "sparse_dense_form" in times:
        ratios["dense_form"] = Ratio.of(dense, times["sparse_dense_form"])
    bound = roofline(_backward_work(case, selection), case.dtype, limits)
    share = bound.floor / times["sparse"].p20
    return CaseResult(case.name, case, None, times, ratios, bound, share, converted, meter.read())


def _backward_work(case: Case, selection: FeatureSelection) -> Work:
    """Counts both products; of the memory, each operand that is needed and each result once."""
    size = BYTES[case.dtype]
    multiply_adds = 2 * case.rows * case.k * case.inputs
    weight_rows = int(selection.indices.unique().numel())  # read for the input's gradient
    grad_weight_rows = case.k if case.kind == "batch" else case.outputs
    entries = case.rows * case.outputs + case.outputs  # grad_output and the bias's gradient
    entries += (2 * case.rows + weight_rows + grad_weight_rows) * case.inputs  # input and its gradient; the weight's
    # Each example gathers other rows, a line per vector of multiply-adds; a batch's panel is reused from registers.
    gathered = multiply_adds * size if case.kind == "example" else 0
    return Work(multiply_adds, gathered, entries * size)


# ---------------------------------------------------------------- the command


def _ratio(name: str) -> Callable[[CaseResult], str]:
    return lambda result: f"{result.ratios[name].p20:.2f}x" if name in result.ratios else ""


def _baseline(result: CaseResult) -> Times:
    return result.times["torch" if result.case.kind == "topk" else f"dense_{result.case.dtype}"]


def _after_convert(result: CaseResult) -> str:
    if result.converted is None:
        return ""
    return _ratio("converted")(result) + ("" if result.converted.startswith("sparse") else " (dense)")


_COLUMNS: dict[str, Callable[[CaseResult], str]] = {
    "case": lambda result: result.name,
    "kept": lambda result: f"{result.case.density:.1%}",
    "dense, ms": lambda result: _baseline(result).milliseconds,
    "sparse, ms": lambda result: result.times["sparse"].milliseconds,
    "ratio": lambda result: "WRONG" if result.wrong is not None else _ratio("dense")(result),
    "of medians": lambda result: f"{result.ratios['dense'].p50:.2f}x",
    "other dtype's dense": _ratio("other_dtype"),
    "dense dW": _ratio("dense_form"),
    "after convert": _after_convert,
    "bound": lambda result: result.roofline.bound if result.roofline else "",
    "reached": lambda result: f"{result.share:.0%}" if result.share is not None else "",
}
_SHOWN_IF_WRONG = ("case", "kept", "ratio")


@dataclass(frozen=True)
class Linear(cases.CasesBench[Case, CaseResult]):
    """Time the backward pass of a linear layer, sparse against dense, over shapes and densities."""

    name = "linear"
    head = tuple(_COLUMNS)
    legend = (
        "Times in ms: 20th percentile / median / 80th percentile. Ratios: dense / sparse of the 20th percentiles, "
        "above 1 sparse is faster. Dense: F.linear's backward pass in the row's own dtype; of topk, "
        "torch.topk(g.abs(), k). Unified passes (batch) give a row-sparse weight gradient; 'dense dW': the same with a "
        "dense one. 'After convert': the same layer after meprop.convert(model, rule), '(dense)' where it decided to "
        "stay so. 'Reached': the share of its bound, a counted floor over limits measured in the same run."
    )
    figure = tracking.FIGURE
    figure_title = "Ratio over density"
    default_cases = staticmethod(default_cases)

    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, such as 'batch-*', or names of others in any size, such as
    example-fp32-64x512x512-k20."""
    device: Device = "cpu"
    """Where to measure. A CUDA device has default cases and a table of its own (docs/gpu.md)."""

    def on_device(self) -> cases.CasesBench[Any, Any]:
        """Return itself, or the benchmark of the same layer on a CUDA device."""
        from meprop.bench.cuda_linear import CudaLinear

        return self if self.device == "cpu" else CudaLinear(cases=self.cases, seconds=self.seconds)

    def prepare(self) -> cases.Measure[CaseResult, Record]:
        """Choose the cases.

        Raises:
            ValueError: One of them is for a CUDA device only.
        """
        for case in self.choose(self.cases):
            if case.kind == "rows":
                raise ValueError(f"--cases {case.name}: whole rows are timed with --device cuda only")
        return super().prepare()

    @classmethod
    def example_names(cls) -> list[str]:
        """Return one for each kind."""
        return [f"{default_cases()[0].name}, batch-bf16-64x512x512-k20", "topk-fp32-64x500-k20"]

    def run(self, cases: Sequence[Case], config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> LinearBench:
        """Measure the machine's limits, then run the cases."""
        meter = DisturbanceMeter()
        with _fresh_decisions():
            limits = measure_limits()
            results = run_each(cases, lambda case: run_case(case, self.seconds, limits), after)
        return LinearBench.of(f"bench-{self.name}", dict(config), meter, limits, results)

    def ratio(self, result: CaseResult) -> Ratio:
        """Return that to dense in the case's own dtype."""
        return result.ratios["dense"]

    def cells(self, result: CaseResult) -> list[str]:
        """Return all columns; of a wrong case, those that it has."""
        shown = _COLUMNS if result.wrong is None else _SHOWN_IF_WRONG
        return [cell(result) if column in shown else "" for column, cell in _COLUMNS.items()]

    def about(self, record: Record) -> str:
        """Return the circumstances, and the machine's limits."""
        assert isinstance(record, LinearBench)
        rates = ", ".join(f"{rate / 1e9:.0f} ({dtype})" for dtype, rate in record.limits.multiply_adds.items())
        return (
            f"{record.circumstances} Limits reached: {rates} G multiply-adds/s, "
            f"{record.limits.cache_bytes / 1e9:.0f} GB/s from L2 to L1."
        )

    def blocks(self, results: Sequence[CaseResult]) -> list[str]:
        """Return where each curve breaks even, and the table."""
        from meprop.reporting.bench_linear import curves

        verdicts = [f"- {curve.title}, {curve.shape}: {curve.verdict()}." for curve in curves(results)]
        return [*(["\n".join(verdicts)] if verdicts else []), *super().blocks(results)]

    def draw(self, record: Record, path: Path) -> bool:
        """Draw ratio over density, of two densities or more."""
        from meprop.reporting.bench_linear import curves, draw_ratios

        found = curves(record.results)
        if found:
            draw_ratios(found, path)
        return bool(found)

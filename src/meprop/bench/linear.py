"""The backward pass of one linear layer, sparse against dense, over shapes and densities.

A case is checked against the oracle first; one that is wrong is not timed. Timed is autograd's backward pass alone, for
the gradients of input, weight and bias, selection and autograd's own cost included, on random normal data; the graph is
made once, outside the timing, and kept.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import meprop
from meprop import functional
from meprop.bench import oracle, record
from meprop.bench.measure import Disturbance, DisturbanceMeter, Ratio, Times, interleaved
from meprop.bench.record import Record
from meprop.bench.roofline import Limits, Roofline, Work, measure_limits, roofline
from meprop.errors import NoEffectWarning
from meprop.selection import Selection

Kind = Literal["example", "batch", "topk"]
Dtype = Literal["fp32", "bf16"]

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_NAME = re.compile(r"(example|batch|topk)-(fp32|bf16)-(\d+)x(?:(\d+)x)?(\d+)-k(\d+)")


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        kind: The backward pass with a selection in each "example" or for the whole "batch", or the row "topk" alone.
        dtype: Of all tensors.
        rows: N.
        inputs: I; 0 for "topk".
        outputs: O.
        k: How many of the O are kept.

    Raises:
        ValueError: A size is out of range.
    """

    kind: Kind
    dtype: Dtype
    rows: int
    inputs: int
    outputs: int
    k: int

    def __post_init__(self) -> None:
        if min(self.rows, self.outputs) < 1 or not 1 <= self.k <= self.outputs:
            raise ValueError(f"case {self.name}: sizes must be at least 1, and k at most {self.outputs}")
        if (self.inputs > 0) != (self.kind != "topk"):
            raise ValueError(f"case {self.name}: example and batch are N x I x O, topk is N x O")

    @classmethod
    def parse(cls, name: str) -> Case | None:
        """Return the case of this name, such as example-fp32-64x512x512-k20; None if it is no such name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        kind, dtype, rows, inputs, outputs, k = match.groups()
        return cls(kind, dtype, int(rows), int(inputs or 0), int(outputs), int(k))  # pyright: ignore[reportArgumentType]

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
        """The share of the output gradient that is kept, k / O."""
        return self.k / self.outputs

    @property
    def rule(self) -> meprop.TopK:
        """What selects."""
        return meprop.TopK(self.k, scope="batch" if self.kind == "batch" else "example")


def default_cases() -> list[Case]:
    """Return the whole grid: shapes at 4%, small layers at k=20, densities at one shape, and the selection alone."""

    def case(kind: Kind, dtype: Dtype, shape: tuple[int, int, int], density: float) -> Case:
        return Case(kind, dtype, *shape, k=max(1, round(density * shape[2])))

    usual = (512, 2048, 2048)
    shapes = (usual, (1024, 4096, 4096), (2048, 768, 3072), (2048, 3072, 768))
    kinds: tuple[Kind, ...] = ("example", "batch")
    densities = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    cases = [case("example", "fp32", shape, 0.04) for shape in shapes]
    cases += [Case("example", "fp32", 64, 512, 512, k=20), Case("example", "fp32", 32, 784, 500, k=20)]
    cases += [case(kind, dtype, usual, density) for kind in kinds for dtype in _DTYPES for density in densities]
    cases += [Case("topk", "fp32", n, 0, o, k) for n, o, k in ((512, 2048, 82), (64, 500, 20), (4096, 3072, 123))]
    return list(dict.fromkeys(cases))


def choose_cases(patterns: Sequence[str]) -> list[Case]:
    """Return the cases of the grid that match a pattern, and others that are named: see `record.choose`."""
    grid = default_cases()
    examples = f"{grid[0].name}, batch-bf16-64x512x512-k20 or topk-fp32-64x500-k20"
    return record.choose(patterns, grid, Case.parse, examples)


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class CaseResult:
    """What was found for one case.

    Attributes:
        name: The case's.
        case: The case.
        wrong: How it differs from the oracle; None if it does not. A wrong case has nothing but this.
        times: By side: "dense_fp32", "dense_bf16", "sparse"; of "batch", whose "sparse" has a row-sparse weight
            gradient, "sparse_dense_form"; "converted". Of "topk": "torch" (`torch.topk(g.abs(), k)`) and "sparse".
        ratios: By name: "dense" (the baseline of the case's own dtype against "sparse"), "other_dtype" (the baseline of
            the other one), and of that first baseline "dense_form" and "converted".
        roofline: The floor under "sparse".
        share: Of the bound that "sparse" reaches: floor / 20th percentile.
        converted: What the layer decided that `meprop.convert` has converted.
        disturbance: By others, while it was timed; None if unknown.
    """

    name: str
    case: Case
    wrong: str | None = None
    times: dict[str, Times] = field(default_factory=dict[str, Times])
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
    def wrong(self) -> list[str]:
        """Return the names of the cases that differ from the oracle."""
        return [result.name for result in self.cases if result.wrong is not None]


def run(
    cases: Sequence[Case],
    seconds: float,
    config: dict[str, Any],
    after_case: Callable[[CaseResult], None] = lambda result: None,
) -> LinearBench:
    """Check and time the cases.

    Args:
        cases: What to time.
        seconds: To spend on each case's timing; slow ones take longer, for 9 rounds.
        config: Kept in the record.
        after_case: Called with each result.
    """
    meter = DisturbanceMeter()
    results: list[CaseResult] = []
    with _fresh_decisions():
        limits = measure_limits()
        for case in cases:
            results.append(run_case(case, seconds, limits))
            after_case(results[-1])
    return LinearBench.of("bench-linear", config, meter, limits, results)


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
    grad = _normal(0, case.dtype, case.rows, case.outputs)
    wrong = oracle.selection_differs(case.rule, grad, oracle.select(case.rule, grad))
    if wrong is not None:
        return CaseResult(case.name, case, wrong)
    sides = {"torch": lambda: torch.topk(grad.abs(), case.k), "sparse": lambda: case.rule.select(grad)}
    meter = DisturbanceMeter()
    times = interleaved(sides, seconds)
    size = _BYTES[case.dtype]
    work = Work(0, 0, case.rows * (case.outputs * size + case.k * (size + 4)))  # indices are int32
    bound = roofline(work, case.dtype, limits)
    ratios = {"dense": Ratio.of(times["torch"], times["sparse"])}
    share = bound.floor / times["sparse"].p20
    return CaseResult(case.name, case, None, times, ratios, bound, share, disturbance=meter.read())


# ---------------------------------------------------------------- the backward pass


@dataclass(frozen=True)
class _Problem:
    """A linear layer's tensors: x [N, I], weight [O, I] and bias [O], which need gradients, and grad_output [N, O]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, case: Case, dtype: Dtype) -> _Problem:
        sizes = ((case.rows, case.inputs), (case.outputs, case.inputs), (case.outputs,))
        x, weight, bias = (_normal(seed, dtype, *size).requires_grad_() for seed, size in enumerate(sizes, start=1))
        return cls(x, weight, bias, _normal(0, dtype, case.rows, case.outputs))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.bias


Backward = Callable[[], tuple[Tensor, ...]]


def _backward(forward: Callable[[Tensor], Tensor], problem: _Problem, leaves: tuple[Tensor, ...]) -> Backward:
    """The backward pass of a graph that is made now."""
    y = forward(problem.x)
    return lambda: torch.autograd.grad(y, leaves, problem.grad_output, retain_graph=True)


def _dense(problem: _Problem) -> Backward:
    return _backward(lambda x: F.linear(x, problem.weight, problem.bias), problem, problem.leaves)


def _sparse(problem: _Problem, rule: meprop.TopK, *, sparse_grad: bool) -> Backward:
    def forward(x: Tensor) -> Tensor:
        return functional.linear(x, problem.weight, problem.bias, rule=rule, sparse_grad=sparse_grad)

    return _backward(forward, problem, problem.leaves)


def _converted(problem: _Problem, rule: meprop.TopK) -> tuple[Backward, str]:
    """The backward pass of a layer after plain `meprop.convert`, once it has decided, and what it decided."""
    layer = torch.nn.Linear(problem.x.shape[1], problem.weight.shape[0], device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(problem.weight.detach()), torch.nn.Parameter(problem.bias.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # a narrow layer stays dense: that is what is measured then
        meprop.convert(layer, rule)
    leaves = (problem.x, layer.weight, layer.bias)
    _backward(layer, problem, leaves)()  # decides
    report = meprop.report(layer).layers[0]
    return _backward(layer, problem, leaves), f"{report.status}: {report.reason}"


def _run_backward(case: Case, seconds: float, limits: Limits) -> CaseResult:
    problems = {dtype: _Problem.random(case, dtype) for dtype in _DTYPES}
    own, other = problems[case.dtype], "bf16" if case.dtype == "fp32" else "fp32"
    sides = {"sparse": _sparse(own, case.rule, sparse_grad=case.kind == "batch")}
    if case.kind == "batch":
        sides["sparse_dense_form"] = _sparse(own, case.rule, sparse_grad=False)
    selection = oracle.select(case.rule, own.grad_output)
    wrong = oracle.selection_differs(case.rule, own.grad_output, selection)
    for name, side in sides.items():
        wrong = wrong or _differs(name, side, selection, own)
    if wrong is not None:
        return CaseResult(case.name, case, wrong)

    sides |= {f"dense_{dtype}": _dense(problem) for dtype, problem in problems.items()}
    sides["converted"], converted = _converted(own, case.rule)
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


def _differs(name: str, side: Backward, selection: Selection, problem: _Problem) -> str | None:
    def named() -> oracle.Gradients:
        return dict(zip(("input", "weight", "bias"), side(), strict=True))

    gradients = named()
    found = oracle.gradients_differ(gradients, selection, problem.grad_output, problem.x, problem.weight)
    found = found or oracle.varies(named, gradients)
    return found and f"{name}: {found}"


def _backward_work(case: Case, selection: Selection) -> Work:
    """Counts both products; of the memory, each operand that is needed and each result once."""
    size = _BYTES[case.dtype]
    multiply_adds = 2 * case.rows * case.k * case.inputs
    weight_rows = int(selection.indices.unique().numel())  # read for the input's gradient
    grad_weight_rows = case.k if case.kind == "batch" else case.outputs
    entries = case.rows * case.outputs + case.outputs  # grad_output and the bias's gradient
    entries += (2 * case.rows + weight_rows + grad_weight_rows) * case.inputs  # input and its gradient; the weight's
    # Each example gathers other rows, a line per vector of multiply-adds; a batch's panel is reused from registers.
    gathered = multiply_adds * size if case.kind == "example" else 0
    return Work(multiply_adds, gathered, entries * size)


def _normal(seed: int, dtype: Dtype, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(_DTYPES[dtype])

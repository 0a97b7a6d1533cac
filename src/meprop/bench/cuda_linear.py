"""`meprop bench linear --device cuda`: the backward pass of one linear layer on a GPU, sparse against dense.

As on a CPU, a case is checked against the oracle first, and timed is autograd's backward pass alone. Each side is timed
as a loop launches it ("eager"), and as a replayed CUDA graph ("graph"), which has no cost of the host. A side that
cannot be captured has no graph, and the result says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from meprop.bench import cases, cuda, oracle, problem
from meprop.bench.cases import run_each
from meprop.bench.cuda import Card, CardRecord, Limits, mode_of
from meprop.bench.events import Call
from meprop.bench.linear import BYTES, Case
from meprop.bench.measure import Ratio, Times, milliseconds
from meprop.bench.problem import DTYPES, Dtype, Problem
from meprop.bench.record import Record
from meprop.bench.roofline import Roofline, Work
from meprop.disturbance import DisturbanceMeter
from meprop.reporting import pages
from meprop.selection import Selection

_SEED = 0
_DENSE: dict[Dtype, str] = {"bf16": "dense_bf16", "fp32": "dense_tf32"}
_ROW_ROUNDING = 2.0**-6  # of a scaled row in bfloat16, to its norm

Sides: TypeAlias = Mapping[str, Sequence[Call]]
"""By name, calls on copies of the operands."""


def default_cases() -> list[Case]:
    """Return shapes of large layers, of the paper's table 7 and of a transformer's: by columns, rows and entries."""
    names = (
        "batch-bf16-8192x8192x8192-k328",
        *(f"batch-bf16-1024x8192x8192-k{k}" for k in (8, 64, 512)),
        "batch-bf16-4096x4096x4096-k164",
        "batch-bf16-8192x1024x4096-k164",
        "batch-bf16-8192x4096x1024-k41",
        "batch-fp32-8192x8192x8192-k328",
        "rows-bf16-8192x4096x4096-k2731",
        "rows-bf16-8192x8192x8192-k2731",
        "rows-bf16-4096x1024x4096-k1365",
        "example-bf16-1024x8192x8192-k328",
        "topk-bf16-8192x8192-k328",
    )
    found = [Case.parse(name) for name in names]
    return [case for case in found if case is not None]


@dataclass(frozen=True)
class CaseResult(cases.CaseResult[Case]):
    """What was found for one case.

    The sides are "dense_bf16", "dense_tf32", "sparse", and of "batch", whose "sparse" has a row-sparse weight gradient,
    also "sparse_dense_form". Of "topk" they are "torch" (`torch.topk(g.abs(), k)`) and "sparse". The names of `times`
    are "SIDE eager" and "SIDE graph".

    Attributes:
        ratios: By name: "dense" (the baseline of the case's own dtype against "sparse"), "other_dtype" (that of the
            other one) and "dense_form" (the first against "sparse_dense_form"), of graphs if both sides have one, else
            eager; "eager" is the first of eager times.
        uncaptured: Why a side has no graph, by its name.
        copies: Of the operands, which each side takes in turns.
        roofline: The floor under "sparse".
        share: Of the bound that "sparse" reaches: floor / 20th percentile.
    """

    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    uncaptured: dict[str, str] = field(default_factory=dict[str, str])
    copies: int = 1
    roofline: Roofline | None = None
    share: float | None = None

    def shown(self, side: str) -> Times:
        """Return the time of a side's graph, or the eager one if there is none."""
        return self.times[f"{side} {mode_of(self.times, side)}"]


@dataclass(frozen=True)
class LinearOnCard(CardRecord):
    """The content of result.json."""

    limits: Limits
    cases: list[CaseResult]

    @property
    def results(self) -> list[CaseResult]:
        """Return those of the cases."""
        return self.cases


# ---------------------------------------------------------------- one case


def run_case(case: Case, seconds: float, limits: Limits, card: Card) -> CaseResult:
    """Check one case, then time it. One that raises an error is wrong, so that the others keep their results."""
    try:
        return _run(case, seconds, limits, card)
    except Exception as error:
        return CaseResult(case.name, case, f"{type(error).__name__}: {error}")
    finally:
        card.release()


def _run(case: Case, seconds: float, limits: Limits, card: Card) -> CaseResult:
    work = work_of(case)
    copies = card.copies(work.memory_bytes)
    sides = (_topk_sides if case.kind == "topk" else _backward_sides)(case, copies, card)
    if isinstance(sides, str):
        return CaseResult(case.name, case, sides)
    times, uncaptured = card.time_both(sides, seconds)
    bound = cuda.roofline(work, case.dtype, limits, card)
    share = bound.floor / times[f"sparse {mode_of(times, 'sparse')}"].p20
    return CaseResult(case.name, case, None, times, _ratios(case, times), uncaptured, copies, bound, share)


def _ratios(case: Case, times: Mapping[str, Times]) -> dict[str, Ratio]:
    def ratio(base: str, side: str) -> Ratio:
        mode = mode_of(times, base, side)
        return Ratio.of(times[f"{base} {mode}"], times[f"{side} {mode}"])

    own = baseline(case)
    found = {"dense": ratio(own, "sparse"), "eager": Ratio.of(times[f"{own} eager"], times["sparse eager"])}
    if case.kind != "topk":
        other = _DENSE["fp32" if case.dtype == "bf16" else "bf16"]
        found["other_dtype"] = ratio(other, "sparse")
    if case.kind == "batch":
        found["dense_form"] = ratio(own, "sparse_dense_form")
    return found


def baseline(case: Case) -> str:
    """Return the name of the side that the first ratio is of."""
    return "torch" if case.kind == "topk" else _DENSE[case.dtype]


def _topk_sides(case: Case, copies: int, card: Card) -> Sides | str:
    """The sides, or what is wrong."""
    grads = [problem.normal(seed, case.dtype, case.rows, case.outputs, device=card.device) for seed in range(copies)]
    rule, k = case.rule, case.k
    wrong = oracle.selection_differs(rule, grads[0], oracle.select(rule, grads[0]))
    if wrong is not None:
        return wrong
    return {
        "torch": [lambda grad=grad: torch.topk(grad.abs(), k) for grad in grads],
        "sparse": [lambda grad=grad: rule.select(grad) for grad in grads],
    }


def _backward_sides(case: Case, copies: int, card: Card) -> Sides | str:
    """The sides, or what is wrong."""
    problems: dict[Dtype, list[Problem]] = {
        dtype: [Problem.random(dtype, case.rows, case.inputs, case.outputs, card.device) for _ in range(copies)]
        for dtype in DTYPES
    }
    own, rule = problems[case.dtype], case.rule
    sides = {"sparse": [problem.sparse(each, rule, sparse_grad=case.kind == "batch") for each in own]}
    if case.kind == "batch":
        sides["sparse_dense_form"] = [problem.sparse(each, rule, sparse_grad=False) for each in own]
    wrong = _differ({name: calls[0] for name, calls in sides.items()}, case, own[0], card)
    if wrong is not None:
        return wrong
    return {**sides, **{_DENSE[dtype]: [problem.dense(each) for each in found] for dtype, found in problems.items()}}


# ---------------------------------------------------------------- is it right?


def _differ(sides: Mapping[str, problem.Backward], case: Case, own: Problem, card: Card) -> str | None:
    grad, rule = own.grad_output, case.rule
    with problem.forked_random(card.device):
        if case.kind == "rows":
            torch.manual_seed(_SEED)
            expected = rule.select(grad)
            wrong = rows_differ(expected, grad, case.k)
        else:
            expected = oracle.select(rule, grad)
            wrong = oracle.selection_differs(rule, grad, expected)
        for name, side in sides.items():
            torch.manual_seed(_SEED)
            gradients: oracle.Gradients = dict(zip(("input", "weight", "bias"), side(), strict=True))
            found = oracle.gradients_differ(gradients, expected, grad, own.x, own.weight, on_card=True)
            wrong = wrong or (found and f"{name}: {found}")
    return wrong


def rows_differ(selection: Selection, grad_NO: Tensor, k: int) -> str | None:
    """Return in words why a selection is not one of k whole rows, each as it is or scaled up; None if it is."""
    kept_NO = selection.to_dense().double()
    rows = kept_NO.ne(0).any(dim=1).nonzero()[:, 0]
    if len(rows) != k:
        return f"the selection has {len(rows)} rows, not {k}"
    kept, whole = kept_NO[rows], grad_NO[rows].double()
    scale = (kept * whole).sum(dim=1) / whole.square().sum(dim=1)
    if not bool((scale >= 1 - _ROW_ROUNDING).all()):
        return "the selection has a row that is scaled down"
    off = (kept - scale[:, None] * whole).norm(dim=1)
    return None if bool((off <= _ROW_ROUNDING * kept.norm(dim=1)).all()) else "the selection has a row of other entries"


# ---------------------------------------------------------------- what it cannot avoid


def work_of(case: Case) -> Work:
    """Count the kept products' multiply-adds, and the bytes of each operand that is needed and each result, once.

    Nothing is counted for a cache.
    """
    size, n, i, o, k = BYTES[case.dtype], case.rows, case.inputs, case.outputs, case.k
    if case.kind == "topk":
        return Work(0, 0, n * (o * size + k * (size + 4)))  # indices are int32
    gradients = n * o + o  # the output's, all of which is read, and the bias's
    if case.kind == "rows":
        return Work(2 * k * i * o, 0, size * (gradients + k * i + n * i + 2 * o * i))
    weight_rows = k if case.kind == "batch" else o
    return Work(2 * n * k * i, 0, size * (gradients + 2 * n * i + 2 * weight_rows * i))


# ---------------------------------------------------------------- the command


def _ratio(name: str) -> Callable[[CaseResult], str]:
    return lambda result: f"{result.ratios[name].p20:.2f}x" if name in result.ratios else ""


def _first_ratio(result: CaseResult) -> str:
    mode = mode_of(result.times, baseline(result.case), "sparse")
    return _ratio("dense")(result) + ("" if mode == "graph" else " (eager)")


_COLUMNS: dict[str, Callable[[CaseResult], str]] = {
    "case": lambda result: result.name,
    "kept": lambda result: f"{result.case.density:.1%}",
    "dense, ms": lambda result: milliseconds(result.shown(baseline(result.case))),
    "sparse, ms": lambda result: milliseconds(result.shown("sparse")),
    "ratio": lambda result: "WRONG" if result.wrong is not None else _first_ratio(result),
    "of medians": lambda result: f"{result.ratios['dense'].p50:.2f}x",
    "other dtype's dense": _ratio("other_dtype"),
    "dense dW": _ratio("dense_form"),
    "dense eager, ms": lambda result: milliseconds(result.times[f"{baseline(result.case)} eager"]),
    "sparse eager, ms": lambda result: milliseconds(result.times["sparse eager"]),
    "ratio eager": _ratio("eager"),
    "bound": lambda result: result.roofline.bound if result.roofline else "",
    "reached": lambda result: f"{result.share:.0%}" if result.share is not None else "",
}
_SHOWN_IF_WRONG = ("case", "kept", "ratio")


@dataclass(frozen=True)
class CudaLinear(cases.CasesBench[Case, CaseResult]):
    """Time the backward pass of a linear layer on a CUDA device, sparse against dense."""

    name = "linear-cuda"
    head = tuple(_COLUMNS)
    legend = (
        "Times in ms: 20th percentile / median, of CUDA graphs where the side can be captured, else as they are "
        "launched. 'Eager': as they are launched. Ratios: dense / sparse of the 20th percentiles, above 1 sparse is "
        "faster. Dense: F.linear's backward pass in the row's own dtype, bf16 or TF32; of topk, torch.topk(g.abs(), "
        "k). Unified passes (batch) give a row-sparse weight gradient; 'dense dW': the same with a dense one. "
        "'Reached': the share of its bound, a counted floor over limits measured in the same run. Operands come from "
        "memory, not from L2."
    )
    default_cases = staticmethod(default_cases)

    def prepare(self) -> cases.Measure[CaseResult, Record]:
        """Find the card, and choose the cases.

        Raises:
            MepropError: There is no card.
        """
        cuda.Card.find()
        return super().prepare()

    def run(self, cases: Sequence[Case], config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> Record:
        """Measure the card's limits, then run the cases."""
        meter, card = DisturbanceMeter(), cuda.Card.find()
        with card.session():
            limits = cuda.measure_limits(card)
            results = run_each(cases, lambda case: run_case(case, self.seconds, limits, card), after)
        return LinearOnCard.of(f"bench-{self.name}", dict(config), meter, card.facts, limits, results)

    def ratio(self, result: CaseResult) -> Ratio:
        """Return that to dense in the case's own dtype."""
        return result.ratios["dense"]

    def cells(self, result: CaseResult) -> list[str]:
        """Return all columns; of a wrong case, those that it has."""
        shown = _COLUMNS if result.wrong is None else _SHOWN_IF_WRONG
        return [cell(result) if column in shown else "" for column, cell in _COLUMNS.items()]

    def about(self, record: Record) -> str:
        """Return the circumstances, and the card's limits."""
        assert isinstance(record, LinearOnCard)
        return f"{record.circumstances} Limits reached: {record.limits}."

    def table(self, results: Sequence[CaseResult]) -> str:
        """Return a line per result, and below them why some are wrong, and some have no graph."""
        return "\n".join([super().table(results), *_reasons(results)])

    def blocks(self, results: Sequence[CaseResult]) -> list[str]:
        """Return the table, and why some sides have no graph."""
        reasons = "\n".join(f"- {line}" for line in _reasons(results))
        return [pages.markdown_table([self.head, *map(self.cells, results)]), *([reasons] if reasons else [])]


def _reasons(results: Sequence[CaseResult]) -> list[str]:
    return cuda.without_graph(
        (f"{result.name} ({side})", reason) for result in results for side, reason in result.uncaptured.items()
    )

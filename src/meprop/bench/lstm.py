"""One layer of an LSTM, sparse against torch's own: forward pass and backward pass, on random normal data.

A case is checked first: its output against torch's, its gradients against the oracle in float64. One that is wrong is
not timed. Timed apart are the forward pass with gradients to come, and autograd's backward pass alone, for gradients of
input, weights and biases, selection and autograd's own cost included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import meprop
from meprop import functional
from meprop.bench import record
from meprop.bench.measure import DisturbanceMeter, Ratio, Times, interleaved
from meprop.bench.record import Record
from meprop.ops import reference
from meprop.rules import Scope

_NAME = re.compile(r"(example|batch)-(\d+)x(\d+)x(\d+)x(\d+)-k(\d+)")
# Of a gradient's norm. What is next to the k-th largest may be chosen in float32 and not in float64, or the other way.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """One row of the table, in float32.

    Attributes:
        scope: The choice is made for each "example" of a time step, or for its whole "batch".
        steps: T.
        batch: B.
        inputs: I.
        units: H.
        k: How many entries of each gate are kept.

    Raises:
        ValueError: A size is out of range.
    """

    scope: Scope
    steps: int
    batch: int
    inputs: int
    units: int
    k: int

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.inputs, self.units) < 1 or not 1 <= self.k <= self.units:
            raise ValueError(f"case {self.name}: sizes must be at least 1, and k at most {self.units}")

    @classmethod
    def parse(cls, name: str) -> Case | None:
        """Return the case of this name, such as example-25x32x190x500-k20; None if it is no such name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        scope, *sizes = match.groups()
        return cls(scope, *map(int, sizes))  # pyright: ignore[reportArgumentType]

    @property
    def name(self) -> str:
        """Scope, T x B x I x H and k, as `parse` takes them."""
        return f"{self.scope}-{self.shape.replace(' ', '')}-k{self.k}"

    @property
    def shape(self) -> str:
        """T x B x I x H."""
        return " x ".join(str(size) for size in (self.steps, self.batch, self.inputs, self.units))

    @property
    def rule(self) -> meprop.TopK:
        """What selects."""
        return meprop.TopK(self.k, scope=self.scope)


def default_cases() -> list[Case]:
    """Return the paper's tagger at several batch sizes and k, a layer on top of another, and a larger one."""
    cases = [Case("example", 25, batch, 190, 500, k) for batch, k in product((32, 1, 8, 128), (20, 5))]
    cases += [Case("batch", 25, 32, 190, 500, k) for k in (20, 5)]
    return [*cases, Case("example", 25, 32, 500, 500, 20), Case("example", 50, 64, 512, 1024, 41)]


def choose_cases(patterns: Sequence[str]) -> list[Case]:
    """Return the default cases that match a pattern, and others that are named: see `record.choose`."""
    grid = default_cases()
    return record.choose(patterns, grid, Case.parse, grid[0].name)


@dataclass(frozen=True)
class CaseResult:
    """What was found for one case.

    Attributes:
        name: The case's.
        case: The case.
        wrong: How it differs from torch or from the oracle; None if it does not. A wrong case has nothing but this.
        times: Of "forward dense", "forward sparse", "backward dense" and "backward sparse".
        forward: Dense / sparse; None if wrong.
        backward: The same of the backward pass.
    """

    name: str
    case: Case
    wrong: str | None = None
    times: dict[str, Times] = field(default_factory=dict[str, Times])
    forward: Ratio | None = None
    backward: Ratio | None = None


@dataclass(frozen=True)
class LstmBench(Record):
    """The content of result.json."""

    cases: list[CaseResult]

    @property
    def wrong(self) -> list[str]:
        """Return the names of the cases that are wrong."""
        return [case.name for case in self.cases if case.wrong is not None]


def run(
    cases: Sequence[Case],
    seconds: float,
    config: dict[str, Any],
    after: Callable[[CaseResult], None] = lambda result: None,
) -> LstmBench:
    """Check and time the cases.

    Args:
        cases: What to time.
        seconds: To spend on the timing of each pass of a case; slow ones take longer, for 9 rounds.
        config: Kept in the record.
        after: Called with each result.
    """
    meter = DisturbanceMeter()
    results: list[CaseResult] = []
    for case in cases:
        results.append(run_case(case, seconds))
        after(results[-1])
    return LstmBench.of("bench-lstm", config, meter, results)


def run_case(case: Case, seconds: float) -> CaseResult:
    """Check and time one case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.LSTM(case.inputs, case.units)
        x = torch.randn(case.steps, case.batch, case.inputs, requires_grad=True)
        grad = torch.randn(case.steps, case.batch, case.units)
    leaves = [x, *layer.parameters()]

    def dense() -> Tensor:
        return layer(x)[0]

    def sparse() -> Tensor:
        return functional.lstm(x, None, *layer.parameters(), rule=case.rule)[0]

    outputs = {"dense": dense(), "sparse": sparse()}

    def backward(side: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[side], leaves, grad, retain_graph=True)

    wrong = _differs(case, outputs, backward("sparse"), [tensor.detach() for tensor in leaves], grad)
    if wrong is not None:
        return CaseResult(case.name, case, wrong)
    forward = interleaved({"dense": dense, "sparse": sparse}, seconds)
    back = interleaved({side: lambda side=side: backward(side) for side in outputs}, seconds)
    times = {
        f"{name} {side}": spent[side] for name, spent in (("forward", forward), ("backward", back)) for side in spent
    }
    ratios = (Ratio.of(spent["dense"], spent["sparse"]) for spent in (forward, back))
    return CaseResult(case.name, case, None, times, *ratios)


def _differs(
    case: Case, outputs: dict[str, Tensor], gradients: Sequence[Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> str | None:
    if not torch.allclose(outputs["sparse"], outputs["dense"], rtol=1e-4, atol=1e-5):
        return "its output differs from torch's"
    x, weight_ih, weight_hh, bias_ih, bias_hh = (tensor.double() for tensor in leaves)
    rows, sizes = x.flatten(0, 1), torch.full((case.steps,), case.batch)
    trace = reference.lstm_forward(rows, weight_ih, weight_hh, bias_ih + bias_hh, (None, None), sizes, False)
    of_output = (grad.double().flatten(0, 1), None, None)
    needs = (True, True, True, True, False, False)
    expected = reference.lstm_backward(
        trace[:3], rows, weight_ih, weight_hh, sizes, False, of_output, None, case.rule.select, needs
    )
    names = ("input", "weight_ih", "weight_hh", "bias")
    for name, actual, exact in zip(names, gradients, expected, strict=False):
        assert exact is not None
        if not (actual.double().view_as(exact) - exact).norm() <= _TOLERANCE * exact.norm():
            return f"the gradient of {name} differs from the oracle's"
    return None

"""One layer of an LSTM, sparse against torch's own: forward pass and backward pass, on random normal data.

A case is checked first: its output against torch's, its gradients against the oracle in float64. One that is wrong is
not timed. Timed apart are the forward pass with gradients to come, and autograd's backward pass alone, for gradients of
input, weights and biases, selection and autograd's own cost included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import meprop
from meprop import functional
from meprop.bench import cases
from meprop.bench.cases import CasesRecord
from meprop.bench.measure import Ratio, interleaved
from meprop.bench.problem import DTYPES, Dtype
from meprop.bench.record import Record
from meprop.ops import reference
from meprop.rules import Scope

# Of a gradient's norm. What is next to the k-th largest may be chosen in float32 and not in float64, or the other way.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Case(cases.Case):
    """One row of the table. Its tensors are float32.

    Attributes:
        scope: The choice is made for each "example" of a time step, or for its whole "batch".
        weights: The dtype of the weights in all products of the sparse layer, see `compute_dtype` of `functional.lstm`.
        steps: T.
        batch: B.
        inputs: I.
        units: H.
        k: How many entries of each gate are kept.

    Raises:
        ValueError: A size is out of range.
    """

    pattern = re.compile(r"(example|batch)-(fp32|bf16)-(\d+)x(\d+)x(\d+)x(\d+)-k(\d+)")

    scope: Scope
    weights: Dtype
    steps: int
    batch: int
    inputs: int
    units: int
    k: int

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.inputs, self.units) < 1 or not 1 <= self.k <= self.units:
            raise ValueError(f"case {self.name}: sizes must be at least 1, and k at most {self.units}")

    @classmethod
    def from_groups(cls, groups: Sequence[Any]) -> Case:
        """Return the case of a name such as example-fp32-25x32x190x500-k20."""
        scope, weights, *sizes = groups
        return cls(scope, weights, *map(int, sizes))

    @property
    def name(self) -> str:
        """Scope, dtype of the weights, T x B x I x H and k, as `parse` takes them."""
        return f"{self.scope}-{self.weights}-{self.shape.replace(' ', '')}-k{self.k}"

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
    found: list[Case] = []
    for dtype in DTYPES:
        found += [Case("example", dtype, 25, batch, 190, 500, k) for batch, k in product((32, 1, 8, 128), (20, 5))]
        found += [Case("batch", dtype, 25, 32, 190, 500, k) for k in (20, 5)]
        found += [Case("example", dtype, 25, 32, 500, 500, 20), Case("example", dtype, 50, 64, 512, 1024, 41)]
    return found


@dataclass(frozen=True)
class CaseResult(cases.CaseResult[Case]):
    """What was found for one case: `times` of "forward dense", "forward sparse" and the same of "backward".

    Attributes:
        forward: Dense / sparse; None if wrong.
        backward: The same of the backward pass.
    """

    forward: Ratio | None = None
    backward: Ratio | None = None


def run_case(case: Case, seconds: float) -> CaseResult:
    """Check one case, and time each of its passes for so many seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.LSTM(case.inputs, case.units)
        with torch.no_grad():  # weights that bfloat16 has as they are: the same check holds for both dtypes
            for weight in layer.all_weights[0][:2]:
                weight.copy_(weight.bfloat16())
        x = torch.randn(case.steps, case.batch, case.inputs, requires_grad=True)
        grad = torch.randn(case.steps, case.batch, case.units)
    leaves = [x, *layer.parameters()]
    compute_dtype = torch.bfloat16 if case.weights == "bf16" else None

    def dense() -> Tensor:
        return layer(x)[0]

    def sparse() -> Tensor:
        return functional.lstm(x, None, *layer.parameters(), rule=case.rule, compute_dtype=compute_dtype)[0]

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
        trace[:3],
        rows,
        weight_ih,
        weight_hh,
        sizes,
        False,
        of_output,
        None,
        meprop.InBlocks(case.rule, 4).select,
        needs,
    )
    names = ("input", "weight_ih", "weight_hh", "bias")
    for name, actual, exact in zip(names, gradients, expected, strict=False):
        assert exact is not None
        if not (actual.double().view_as(exact) - exact).norm() <= _TOLERANCE * exact.norm():
            return f"the gradient of {name} differs from the oracle's"
    return None


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Lstm(cases.CasesBench[Case, CaseResult]):
    """Time a layer of an LSTM, sparse against torch's own: forward pass and backward pass, over sizes and k."""

    name = "lstm"
    head = (
        "choice", "weights", "T x B x I x H", "k of each gate",
        *(f"{name}, {side}" for name in ("forward", "backward") for side in ("torch", "sparse", "ratio")),
    )  # fmt: skip
    legend = (
        "Tensors are float32. In rows with weights of bf16 the sparse layer has compute_dtype=torch.bfloat16; torch's "
        "LSTM has float32 there too. Times in ms: 20th percentile / median / 80th percentile. Ratios: torch's LSTM / "
        "sparse of the 20th percentiles (of the medians), above 1 sparse is faster. The backward pass includes the "
        "selection and autograd."
    )
    default_cases = staticmethod(default_cases)

    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, such as '*-k5', or names of others in any size, such as
    example-fp32-25x32x190x500-k20."""
    seconds: float = 3.0
    """Seconds to spend on the timing of each pass of a case. A slow pass takes longer, for 9 rounds."""

    def run(self, cases: Sequence[Case], config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> Record:
        """Check and time the cases."""
        return CasesRecord.run(self.name, cases, lambda case: run_case(case, self.seconds), config, after)

    def ratio(self, result: CaseResult) -> Ratio:
        """Return that of the backward pass."""
        assert result.backward is not None
        return result.backward

    def cells(self, result: CaseResult) -> list[str]:
        """Return the case, and times and ratio of both passes."""
        case = result.case
        cells = [case.scope, case.weights, case.shape, str(case.k)]
        for name, ratio in (("forward", result.forward), ("backward", result.backward)):
            if ratio is None:
                cells += ["", "", "WRONG"]
            else:
                cells += [result.times[f"{name} {side}"].milliseconds for side in ("dense", "sparse")]
                cells.append(str(ratio))
        return cells

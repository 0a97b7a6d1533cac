"""The backward pass of one convolution, sparse against torch's own in float32 and in bfloat16, on random normal data.

A case is checked first: its output against torch's, its gradients against a dense convolution in float64 whose output
gradient is zero where the oracle leaves it out. One that is wrong is not timed. Timed is autograd's backward pass
alone, for the gradients of input, weight and bias, selection and autograd's own cost included; the graph is made once,
outside the timing, and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import meprop
from meprop import functional
from meprop.bench import cases, oracle
from meprop.bench.cases import CasesRecord
from meprop.bench.measure import Ratio, interleaved
from meprop.bench.record import Record
from meprop.rules import Scope

_DENSE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d}
_SPARSE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d}
_TOLERANCE = 1e-4  # of a gradient's norm, in float32


@dataclass(frozen=True)
class Case(cases.Case):
    """One row of the table: float32, stride 1, and a padding that keeps the size.

    Attributes:
        scope: The choice is made at each position ("example"), for pointwise convolutions, for the whole "batch", or
            among the maps of examples and channels ("global"), for larger kernels.
        dims: Spatial dimensions, 1 or 2.
        examples: N.
        inputs: I.
        outputs: O.
        size: Of the input in each dimension.
        kernel: The same of the kernel, odd.
        k: How many of the O channels are kept, on average with "global".
        channels_last: The memory format, of two dimensions.

    Raises:
        ValueError: A size is out of range.
    """

    pattern = re.compile(r"(example|batch|global)-conv([12])d-(\d+)x(\d+)x(\d+)-size(\d+)-kernel(\d+)-k(\d+)(-last)?")

    scope: Scope
    dims: int
    examples: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    k: int
    channels_last: bool = False

    def __post_init__(self) -> None:
        if min(self.examples, self.inputs, self.size) < 1 or not 1 <= self.k <= self.outputs or self.kernel % 2 == 0:
            raise ValueError(
                f"case {self.name}: sizes must be at least 1, the kernel odd, and k at most {self.outputs}"
            )
        if self.scope == ("example" if self.kernel > 1 else "global") or (self.channels_last and self.dims == 1):
            raise ValueError(
                f"case {self.name}: example is for kernel 1, global for larger ones, channels last for conv2d"
            )

    @classmethod
    def from_groups(cls, groups: Sequence[Any]) -> Case:
        """Return the case of a name such as batch-conv2d-32x128x256-size28-kernel3-k26."""
        scope, *sizes, last = groups
        return cls(scope, *map(int, sizes), channels_last=last is not None)

    @property
    def name(self) -> str:
        """Scope, dimensions, N x I x O, sizes, k and memory format, as `parse` takes them."""
        sizes = f"{self.examples}x{self.inputs}x{self.outputs}-size{self.size}-kernel{self.kernel}-k{self.k}"
        return f"{self.scope}-conv{self.dims}d-{sizes}" + ("-last" if self.channels_last else "")

    @property
    def shape(self) -> str:
        """N x I x O, size and kernel."""
        size, kernel = (" x ".join([str(each)] * self.dims) for each in (self.size, self.kernel))
        return f"{self.examples} x {self.inputs} x {self.outputs}, {size}, kernel {kernel}"

    @property
    def rule(self) -> meprop.TopK:
        """What selects."""
        return meprop.TopK(self.k, scope=self.scope)


def default_cases() -> list[Case]:
    """Return layers as ResNets have them at 10%, in both memory formats, a pointwise one, and one of one dimension.

    One for the whole gradient is as small networks for digits have it, at 5%.
    """
    found: list[Case] = []
    for last in (False, True):
        found += [
            Case("batch", 2, 32, 128, 256, 28, 3, 26, last),
            Case("batch", 2, 16, 64, 64, 56, 3, 6, last),
            Case("global", 2, 32, 128, 256, 28, 3, 26, last),
            Case("global", 2, 100, 32, 64, 14, 5, 3, last),
            *(Case(scope, 2, 32, 256, 512, 14, 1, 51, last) for scope in ("batch", "example")),
        ]
    return [*found, Case("batch", 1, 32, 256, 256, 256, 5, 26)]


@dataclass(frozen=True)
class CaseResult(cases.CaseResult[Case]):
    """What was found for one case: `times` of "dense_fp32", "dense_bf16" and "sparse".

    Attributes:
        ratios: Dense / sparse, of "dense_fp32" and "dense_bf16".
    """

    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])


def run_case(case: Case, seconds: float) -> CaseResult:
    """Check and time one case."""
    leaves, grad = _tensors(case)
    dense, sparse = _output(case, _DENSE, leaves), _output(case, _SPARSE, leaves, rule=case.rule)
    sides = {"sparse": _backward(sparse, leaves, grad), "dense_fp32": _backward(dense, leaves, grad)}
    wrong = None if torch.equal(sparse, dense) else "its output differs from torch's"
    wrong = wrong or _differs(case, sides["sparse"], leaves, grad)
    if wrong is not None:
        return CaseResult(case.name, case, wrong)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in leaves]
    sides["dense_bf16"] = _backward(_output(case, _DENSE, narrow), narrow, grad.bfloat16())
    times = interleaved(sides, seconds)
    ratios = {side: Ratio.of(times[side], times["sparse"]) for side in ("dense_fp32", "dense_bf16")}
    return CaseResult(case.name, case, times=times, ratios=ratios)


def _tensors(case: Case) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias, which need gradients, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes, kernel = (case.size,) * case.dims, (case.kernel,) * case.dims
    shapes = [(case.examples, case.inputs, *sizes), (case.outputs, case.inputs, *kernel), (case.outputs,)]
    *leaves, grad = (
        torch.randn(each, generator=generator) for each in [*shapes, (case.examples, case.outputs, *sizes)]
    )
    if case.channels_last:
        leaves[0], leaves[1], grad = (
            tensor.contiguous(memory_format=torch.channels_last) for tensor in (*leaves[:2], grad)
        )
    return [leaf.requires_grad_() for leaf in leaves], grad


def _output(
    case: Case, functions: dict[int, Callable[..., Tensor]], leaves: Sequence[Tensor], **options: Any
) -> Tensor:
    return functions[case.dims](*leaves, padding=case.kernel // 2, **options)


def _backward(output: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], oracle.Gradients]:
    def run() -> oracle.Gradients:
        gradients = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        return dict(zip(("input", "weight", "bias"), gradients, strict=True))

    return run


def _differs(case: Case, sparse: Callable[[], oracle.Gradients], leaves: Sequence[Tensor], grad: Tensor) -> str | None:
    rows_NO = grad.movedim(1, -1).flatten(0, -2)
    if case.scope == "global":
        norms = torch.linalg.vector_norm(grad.double(), dim=[*range(2, grad.dim())]).float()
        _, places = oracle.reference.topk_rows(norms.view(1, -1), case.k * case.examples)
        kept = torch.zeros_like(grad).flatten(0, 1)
        kept[places[0].long()] = grad.flatten(0, 1)[places[0].long()]
        kept = kept.view(grad.shape)
    else:
        kept = oracle.select(case.rule, rows_NO).to_dense().view_as(grad.movedim(1, -1)).movedim(-1, 1)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = _backward(_output(case, _DENSE, exact), exact, kept.double())()
    expected = {**expected, "bias": rows_NO.double().sum(dim=0)}
    gradients = sparse()
    for name, gradient in gradients.items():
        if not (gradient - expected[name]).norm() <= _TOLERANCE * expected[name].norm():
            return f"the gradient of the {name} differs from the oracle's"
    return oracle.varies(sparse, gradients)


# ---------------------------------------------------------------- the command

_SIDES = ("dense_fp32", "dense_bf16")


@dataclass(frozen=True)
class Conv(cases.CasesBench[Case, CaseResult]):
    """Time the backward pass of a convolution, sparse against torch's own in float32 and bfloat16."""

    name = "conv"
    head = ("choice", "N x I x O", "memory", "kept", "sparse", "fp32", "ratio", "bf16", "ratio")
    legend = (
        "Sparse is float32; times in ms: 20th percentile / median / 80th percentile. Ratios: torch's convolution / "
        "sparse of the 20th percentiles (of the medians), above 1 sparse is faster. The selection and autograd are "
        "included."
    )
    default_cases = staticmethod(default_cases)

    cases: tuple[str, ...] = ("*",)
    """Patterns of the default cases, such as '*-last', or names of others in any size, such as
    batch-conv2d-32x128x256-size28-kernel3-k26."""

    def run(self, cases: Sequence[Case], config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> Record:
        """Check and time the cases."""
        return CasesRecord.run(self.name, cases, lambda case: run_case(case, self.seconds), config, after)

    def ratio(self, result: CaseResult) -> Ratio:
        """Return that to float32."""
        return result.ratios["dense_fp32"]

    def cells(self, result: CaseResult) -> list[str]:
        """Return the case, its times and ratios."""
        case = result.case
        memory = "channels last" if case.channels_last else "contiguous"
        cells = [case.scope, case.shape, memory, f"{case.k} ({case.k / case.outputs:.0%})"]
        if result.wrong is not None:
            return [*cells, "WRONG", *[""] * (2 * len(_SIDES))]
        cells.append(result.times["sparse"].milliseconds)
        for side in _SIDES:
            cells += [result.times[side].milliseconds, str(result.ratios[side])]
        return cells

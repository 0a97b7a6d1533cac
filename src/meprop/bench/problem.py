"""One linear layer's backward pass on random data: torch's, ours, and that of a converted layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import meprop
from meprop import functional
from meprop.bench import oracle
from meprop.errors import NoEffectWarning
from meprop.rules import Rule
from meprop.selection import Selection

Device = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """A linear layer's tensors: x [N, I], weight [O, I] and bias [O], which need gradients, and grad_output [N, O]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, dtype: Dtype, rows: int, inputs: int, outputs: int, device: Device = "cpu") -> Problem:
        """Return one of random normal numbers, the same on every run, but other ones on another kind of device."""
        sizes = ((rows, inputs), (outputs, inputs), (outputs,))
        x, weight, bias = (
            normal(seed, dtype, *size, device=device).requires_grad_() for seed, size in enumerate(sizes, start=1)
        )
        return cls(x, weight, bias, normal(0, dtype, rows, outputs, device=device))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What needs gradients."""
        return self.x, self.weight, self.bias


Backward = Callable[[], tuple[Tensor, ...]]


def _backward(forward: Callable[[Tensor], Tensor], problem: Problem, leaves: tuple[Tensor, ...]) -> Backward:
    """The backward pass of a graph that is made now."""
    y = forward(problem.x)
    return lambda: torch.autograd.grad(y, leaves, problem.grad_output, retain_graph=True)


def dense(problem: Problem) -> Backward:
    """The backward pass of torch's own layer."""
    return _backward(lambda x: F.linear(x, problem.weight, problem.bias), problem, problem.leaves)


def sparse(problem: Problem, rule: Rule, *, sparse_grad: bool) -> Backward:
    """The backward pass of ours."""

    def forward(x: Tensor) -> Tensor:
        return functional.linear(x, problem.weight, problem.bias, rule=rule, sparse_grad=sparse_grad)

    return _backward(forward, problem, problem.leaves)


def converted(problem: Problem, rule: Rule) -> tuple[Backward, str]:
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


def differs(name: str, side: Backward, selection: Selection, problem: Problem) -> str | None:
    """What is wrong with a backward pass, after its name, if its selection is to be this; None if nothing is."""

    def named() -> oracle.Gradients:
        return dict(zip(("input", "weight", "bias"), side(), strict=True))

    gradients = named()
    found = oracle.gradients_differ(gradients, selection, problem.grad_output, problem.x, problem.weight)
    found = found or oracle.varies(named, gradients)
    return found and f"{name}: {found}"


def rule_of_rows(share: float) -> Rule:
    """Return the rule that draws this share of the whole rows."""
    return meprop.Sampled(share, scope="rows")


def forked_random(device: Device) -> AbstractContextManager[None]:
    """Leave torch's random numbers of the CPU, and of a device, as they were before."""
    return torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else [])


def normal(seed: int, dtype: Dtype, *size: int, device: Device = "cpu") -> Tensor:
    """Random normal numbers, the same for the same seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])

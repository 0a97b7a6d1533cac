"""One training step of a model, and of its literal twin: a plain model whose layers choose by dense arithmetic.

The twin's forward pass is torch's own. Behind the product of a layer stands an identity, which replaces the output
gradient by what is kept of it. The bias is added after that, and gets its full gradient. Hooks are not used.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import literal
import meprop
from meprop.selection import Scope

SCOPES: tuple[Scope, ...] = ("example", "batch", "global")
"""The scopes of top-k."""


@dataclass(frozen=True)
class Everything(meprop.Rule):
    """Keeps everything, but does not say so. The sparse path then has to give torch's gradients."""

    scope: Scope
    passes: list[int] = field(default_factory=list, compare=False, repr=False)

    def select(self, grad_output_NO: Tensor) -> meprop.RowSelection | meprop.ColumnSelection:
        self.passes.append(len(grad_output_NO))
        width = grad_output_NO.shape[1]
        columns = torch.arange(width, dtype=torch.int32)
        if self.scope == "batch":
            return meprop.ColumnSelection(grad_output_NO, columns, width)
        return meprop.RowSelection(grad_output_NO, columns.expand(grad_output_NO.shape), width)


@dataclass(frozen=True)
class Largest:
    """The literal top-k. It stands for a rule in `literal`, and shares no code with one."""

    scope: Scope
    share: float

    def select(self, grad_NO: Tensor) -> SimpleNamespace:
        rows, width = grad_NO.shape
        k, sizes_NO = max(1, round(self.share * width)), grad_NO.abs()
        if self.scope == "example":
            kept_NO = _largest(sizes_NO, k)
        elif self.scope == "batch":
            kept_NO = _largest(sizes_NO.sum(dim=0), k).expand_as(grad_NO)
        else:
            kept_NO = _largest(sizes_NO.flatten(), k * rows).view_as(grad_NO)
        return SimpleNamespace(to_dense=lambda: grad_NO * kept_NO)


def _largest(sizes: Tensor, k: int) -> Tensor:
    first = sizes.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, first, True)


def _attention(layer: nn.MultiheadAttention, rule: Largest, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Torch's attention, whose products with its weights are literal ones, in blocks of E features."""
    plain = F.linear

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with patch.object(F, "linear", plain):
            return literal.linear(x, weight, bias, rule, len(weight) // layer.embed_dim)

    with patch.object(F, "linear", product):
        return nn.MultiheadAttention.forward(layer, *args, **kwargs)


def _literal(layer: nn.Module, rule: Largest) -> Callable[..., Any]:
    """The forward pass of a layer's literal twin."""
    if isinstance(layer, nn.Linear):
        return lambda input: literal.linear(input, layer.weight, layer.bias, rule)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return lambda input: literal.convolution(layer, input, rule)
    if isinstance(layer, nn.LSTM):
        return lambda input: literal.lstms(layer, input, rule)
    if isinstance(layer, nn.MultiheadAttention):
        return partial(_attention, layer, rule)
    return lambda x: literal.linear(x, layer.weight.t(), layer.bias, rule)  # Conv1D of GPT-2


def twin(plain: nn.Module, names: list[str], rule: Largest) -> nn.Module:
    """A copy of the plain model whose layers of these names are literal."""
    model = copy.deepcopy(plain)
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = _literal(layer, rule)
    return model


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors with a gradient in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from tensors(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from tensors(each)


Step = tuple[float, dict[str, Tensor]]
"""The loss, and the gradient of each parameter that has one."""


def step(model: nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    """One training step. The loss is a fixed sum of all that the model returns, with weights drawn at random."""
    model.train()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    output = model(**inputs)
    draws = torch.Generator().manual_seed(2)
    losses = [
        (each * torch.randn(each.shape, generator=draws, dtype=each.dtype)).sum() / each.numel() ** 0.5
        for each in tensors(output)
    ]
    loss = torch.stack([each.double() for each in losses]).sum()
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return loss.item(), gradients


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, relative to that gradient.

    Gradients that are nothing but rounding, like those of the biases of keys, are measured by the largest gradient.
    """
    if found.keys() != expected.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())}")
    norms = {name: gradient.double().norm() for name, gradient in expected.items()}
    least = max(norms.values()) * torch.finfo(next(iter(expected.values())).dtype).eps ** 0.5
    errors = [(found[name].double() - expected[name].double()).norm() / max(norms[name], least) for name in expected]
    return float(torch.stack(errors).max())  # NaN, if any is


SHARE = 0.25  # of the features, where a part is kept
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass
class Result:
    """What the models of one family gave.

    Attributes:
        layers: How many layers the report names.
        sparse: How many of them are sparse with a rule for columns, which all kinds of layers take.
        whole: The largest error where everything is kept, against plain torch, by dtype.
        part: The largest error where a part is kept, against the literal twin, by dtype.
        unseen: Sparse layers whose weights the model reads itself, so that no rule was asked for their gradients.
        failures: What went wrong.
    """

    layers: int = 0
    sparse: int = 0
    whole: dict[torch.dtype, float] = field(default_factory=dict)
    part: dict[torch.dtype, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def examine(plain: nn.Module, inputs: Mapping[str, Tensor], dtypes: Iterable[torch.dtype]) -> Result:
    """Trains copies of a model for one step each, in each dtype and with each scope, and compares their gradients."""
    result = Result()
    for dtype in dtypes:
        plain = plain.to(dtype)
        inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
        expected = step(copy.deepcopy(plain), inputs)
        for scope in SCOPES:
            model, names = _converted(plain, meprop.TopK(SHARE, scope=scope))
            if scope == "batch":
                result.layers, result.sparse = len(meprop.report(model).layers), len(names)
            literally = step(twin(plain, names, Largest(scope, SHARE)), inputs)
            if abs(literally[0] - expected[0]) > TOLERANCE[dtype] * abs(expected[0]):
                raise AssertionError("the literal twin has another forward pass than the model")
            _compare(result, result.part, f"k < n, {scope}", partial(step, model, inputs), literally, dtype)
            if scope != "global":
                _compare_whole(result, plain, inputs, scope, expected, dtype)
    return result


def _compare_whole(
    result: Result, plain: nn.Module, inputs: Mapping[str, Tensor], scope: Scope, expected: Step, dtype: torch.dtype
) -> None:
    model, names = _converted(plain, Everything(scope))
    layers = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.rule = Everything(scope)  # which counts for this layer alone
    _compare(result, result.whole, f"k = n, {scope}", partial(step, model, inputs), expected, dtype)
    for name, layer in layers.items():
        got_gradient = any(each.dim() > 1 and each.grad is not None and each.grad.any() for each in layer.parameters())
        if got_gradient and not layer.rule.passes and name not in result.unseen:
            result.unseen.append(name)


def _converted(plain: nn.Module, rule: meprop.Rule) -> tuple[nn.Module, list[str]]:
    """A converted copy, and the names of its sparse layers."""
    model = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", meprop.NoEffectWarning)
        report = meprop.convert(model, rule, min_features=1, when="always")
    return model, [layer.name for layer in report.layers if layer.status == "sparse"]


def _compare(
    result: Result,
    errors: dict[torch.dtype, float],
    what: str,
    run: Callable[[], Step],
    expected: Step,
    dtype: torch.dtype,
) -> None:
    try:
        loss, gradients = run()
    except Exception as problem:  # whatever it is, it goes into the table
        failure = f"{type(problem).__name__}: {str(problem).splitlines()[0].partition('. ')[0]}"
        if failure not in result.failures:
            result.failures.append(failure)
        return
    # The forward pass is torch's own, bit for bit but for attention.
    found = max(error(gradients, expected[1]), abs(loss - expected[0]) / max(abs(expected[0]), 1e-3))
    errors[dtype] = max(errors.get(dtype, 0.0), found)
    if not found <= TOLERANCE[dtype]:
        result.failures.append(f"{what}, {str(dtype)[6:]}: an error of {found:.1e}")

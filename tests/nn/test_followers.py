"""What may follow a converted layer: operations in place, as after torch's own layer."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import meprop
from meprop.rules import Rule
from meprop.selection import ColumnSelection

WIDTH = 8


def _masked(output: Tensor) -> None:
    output[output > 0.1] = 0.0


OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda output: output.relu_(),
    "mul_": lambda output: output.mul_(0.5),
    "add_": lambda output: output.add_(torch.ones(output.shape[-1])),
    "masked assignment": _masked,
    "row": lambda output: output[0].zero_(),
}

# A layer and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 1-D": (lambda: nn.Linear(6, WIDTH), (6,)),
    "linear 2-D": (lambda: nn.Linear(6, WIDTH), (5, 6)),
    "linear 3-D": (lambda: nn.Linear(6, WIDTH), (2, 3, 6)),
    "linear 4-D": (lambda: nn.Linear(6, WIDTH), (2, 3, 4, 6)),
    "linear 3-D, no bias": (lambda: nn.Linear(6, WIDTH, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, WIDTH, 3), (2, 3, 7)),
    "conv1d, unbatched": (lambda: nn.Conv1d(3, WIDTH, 3), (3, 7)),
    "conv1d, pointwise": (lambda: nn.Conv1d(3, WIDTH, 1), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, WIDTH, 3, padding="same"), (2, 3, 7, 7)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, WIDTH, 1), (3, 7, 7)),
    "lstm": (lambda: nn.LSTM(6, WIDTH), (4, 2, 6)),
    "lstm, batch first": (lambda: nn.LSTM(6, WIDTH, batch_first=True), (4, 2, 6)),
    "lstm, unbatched": (lambda: nn.LSTM(6, WIDTH), (4, 6)),
    "lstm, two layers": (lambda: nn.LSTM(6, WIDTH, 2, bidirectional=True), (4, 2, 6)),
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 2), (4, 2, WIDTH)),
    "attention, batch first": (lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), (4, 2, WIDTH)),
    "attention, unbatched": (lambda: nn.MultiheadAttention(WIDTH, 2), (4, WIDTH)),
}


class EverythingByHand(Rule):
    """Keeps all, but as a selection, so that the sparse backward pass runs."""

    scope = "batch"

    def select(self, grad: Tensor) -> ColumnSelection:
        width = grad.shape[1]
        return ColumnSelection(grad, torch.arange(width, dtype=torch.int32), width)


def outputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What a user sees of a call: the output, and the states of an LSTM."""
    if isinstance(layer, nn.MultiheadAttention):
        return (layer(x, x, x, need_weights=False)[0],)
    if isinstance(layer, nn.LSTM):
        output, states = layer(x)
        return output, *states
    return (layer(x),)


def gradients(layer: nn.Module, x: Tensor, operation: Callable[[Tensor], object]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    found = outputs(layer, x)
    if isinstance(layer, nn.LSTM) and not isinstance(layer, meprop.nn.LSTM):  # torch's own does not take them
        found = tuple(output.clone() for output in found)
    for output in found:
        operation(output)
    sum(output.square().sum() for output in found).backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


CASES = [(case, autocast) for case in LAYERS for autocast in (False, True) if not (autocast and "lstm" in case)]
"""Torch's LSTM has no bfloat16 on processors without the instructions."""


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("case", "autocast"), CASES)
def test_operations_in_place_give_the_gradients_of_torch(case, autocast, operation):
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    layer = copy.deepcopy(plain)
    meprop.convert(layer, EverythingByHand(), when="always", min_features=1)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found, expected = (gradients(each, x, OPERATIONS[operation]) for each in (layer, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2 if autocast else 1e-4, atol=3e-2 if autocast else 1e-5)
    assert layer.policy.record.sparse_passes > 0


def is_slow(case: str, operation: str) -> bool:
    """Each operation follows one layer always, and one operation each of the others."""
    return case != "linear 3-D" and operation != "masked assignment"


@pytest.mark.parametrize(
    ("case", "operation"),
    [
        pytest.param(case, operation, marks=[pytest.mark.slow] * is_slow(case, operation))
        for case in ("linear 3-D", "conv1d", "attention")
        for operation in OPERATIONS
    ],
)
def test_operations_in_place_may_follow_under_compile(case, operation):
    torch.compiler.reset()
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    meprop.convert(layer, meprop.TopK(2, scope="batch"), when="always", min_features=1)

    def step(x: Tensor) -> Tensor:
        (output,) = outputs(layer, x)
        OPERATIONS[operation](output)
        return output

    expected, found = step(x), torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.policy.record.compiled


def test_the_functions_themselves_let_operations_follow_in_place():
    rule, x = EverythingByHand(), torch.randn(2, 3, 6)
    weight, bias = torch.randn(WIDTH, 6, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    meprop.functional.linear(x, weight, bias, rule=rule).relu_().sum().backward()
    weights = [torch.randn(32, size, requires_grad=True) for size in (6, WIDTH)]
    output, (h, c) = meprop.functional.lstm(x, None, *weights, rule=meprop.TopK(2))
    for each in (output, h, c):
        each.mul_(2)
    (output.sum() + h.sum() + c.sum()).backward()
    assert weights[0].grad.isfinite().all()


@pytest.mark.parametrize("rule", [meprop.TopK(2), meprop.Sampled(noise=0.25), meprop.TopK(2, scope="batch")], ids=str)
def test_a_lstms_gradient_is_not_touched_by_what_follows_in_place(rule):
    torch.manual_seed(0)
    layer, x = nn.LSTM(6, WIDTH), torch.randn(4, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meprop.convert(layer, rule, when="always", min_features=1)
    found = []
    for in_place in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        output, _ = layer(x)
        output = output.mul_(3) if in_place else output * 3
        output.square().sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

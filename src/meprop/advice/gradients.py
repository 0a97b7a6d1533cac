"""What a rule loses of the gradient, beside the noise that a batch's gradient has anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from meprop.advice.trial import Trial
from meprop.advice.watch import tensors_of
from meprop.advice.ways import DENSE, FREE, Ways

__all__ = ["Agreement", "Noise", "agreements"]


@dataclass(frozen=True)
class Agreement:
    """How alike two gradients are.

    Attributes:
        cosine: The cosine of the angle between them. NaN if one of them is zero.
        error: The length of their difference, as a share of the dense one's.
    """

    cosine: float
    error: float


Noise = Agreement | None
"""Of the gradients of two batches. None if there is only one batch."""


class _Sums:
    """Sums over batches from which an `Agreement` comes."""

    def __init__(self) -> None:
        self.product = self.dense = self.sparse = self.difference = 0.0

    def add(self, dense: Sequence[Tensor], sparse: Sequence[Tensor]) -> None:
        for one, other in zip(dense, sparse, strict=True):
            self.product += _dot(one, other)
            self.dense += _dot(one, one)
            self.sparse += _dot(other, other)
            difference = one.detach() - other
            self.difference += _dot(difference, difference)

    def agreement(self) -> Agreement:
        if not self.dense:
            return Agreement(nan, nan)
        cosine = self.product / sqrt(self.dense * self.sparse) if self.sparse else nan
        return Agreement(min(1.0, cosine), sqrt(self.difference / self.dense))


def agreements(
    trial: Trial, ways: Ways, batches: Sequence[Any]
) -> tuple[dict[str, tuple[Agreement, Agreement]], Noise]:
    """Compares the gradients of each rule with the dense ones, of the same batches with the same random numbers.

    Args:
        trial: The model.
        ways: The ways, with rules that take at least one layer that a gradient reaches.
        batches: The batches.

    Returns:
        By the rule's way: the agreement of the weights' gradients of all layers that a rule takes, and that of the
        output gradient of the first of these layers. And the noise of a batch's gradient of the weights: `error` is its
        standard deviation, as a share of its length, and `cosine` is that between two batches.
    """
    sums = {name: (_Sums(), _Sums()) for name in ways.names if name not in (DENSE, FREE)}
    wanted = {id(each): each for layer in ways.layers.values() for each in layer.parameters() if each.dim() > 1}
    weights = [each for each in wanted.values() if each.requires_grad]
    total: list[Tensor] = []
    squares = 0.0
    for batch in batches:
        ways.take(DENSE)
        seed = int(torch.randint(2**31, ()))
        dense, dense_first = _gradients(trial, ways, weights, batch, seed)
        squares += sum(_dot(each, each) for each in dense)
        total = (
            [each.clone() for each in dense] if not total else [a.add_(b) for a, b in zip(total, dense, strict=True)]
        )
        for name, (of_weights, of_first) in sums.items():
            ways.take(name)
            sparse, sparse_first = _gradients(trial, ways, weights, batch, seed)
            of_weights.add(dense, sparse)
            of_first.add(dense_first, sparse_first)
    ways.take(DENSE)
    found = {name: (of_weights.agreement(), of_first.agreement()) for name, (of_weights, of_first) in sums.items()}
    return found, _noise(len(batches), sum(_dot(each, each) for each in total), squares)


def _noise(batches: int, square_of_sum: float, sum_of_squares: float) -> Noise:
    """The noise of gradients g of B batches, from |sum g|^2 and sum |g|^2."""
    if batches < 2 or not sum_of_squares:
        return None
    products = (square_of_sum - sum_of_squares) / (batches * (batches - 1))  # the mean of g_a g_b, for a != b
    square = sum_of_squares / batches
    return Agreement(products / square, sqrt(max(0.0, square - products) / square))


def _gradients(
    trial: Trial, ways: Ways, weights: Sequence[Tensor], batch: Any, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the weights, and of the output of the layer that is called first. Zeros where there is none."""
    first: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if not first:
            first.extend(each for each in tensors_of(output)[:1] if each.requires_grad)

    hooks = [layer.register_forward_hook(note) for layer in ways.layers.values()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = trial.loss_of(batch)
            wanted = [*weights, *first]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
    finally:
        for handle in hooks:
            handle.remove()
    pairs = zip(wanted, found, strict=True)
    gradients = [torch.zeros_like(of) if each is None else each for of, each in pairs]  # pyright: ignore[reportUnnecessaryComparison]
    return gradients[: len(weights)], gradients[len(weights) :]


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten().float(), other.flatten().float()))

"""Training as the core does it: epochs of patterns, validation after each, the best weights kept, a stop rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meprop.chip.data import Split
from meprop.chip.model import Net


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        epochs: How many there were.
        best_epoch: That of the weights that are kept, from 1.
        accuracy: The share of test patterns that the kept weights classify right, in percent.
    """

    epochs: int
    best_epoch: int
    accuracy: float


def train(net: Net[Any], data: Split, seed: int, epochs: int = 100, patience: int = 20) -> Outcome:
    """Train a net, and leave it with the weights of the smallest validation error, the first of equals.

    Args:
        net: The net, which is changed.
        data: The patterns.
        seed: Of the order of the patterns, which is drawn anew in each epoch.
        epochs: At most so many.
        patience: Stop after so many epochs in a row without a smaller validation error.

    Raises:
        ValueError: `epochs` or `patience` is below 1.
    """
    if min(epochs, patience) < 1:
        raise ValueError(f"epochs={epochs}, patience={patience}; both must be at least 1")
    generator = np.random.default_rng(seed)
    best, best_epoch, weights = None, 0, net.weights
    epoch = 0
    for epoch in range(1, epochs + 1):
        for index in generator.permutation(len(data.training.inputs)):
            net.learn(data.training.inputs[index], data.training.targets[index])
        error = sum(map(net.error, data.validation.inputs, data.validation.targets))
        if best is None or error < best:
            best, best_epoch, weights = error, epoch, [each.copy() for each in net.weights]
        elif epoch - best_epoch >= patience:
            break
    net.weights = weights
    right = net.classify(data.test.inputs) == data.test.classes
    return Outcome(epoch, best_epoch, 100 * float(right.mean()))

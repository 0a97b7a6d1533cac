"""The nets that the core is compared with: in fixed point, bit for bit what the core computes, and in float64.

Both train on-line, one pattern at a time, by gradient descent on half the squared error. All units are sigmoids. Of
each delta vector the k entries of largest magnitude are propagated, of equals the lower index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from meprop.chip.design import Design
from meprop.chip.fixed import Integers, Reals, Sigmoid, rounded

__all__ = ["FixedNet", "FloatNet", "Net", "initial_weights", "largest"]

NumberT = TypeVar("NumberT", np.int64, np.float64)


def initial_weights(design: Design, seed: int) -> list[Reals]:
    """Weights to begin with: uniform in +-1.7 / sqrt(inputs of the neuron), biases 0.

    Returns:
        Of each layer [neurons, inputs + 1], float64; the last column holds the biases.
    """
    generator = np.random.default_rng(seed)
    weights: list[Reals] = []
    for inputs, neurons in zip(design.widths, design.widths[1:], strict=False):
        drawn = generator.uniform(-1, 1, (neurons, inputs)) * 1.7 / np.sqrt(inputs)
        weights.append(np.hstack([drawn, np.zeros((neurons, 1))]))
    return weights


def largest(deltas: NDArray[NumberT], count: int) -> NDArray[np.intp]:
    """The indices of the entries of largest magnitude, of equals the lower index."""
    return np.argsort(-np.abs(deltas), kind="stable")[:count]


class Net(ABC, Generic[NumberT]):
    """A net that trains; a subclass says how it calculates.

    Args:
        design: The net.
        weights: Of each layer [neurons, inputs + 1], in float64; the last column holds the biases.

    Attributes:
        weights: The weights as the net calculates with them.

    Raises:
        ValueError: The weights have other shapes.
    """

    weights: list[NDArray[NumberT]]

    def __init__(self, design: Design, weights: Sequence[Reals]) -> None:
        shapes = [(rows, columns + 1) for columns, rows in zip(design.widths, design.widths[1:], strict=False)]
        if (given := [each.shape for each in weights]) != shapes:
            raise ValueError(f"the weights have the shapes {given}; this net takes {shapes}")
        self.design = design
        self.weights = [self._weights(each) for each in weights]

    def activations(self, inputs: Reals) -> list[NDArray[NumberT]]:
        """All vectors of a forward pass, from the inputs [inputs] to the outputs [outputs]."""
        vectors = [self._values(inputs)]
        for weights in self.weights:
            vectors.append(self._forward(weights, vectors[-1]))
        return vectors

    def error(self, inputs: Reals, target: Reals) -> NDArray[NumberT]:
        """The sum of the squared errors of a pattern, a scalar."""
        return np.square(self._error(self.activations(inputs)[-1], target)).sum()

    def learn(self, inputs: Reals, target: Reals) -> NDArray[NumberT]:
        """Train on one pattern, and return the sum of its squared errors before that."""
        *vectors, outputs = self.activations(inputs)
        error = self._error(outputs, target)
        total = np.square(error).sum()
        for weights, below in zip(reversed(self.weights), reversed(vectors), strict=True):
            deltas = self._deltas(error, outputs)
            rows = largest(deltas, self.design.kept(len(deltas)))
            error = self._backward(weights[rows, :-1], deltas[rows])
            weights[rows] = self._updated(weights[rows], deltas[rows], below)
            outputs = below
        return total

    def classify(self, patterns: Reals) -> NDArray[np.intp]:
        """The classes of patterns [N, inputs]: the output that is largest, of equals the lower one."""
        return np.array([int(np.argmax(self.activations(each)[-1])) for each in patterns])

    @abstractmethod
    def _weights(self, weights: Reals) -> NDArray[NumberT]:
        """Weights as the net calculates with them."""

    @abstractmethod
    def _values(self, reals: Reals) -> NDArray[NumberT]:
        """Inputs as the net calculates with them."""

    @abstractmethod
    def _error(self, outputs: NDArray[NumberT], target: Reals) -> NDArray[NumberT]:
        """Outputs minus targets."""

    @abstractmethod
    def _forward(self, weights: NDArray[NumberT], below: NDArray[NumberT]) -> NDArray[NumberT]:
        """The activations of a layer, from those below it."""

    @abstractmethod
    def _deltas(self, error: NDArray[NumberT], outputs: NDArray[NumberT]) -> NDArray[NumberT]:
        """The errors at outputs times the sigmoid's derivative there."""

    @abstractmethod
    def _backward(self, weights: NDArray[NumberT], deltas: NDArray[NumberT]) -> NDArray[NumberT]:
        """The errors below a layer, of kept rows of its weights and their deltas."""

    @abstractmethod
    def _updated(
        self, weights: NDArray[NumberT], deltas: NDArray[NumberT], below: NDArray[NumberT]
    ) -> NDArray[NumberT]:
        """Kept rows of weights after the step."""


class FixedNet(Net[np.int64]):
    """The net in fixed point: all numbers are int64, and are bit for bit those of the core.

    No sum overflows: `Design` allows words of at most 24 bits, whose sums of 65 products have 55 bits.
    """

    def __init__(self, design: Design, weights: Sequence[Reals]) -> None:
        super().__init__(design, weights)
        self._sigmoid = Sigmoid(design.argument, design.value)

    def _weights(self, weights: Reals) -> Integers:
        return self.design.weight.of_reals(weights)

    def _values(self, reals: Reals) -> Integers:
        return self.design.value.of_reals(reals)

    def _error(self, outputs: Integers, target: Reals) -> Integers:
        return self.design.value.saturated(outputs - self._values(target))

    def _forward(self, weights: Integers, below: Integers) -> Integers:
        design = self.design
        sums = weights[:, :-1] @ below + weights[:, -1] * design.value.one
        return self._sigmoid(design.argument.of_sum(sums, design.weight.fraction + design.value.fraction))

    def _deltas(self, error: Integers, outputs: Integers) -> Integers:
        value, delta = self.design.value, self.design.delta
        derivative = delta.of_sum(outputs * (value.one - outputs), 2 * value.fraction)
        return delta.of_sum(error * derivative, value.fraction + delta.fraction)

    def _backward(self, weights: Integers, deltas: Integers) -> Integers:
        design = self.design
        return design.value.of_sum(deltas @ weights, design.weight.fraction + design.delta.fraction)

    def _updated(self, weights: Integers, deltas: Integers, below: Integers) -> Integers:
        products = deltas[:, None] * np.append(below, self.design.value.one)
        return self.design.weight.saturated(weights - rounded(products, self.design.update_shift))


class FloatNet(Net[np.float64]):
    """The same net in float64: what fixed point is measured against."""

    def _weights(self, weights: Reals) -> Reals:
        return weights.astype(np.float64)

    def _values(self, reals: Reals) -> Reals:
        return reals.astype(np.float64)

    def _error(self, outputs: Reals, target: Reals) -> Reals:
        return outputs - target

    def _forward(self, weights: Reals, below: Reals) -> Reals:
        return 1 / (1 + np.exp(-(weights[:, :-1] @ below + weights[:, -1])))

    def _deltas(self, error: Reals, outputs: Reals) -> Reals:
        return error * outputs * (1 - outputs)

    def _backward(self, weights: Reals, deltas: Reals) -> Reals:
        return deltas @ weights

    def _updated(self, weights: Reals, deltas: Reals, below: Reals) -> Reals:
        return weights - self.design.rate * np.outer(deltas, np.append(below, 1.0))

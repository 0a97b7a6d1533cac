"""A design: the net, its words and its k. The model, the core and the costs are all made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

from meprop.chip.fixed import Format

__all__ = ["Design", "Settings"]

MOST_LAYERS, MOST_NEURONS, MOST_ENDS = 127, 60, 64
FEWEST_BITS, MOST_BITS = 8, 24
_LOWEST_SHIFT, _HIGHEST_SHIFT = -3, 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is chosen for a chip, whatever the data.

    Raises:
        ValueError: A field is out of range.
        TypeError: A field is not a number of its kind.
    """

    neurons: int = 32
    """Neurons of each hidden layer, from 1 to 60."""
    layers: int = 1
    """Hidden layers, from 1 to 127."""
    word: int = 18
    """Bits of a word, from 8 to 24."""
    weight_fraction: int | None = None
    """Bits of a weight behind the binary point, from 2 to those of a word. None: 5 fewer than a word has, so that
    weights are in [-16, 16)."""
    k: int | float | None = None
    """How many entries of each delta vector are propagated: a count (8), or a share of the n entries (0.25), which is
    max(1, round(k * n)) of them. None, or at least n: all."""
    rate: float = 0.5
    """The learning rate, a power of two from 2^-12 to 8, so that it is a shift."""

    def __post_init__(self) -> None:
        _check_count("neurons", self.neurons, 1, MOST_NEURONS)
        _check_count("layers", self.layers, 1, MOST_LAYERS)
        _check_count("word", self.word, FEWEST_BITS, MOST_BITS)
        if self.weight_fraction is not None:
            _check_count("weight_fraction", self.weight_fraction, 2, self.word)
        if isinstance(self.k, float):
            if not 0 < self.k <= 1:
                raise ValueError(f"k={self.k!r}; a share must be above 0 and at most 1, and a count is an int")
        elif self.k is not None:
            _check_count("k", self.k, 1, None)
        mantissa, exponent = math.frexp(self.rate)
        if mantissa != 0.5 or not _LOWEST_SHIFT <= 1 - exponent <= _HIGHEST_SHIFT:
            raise ValueError(f"rate={self.rate!r}; it must be a power of two from 2^-12 to 8, e.g. 0.25")

    def of_net(self, inputs: int, outputs: int) -> Design:
        """The design of a net with so many inputs and outputs.

        Raises:
            ValueError: One of them is out of range.
        """
        settings = {each.name: getattr(self, each.name) for each in fields(Settings)}
        return Design(inputs=inputs, outputs=outputs, **settings)


@dataclass(frozen=True, kw_only=True)
class Design(Settings):
    """A fully connected net of sigmoid units, and how it is trained on the chip.

    Example:
        >>> design = Design(inputs=4, neurons=16, outputs=3, k=0.25)
        >>> design.widths, design.kept(16), design.lanes
        ((4, 16, 3), 4, 16)
    """

    inputs: int
    """Inputs of the net, from 1 to 64."""
    outputs: int
    """Outputs of the net, from 1 to 64."""

    def __post_init__(self) -> None:
        _check_count("inputs", self.inputs, 1, MOST_ENDS)
        _check_count("outputs", self.outputs, 1, MOST_ENDS)
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of all vectors, from the inputs to the outputs."""
        return (self.inputs, *[self.neurons] * self.layers, self.outputs)

    @property
    def lanes(self) -> int:
        """Places for inputs in the physical layer, without that of the bias."""
        return max(self.inputs, self.neurons, self.outputs)

    @property
    def rows(self) -> int:
        """Rows of weights of all layers, one for each neuron. A row has a weight for each lane and a bias."""
        return self.layers * self.neurons + self.outputs

    def kept(self, width: int) -> int:
        """How many entries are propagated of a delta vector of this width."""
        if self.k is None:
            return width
        return min(width, max(1, round(self.k * width)) if isinstance(self.k, float) else self.k)

    @cached_property
    def value(self) -> Format:
        """The format of inputs, activations, targets and errors: numbers in [-2, 2)."""
        return Format(self.word, self.word - 2)

    @cached_property
    def delta(self) -> Format:
        """That of deltas and of the sigmoid's derivative: numbers in [-1/2, 1/2).

        The derivative is at most 1/4, so that its product with an error always fits.
        """
        return Format(self.word, self.word)

    @cached_property
    def weight(self) -> Format:
        """That of weights and biases."""
        return Format(self.word, self.word - 5 if self.weight_fraction is None else self.weight_fraction)

    @cached_property
    def argument(self) -> Format:
        """That of the sigmoid's argument: numbers in [-16, 16)."""
        return Format(self.word + 4, self.word - 1)

    @property
    def sum_bits(self) -> int:
        """Bits that hold any sum of products exactly: of a weight row, of a weight column, of squared errors."""
        return 2 * self.word + max(3, self.lanes.bit_length())

    @property
    def rate_shift(self) -> int:
        """The learning rate is 2^-rate_shift."""
        return 1 - math.frexp(self.rate)[1]

    @property
    def update_shift(self) -> int:
        """By how many bits the product of a delta and an activation is shifted to become the change of a weight."""
        return self.value.fraction + self.delta.fraction + self.rate_shift - self.weight.fraction


def _check_count(name: str, count: object, low: int, high: int | None) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}={count!r} is of type {type(count).__name__}; it must be an int")
    if count < low or (high is not None and count > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={count}; it must be {allowed}")

"""Fixed point: formats of words, rounding, saturation, and the sigmoid as a table.

A word is an integer in two's complement that stands for ``integer * 2**-fraction``. Sums of products are exact. They
are rounded once, half up, and saturated once. Half up is an adder's carry in hardware: ``floor(value + 1/2)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from amaranth.hdl import Value

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
IntegersT = TypeVar("IntegersT", int, Integers, "Value")
"""Integers, or the logic that computes with them."""

SEGMENTS = 512
"""Of the table of the sigmoid."""
SIGMOID_END = 16
"""The table covers [0, 16). At 16 the sigmoid is 1.1e-7 below 1."""


@dataclass(frozen=True)
class Format:
    """A signed fixed-point format.

    Attributes:
        word: Bits of a word, with the sign.
        fraction: How many of them are behind the binary point. More than there are means small numbers only.
    """

    word: int
    fraction: int

    @property
    def lowest(self) -> int:
        """The smallest word."""
        return -(1 << (self.word - 1))

    @property
    def highest(self) -> int:
        """The largest word."""
        return (1 << (self.word - 1)) - 1

    @property
    def one(self) -> int:
        """The word that stands for 1."""
        return 1 << self.fraction

    def saturated(self, integers: Integers) -> Integers:
        """The nearest words of integers that may be out of range."""
        return np.minimum(np.maximum(integers, self.lowest), self.highest)

    def of_sum(self, integers: Integers, fraction: int) -> Integers:
        """Words of exact sums that have more bits behind the binary point: rounded once, saturated once."""
        return self.saturated(rounded(integers, fraction - self.fraction))

    def of_reals(self, reals: Reals) -> Integers:
        """The nearest words of real numbers.

        Raises:
            ValueError: One of them is NaN.
        """
        if np.isnan(reals).any():
            raise ValueError("NaN has no fixed-point word; remove it from the data or from the weights")
        scaled = np.floor(np.ldexp(reals, self.fraction) + 0.5)
        return np.clip(scaled, self.lowest, self.highest).astype(np.int64)

    def to_reals(self, integers: Integers) -> Reals:
        """What words stand for."""
        return np.ldexp(integers.astype(np.float64), -self.fraction)


def rounded(integer: IntegersT, shift: int) -> IntegersT:
    """``floor(integer / 2**shift + 1/2)``, for a shift of at least 1."""
    return (integer + (1 << (shift - 1))) >> shift


def sigmoid_nodes(fraction: int) -> list[int]:
    """The sigmoid at the ends of all segments, as words: `SEGMENTS` + 1 of them."""
    step = SIGMOID_END / SEGMENTS
    return [math.floor((1 << fraction) / (1 + math.exp(-node * step)) + 0.5) for node in range(SEGMENTS + 1)]


class Sigmoid:
    """The sigmoid of words by a table of 512 segments over [0, 16), linear between its nodes, with symmetry.

    The error is at most ``h**2 / 8 * max|sigmoid''|``, 1.2e-5 for h = 1/32, and one unit of the last bit: half from the
    nodes, half from the rounding of what is between them.

    Args:
        argument: The format of the argument, which covers [-16, 16).
        value: The format of the result.
    """

    def __init__(self, argument: Format, value: Format) -> None:
        self.argument, self.value = argument, value
        nodes = np.array(sigmoid_nodes(value.fraction), dtype=np.int64)
        self.starts, self.rises = nodes[:-1], np.diff(nodes)
        self.within = argument.word - 1 - (SEGMENTS - 1).bit_length()
        """Bits of the place within a segment."""

    def __call__(self, integers: Integers) -> Integers:
        """Words of the sigmoid, of words of its argument."""
        magnitude = np.minimum(np.abs(integers), self.argument.highest)
        segment, place = magnitude >> self.within, magnitude & ((1 << self.within) - 1)
        positive = self.starts[segment] + rounded(self.rises[segment] * place, self.within)
        return np.where(integers < 0, self.value.one - positive, positive)

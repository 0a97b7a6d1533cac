"""Fixed point: rounding, saturation, and the sigmoid's table."""

from __future__ import annotations

import numpy as np
import pytest

import chip_literal as literal
from meprop.chip.fixed import Format, Sigmoid, rounded


@pytest.mark.parametrize("shift", [1, 2, 7])
def test_halves_are_rounded_up(shift):
    integers = np.arange(-(3 << shift), 3 << shift)
    assert rounded(integers, shift).tolist() == [literal.half_up(int(each), shift) for each in integers]
    assert rounded(-(1 << (shift - 1)), shift) == 0
    assert rounded(1 << (shift - 1), shift) == 1


def test_reals_become_the_nearest_words_and_saturate():
    form = Format(8, 6)
    assert form.of_reals(np.array([0.0, 1.0, -2.0, 1.999, 5.0, -np.inf, 1 / 128, -1 / 128])).tolist() == [
        0,
        64,
        -128,
        127,
        127,
        -128,
        1,
        0,
    ]
    assert form.to_reals(np.array([-128, 1])).tolist() == [-2.0, 1 / 64]
    with pytest.raises(ValueError, match="NaN has no fixed-point word"):
        form.of_reals(np.array([np.nan]))


def test_a_sum_is_rounded_once_and_saturated_once():
    form = Format(8, 4)
    assert form.of_sum(np.array([127 * 16 + 7, 127 * 16 + 8, -128 * 16 - 9, 24]), 8).tolist() == [127, 127, -128, 2]


@pytest.mark.parametrize("word", [8, 9, 12, 16])
def test_the_sigmoid_is_the_literal_one_for_every_argument(word):
    argument, value = Format(word + 4, word - 1), Format(word, word - 2)
    every = np.arange(argument.lowest, argument.highest + 1, 1 if word < 16 else 97)
    found = Sigmoid(argument, value)(every)
    some = range(0, len(every), max(1, len(every) // 3000))
    assert [int(found[place]) for place in some] == [literal.sigmoid(int(every[place]), word) for place in some]
    exact = 1 / (1 + np.exp(-argument.to_reals(every)))
    assert np.abs(value.to_reals(found) - exact).max() <= 1.2e-5 + 2.0**-value.fraction
    assert (np.diff(found) >= 0).all()
    assert (found[:: len(every) - 1] == [0, value.one]).all()

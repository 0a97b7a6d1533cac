"""What a design allows, and what follows from it."""

from __future__ import annotations

import math
import re

import pytest

import meprop
from meprop.chip.design import Design, Settings


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": 65}, ValueError, "inputs=65; it must be from 1 to 64"),
        ({"outputs": 0}, ValueError, "outputs=0; it must be from 1 to 64"),
        ({"neurons": 61}, ValueError, "neurons=61; it must be from 1 to 60"),
        ({"layers": 128}, ValueError, "layers=128; it must be from 1 to 127"),
        ({"layers": True}, TypeError, "layers=True is of type bool; it must be an int"),
        ({"word": 7}, ValueError, "word=7; it must be from 8 to 24"),
        ({"word": 12, "weight_fraction": 13}, ValueError, "weight_fraction=13; it must be from 2 to 12"),
        ({"k": 0}, ValueError, "k=0; it must be at least 1"),
        ({"k": 1.5}, ValueError, "k=1.5; a share must be above 0 and at most 1"),
        ({"k": math.nan}, ValueError, "k=nan; a share must be"),
        ({"rate": 0.3}, ValueError, "rate=0.3; it must be a power of two from 2^-12 to 8"),
        ({"rate": 16.0}, ValueError, "rate=16.0; it must be a power of two"),
        ({"rate": 2.0**-13}, ValueError, "it must be a power of two"),
        ({"rate": -0.5}, ValueError, "it must be a power of two"),
    ],
)
def test_what_is_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Design(**{"inputs": 4, "outputs": 3, **options})


@pytest.mark.parametrize("rate", [2.0**-12, 0.5, 8.0])
def test_the_rate_is_a_shift(rate):
    assert 2.0 ** -Design(inputs=1, outputs=1, rate=rate).rate_shift == rate


@pytest.mark.parametrize("k", [1, 7, 60, 100, 0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("width", [1, 10, 59])
def test_k_is_the_same_as_everywhere(k, width):
    assert Design(inputs=1, outputs=1, k=k).kept(width) == min(width, meprop.TopK(k).count(width))


@pytest.mark.parametrize("word", range(8, 25))
@pytest.mark.parametrize("rate", [2.0**-12, 8.0])
def test_no_sum_leaves_64_bits(word, rate):
    design = Design(inputs=64, neurons=60, outputs=64, word=word, weight_fraction=word, rate=rate)
    largest = 65 * (1 << (word - 1)) ** 2
    assert largest < 1 << (design.sum_bits - 1) < 1 << 62
    assert design.update_shift >= 1
    assert design.argument.word - 1 > 9


def test_a_net_gets_all_settings():
    settings = Settings(neurons=5, layers=2, word=12, weight_fraction=6, k=0.5, rate=2.0)
    design = settings.of_net(3, 4)
    assert design == Design(inputs=3, outputs=4, neurons=5, layers=2, word=12, weight_fraction=6, k=0.5, rate=2.0)
    assert design.widths == (3, 5, 5, 4)

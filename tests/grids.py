"""Grids of parameters of which the quick tests run a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest


def covering(*axes: Iterable[Any], strength: int = 2, when: Callable[..., bool] = lambda *case: True) -> list[Any]:
    """All cases of a grid, of which most are slow.

    The others hold together any two values of any two parameters. They are chosen greedily: the next one is the first
    of those that hold the most pairs that none before it holds.

    Args:
        axes: The values of each parameter.
        strength: Any so many values of as many parameters are held together, in place of two.
        when: Whether these values are a case at all.
    """
    values = [list(axis) for axis in axes]
    cases = {}  # by the place of each value on its axis
    for place in product(*(range(len(axis)) for axis in values)):
        case = [axis[index] for axis, index in zip(values, place, strict=True)]
        if when(*case):
            cases[place] = case
    held = {place: set(combinations(enumerate(place), strength)) for place in cases}
    missing, quick = set().union(*held.values()), set()
    while missing:
        best = max(cases, key=lambda place: len(held[place] & missing))
        missing -= held[best]
        quick.add(best)
    return [pytest.param(*case, marks=[pytest.mark.slow] * (place not in quick)) for place, case in cases.items()]

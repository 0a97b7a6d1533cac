from __future__ import annotations

import pytest

from meprop.training.halving import read_duration, rounds


@pytest.mark.parametrize(
    ("candidates", "sizes"), [(1, [1]), (2, [2]), (3, [3, 1]), (7, [7, 3, 1]), (10, [10, 4, 2]), (27, [27, 9, 3, 1])]
)
def test_a_third_goes_on_until_two_are_left_at_most(candidates, sizes):
    assert rounds(candidates) == sizes


def test_no_candidate_is_refused():
    with pytest.raises(ValueError, match="there are 0 candidates"):
        rounds(0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), (" 0.5s ", 0.5)])
def test_a_time_has_its_unit(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "10 min", "ten min", "-3s", "0s", "1e3s", "5m", "infs", "nan", "3days"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="--budget must be a time such as 90s, 10min or"):
        read_duration(text)

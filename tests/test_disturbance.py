from __future__ import annotations

import os
import time
from dataclasses import astuple

import pytest

from meprop import disturbance
from meprop.disturbance import Disturbance, DisturbanceMeter, DisturbanceSum


@pytest.fixture
def seconds(monkeypatch):
    """Lets the system tell these: of all processors in all, idle, stolen, and in this process."""

    def tell(*each):
        told = iter(each)
        monkeypatch.setattr(disturbance, "_processor_seconds", lambda: next(told))

    return tell


def test_shares_come_from_the_differences(seconds):
    seconds((100.0, 50.0, 5.0, 20.0), (110.0, 52.0, 6.0, 24.0))
    assert DisturbanceMeter().read() == Disturbance(stolen=pytest.approx(0.1), others=pytest.approx(0.3))


def test_a_sum_leaves_out_what_is_between_its_parts(seconds):
    seconds((100, 50, 5, 20), (104, 51, 5, 22), (600, 70, 300, 22), (606, 71, 306, 22))
    total = DisturbanceSum()
    for _ in range(2):
        with total:
            pass
    assert total.seconds == [10, 2, 6, 2]
    assert total.read() == Disturbance(stolen=0.6, others=0.0)
    later = DisturbanceSum()
    later.seconds = total.seconds
    assert later.read() == total.read()


def test_nothing_is_said_where_the_system_does_not_tell(monkeypatch):
    def no_file(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(disturbance.Path, "read_text", no_file)
    total = DisturbanceSum()
    with total:
        pass
    assert total.read() is None
    assert DisturbanceMeter().read() is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs /proc/stat")
def test_this_system_tells():
    total = DisturbanceSum()
    with total:
        time.sleep(0.1)
    found = total.read()
    assert found is not None
    assert all(0 <= share <= 1 for share in astuple(found))

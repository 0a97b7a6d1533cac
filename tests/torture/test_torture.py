"""The short form of `make torture`."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from meprop import machine
from meprop.training.generators import Generators
from torture import torture


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", Figure.savefig)  # the harness replaces it


def test_what_is_killed_ends_as_undisturbed():
    found = torture.torture(15, 0, tuple(torture.COMMANDS))
    assert found["trials"] >= 3
    assert sum(found[fault] for fault in torture.FAULTS) >= 1


@pytest.mark.parametrize("broken", ["files", "random numbers"])
def test_the_harness_finds_what_is_broken(monkeypatch, broken):
    if broken == "files":
        monkeypatch.setattr(machine, "_UNFINISHED", machine.re.compile("nothing"))
    else:
        monkeypatch.setattr(Generators, "set_state", lambda generators, state: None)
    with pytest.raises(AssertionError):
        torture.torture(60, 0, ("train",))

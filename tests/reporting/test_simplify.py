"""Pictures of widths and activity."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

import torch
from matplotlib.figure import Figure

from meprop.reporting import simplify
from meprop.training.records import Run


def run(seed: int, last: int) -> Run:
    checks = [
        {"step": 5, "prunes": True, "widths": {"a": 30, "b": 20}},
        {"step": 10, "prunes": False, "widths": {"a": last, "b": 20}},
    ]
    return Run("simplified", seed, 1, {}, {}, {}, 20, 0.1, checks=checks)


@pytest.fixture
def made(monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(simplify, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    return figures


def test_the_widths_are_drawn_over_epochs(tmp_path, made):
    simplify.draw_widths([run(0, 30), run(1, 24)], {"a": 40, "b": 20}, 10, tmp_path / "widths.png")
    (axes,) = made[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 40], [0.5, 30], [1, 30], [1, 30]]
    assert axes.lines[1].get_xydata().tolist() == [[0, 40], [0.5, 30], [1, 24], [1, 24]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a: 40 to 27 ± 4", "b: 20 to 20 ± 0"]
    (grey,) = axes.patches
    assert (grey.get_x(), grey.get_width()) == (0, 0.5)


def test_the_activity_is_a_heat_map_of_each_layer(tmp_path, made):
    activity = {"a": torch.tensor([0.2, torch.nan, 0.7]), "b": torch.full((4,), torch.nan)}
    simplify.draw_activity(activity, tmp_path / "activity.png")
    first, second = made[0].axes[:2]
    assert first.images[0].get_array().filled(-1).flatten().tolist() == pytest.approx([0.7, 0.2, -1])
    assert first.get_title(loc="left") == "layer a: 2 of 3 units"
    assert second.images[0].get_array().mask.all()
    assert second.get_title(loc="left") == "layer b: 0 of 4 units"
    assert [path.name for path in tmp_path.iterdir()] == ["activity.png"]

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from meprop.reporting import figures
from meprop.reporting.figures import _value_limits, draw_runs
from meprop.reporting.terminal import run_table, verdict
from meprop.training.records import EpochRecord, Run, Seconds


def run(rule: str, seed: int = 0, accuracy: float = 97.0, backward: float = 4.0, density: float = 0.04) -> Run:
    curve = [
        asdict(EpochRecord(e, 0.3 / e, {"accuracy": accuracy - 1 / e}, {"accuracy": accuracy - 1 / e}, 7.0 * e))
        for e in (1, 2)
    ]
    metrics = {"accuracy": accuracy}
    seconds = asdict(Seconds(forward=2.0, backward=backward, optimizer=4.0, step=6.0 + backward))
    dense = rule == "dense"
    return Run(rule, seed, 2, metrics, metrics, seconds, None if dense else 20, 1.0 if dense else density, curve)


@pytest.mark.parametrize(
    "runs", [[run("random")], [run("topk")], [run("dense"), run("topk"), run("dense", 1), run("topk", 1)]]
)
def test_the_figure_is_a_png(tmp_path, runs):
    path = tmp_path / "curves.png"
    draw_runs(runs, "accuracy", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_the_figure_shows_the_dev_scores_over_epochs_and_over_time_and_the_seconds(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(figures, "Figure", lambda **options: made.append(Figure(**options)) or made[0])
    draw_runs([run("topk", accuracy=96.0, backward=3.0), run("dense")], "accuracy", tmp_path / "curves.png")
    by_epoch, by_time, bars = made[0].axes
    assert [line.get_xydata().tolist() for line in by_epoch.lines] == [[[1, 96], [2, 96.5]], [[1, 95], [2, 95.5]]]
    assert [line.get_xydata().tolist() for line in by_time.lines] == [[[7, 96], [14, 96.5]], [[7, 95], [14, 95.5]]]
    assert [bar.get_height() for bar in bars.patches] == [2, 2, 4, 3, 4, 4]  # each phase of dense, then of top-k


def test_a_small_difference_is_not_blown_up():
    low, high = _value_limits([run("dense", accuracy=97.0), run("topk", accuracy=97.0)], "accuracy")
    assert high - low >= 1.0
    assert low <= 96.0 < 96.5 <= high  # and every point is inside


def test_ratio_above_one_means_that_sparse_is_faster():
    text = verdict([run("dense", backward=4.0), run("topk", backward=2.0)], "accuracy")
    assert "Backward 2.00x" in text
    assert "sparse is faster" in text
    assert "slower" in verdict([run("dense", backward=2.0), run("topk", backward=4.0)], "accuracy")


def test_a_gap_of_one_seed_is_not_called_evidence():
    assert "one seed" in verdict([run("dense"), run("topk", accuracy=98.0)], "accuracy")


def test_gaps_are_paired_by_seed():
    # Seeds differ much, but sparse is lower by about 0.5 in each: that is more than chance.
    runs = [run("dense", s, 90.0 + s) for s in range(4)] + [run("topk", s, 89.5 + s + 0.01 * s) for s in range(4)]
    assert "0.48 points lower" in verdict(runs, "accuracy")
    assert "more than chance" in verdict(runs, "accuracy")
    noisy = [run("dense", s, 90.0) for s in range(2)] + [run("topk", s, 89.0 + 2.1 * s) for s in range(2)]
    assert "within what chance" in verdict(noisy, "accuracy")


def test_random_k_is_compared_as_top_k_is():
    runs = [run("dense", backward=4.0), run("random", accuracy=95.0, backward=2.0)]
    assert "Backward 2.00x" in verdict(runs, "accuracy")
    assert "2.00 points lower" in verdict(runs, "accuracy")
    assert run_table(runs, "accuracy").columns[-1].header == "ratio"


def test_nothing_sparse_is_said_and_not_called_a_comparison():
    assert "No layer was sparse" in verdict([run("dense"), run("topk", density=1.0)], "accuracy")


def test_the_table_shows_each_rule_and_k():
    from rich.console import Console

    console = Console(width=120, record=True, quiet=True)
    with console.capture():
        console.print(run_table([run("dense"), run("topk"), run("dense", 1), run("topk", 1)], "accuracy"))
    assert run_table([run("topk")], "accuracy").columns[-1].header == "topk"  # one rule: no ratio
    console = Console(width=120)
    with console.capture() as captured:
        console.print(run_table([run("dense"), replace(run("topk", backward=8.0), k=0.05)], "accuracy"))
    assert "0.50x" in captured.get()
    assert "0.05" in captured.get()

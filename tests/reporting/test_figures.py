from __future__ import annotations

from dataclasses import asdict, replace

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
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


@pytest.fixture
def made(monkeypatch):
    found: list[Figure] = []
    monkeypatch.setattr(figures, "Figure", lambda **options: found.append(Figure(**options)) or found[-1])
    return found


@pytest.mark.parametrize(
    ("runs", "lines", "labels"),
    [
        ([run("random")], 1, ["random"]),
        ([run("simplified"), run("topk"), run("dense")], 3, ["dense", "topk", "simplified"]),
        (
            [run("dense"), run("topk"), run("dense", 1, accuracy=95.0), run("topk", 1)],
            6,  # a thin one for each seed, a bold one for each mean
            ["dense, mean of 2 seeds", "topk, mean of 2 seeds"],
        ),
        ([run("a rule that is gone")], 1, ["a rule that is gone"]),
    ],
)
def test_each_kind_of_run_has_its_line_label_colour_and_bar(tmp_path, made, runs, lines, labels):
    draw_runs(runs, "accuracy", tmp_path / "curves.png")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    *curves, bars = made[0].axes
    for axes in curves:
        assert len(axes.lines) == lines
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        named = {line.get_label(): line for line in axes.lines}
        assert len({to_hex(named[label].get_color()) for label in labels}) == len(labels)
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())
        assert axes.get_ylabel().startswith("dev accuracy, %")
    kinds = [label.split(",")[0] for label in labels]
    assert [text.get_text() for text in bars.get_xticklabels()] == kinds
    assert [text.get_text() for text in bars.texts] == ["10.0 s"] * len(kinds)  # 2 + 4 + 4


def test_the_bold_line_is_the_mean_over_the_seeds(tmp_path, made):
    draw_runs([run("dense"), run("dense", 1, accuracy=95.0)], "accuracy", tmp_path / "curves.png")
    thin, other, bold = made[0].axes[0].lines
    assert [line.get_ydata()[-1] for line in (thin, other, bold)] == [96.5, 94.5, 95.5]
    assert bold.get_linewidth() > thin.get_linewidth()


def test_the_legend_of_the_bars_does_not_lie_on_them(tmp_path, made):
    draw_runs([run("dense"), run("topk", backward=3.0)], "accuracy", tmp_path / "curves.png")
    bars = made[0].axes[2]
    legend = bars.get_legend().get_window_extent()
    assert not any(legend.overlaps(bar.get_window_extent()) for bar in bars.patches)


def test_the_figure_shows_the_dev_scores_over_epochs_and_over_time_and_the_seconds(tmp_path, made):
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

    two_seeds = run_table([run("dense"), run("topk"), run("dense", 1, accuracy=95.0), run("topk", 1)], "accuracy")
    assert next(iter(two_seeds.columns[1].cells)) == "96.00 ± 1.41"  # of 97 and 95
    assert run_table([run("topk")], "accuracy").columns[-1].header == "topk"  # one rule: no ratio
    console = Console(width=120)
    with console.capture() as captured:
        console.print(run_table([run("dense"), replace(run("topk", backward=8.0), k=0.05)], "accuracy"))
    assert "0.50x" in captured.get()
    assert "0.05" in captured.get()
    by_gradient = run_table([run("dense"), replace(run("sampled"), k=None)], "accuracy")
    (row,) = (place for place, label in enumerate(by_gradient.columns[0].cells) if label == "k")
    assert [[*column.cells][row] for column in by_gradient.columns] == ["k", "all", "by gradient", ""]

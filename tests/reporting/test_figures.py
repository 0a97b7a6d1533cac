from __future__ import annotations

from dataclasses import asdict, replace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from meprop.reporting import figures
from meprop.reporting.figures import _value_limits, draw_runs
from meprop.reporting.terminal import run_table, verdict_line
from meprop.training.records import EpochRecord, Run, Seconds
from meprop.training.verdict import judge_all
from simulated import made as made_up
from simulated import simulated


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
    assert [text.get_text() for text in bars.get_yticklabels()] == kinds
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
    assert [bar.get_width() for bar in bars.patches] == [2, 2, 4, 3, 4, 4]  # each phase of dense, then of top-k


def test_a_small_difference_is_not_blown_up():
    low, high = _value_limits([run("dense", accuracy=97.0), run("topk", accuracy=97.0)], "accuracy")
    assert high - low >= 1.0
    assert low <= 96.0 < 96.5 <= high  # and every point is inside


def test_the_target_is_a_thin_dashed_line_inside_the_picture(tmp_path, made):
    draw_runs([run("dense"), run("topk")], "accuracy", tmp_path / "curves.png", target=94.2)
    for axes in made[0].axes[:2]:
        *_, line = axes.lines
        assert (set(line.get_ydata()), line.get_linestyle(), line.get_linewidth()) == ({94.2}, "--", 1)
        assert axes.get_legend().get_texts()[-1].get_text() == "target: 94.20"
        assert axes.get_ylim()[0] < 94.2


def test_the_bold_line_of_runs_of_different_epochs_goes_as_far_as_all_do(tmp_path, made):
    short = run("dense", 1)
    short = replace(short, epochs=1, curve=short.curve[:1])
    draw_runs([run("dense"), short], "accuracy", tmp_path / "curves.png")
    assert [len(line.get_xdata()) for line in made[0].axes[0].lines] == [2, 1, 1]


# ---------------------------------------------------------------- the terminal


def shown(runs, width=80, budget="epochs"):
    """Return the text of the table, and the lines of the verdicts."""
    from rich.console import Console

    verdicts, console = judge_all(runs, "accuracy", 0.2, budget), Console(width=width)
    with console.capture() as captured:
        console.print(run_table(runs, "accuracy", verdicts))
    return captured.get(), [verdict_line(verdict) for verdict in verdicts]


def row(text, label):
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return line


def test_the_table_has_a_row_for_each_figure_and_ratios_above_one_where_the_rule_is_faster():
    table, _ = shown([run("dense", backward=4.0), run("topk", backward=2.0)])
    labels = [line.partition(", ")[0] for line in table.splitlines() if ", " in line]
    rows = ["dev accuracy", "test accuracy", "time to 96.80", "whole step", "forward", "backward", "optimizer"]
    assert labels[:7] == rows
    assert row(table, "backward").split() == ["backward,", "s", "4.00", "2.00", "(2.00x)"]
    assert row(table, "density").split() == ["density", "100.0%", "4.0%"]
    assert row(table, "time to 96.80").split()[-2:] == ["never", "never"]  # 96.5 after the last epoch of the curve
    slower, _ = shown([run("dense", backward=2.0), run("topk", backward=8.0)])
    assert row(slower, "backward").endswith("8.00 (0.25x)")


def test_ratios_are_paired_by_seed():
    runs = [run("dense", s, backward=b) for s, b in enumerate((1.0, 8.0))]
    runs += [run("topk", s, backward=b) for s, b in enumerate((2.0, 4.0))]
    assert row(shown(runs)[0], "backward").endswith("3.00 (1.00x)")  # the geometric mean of 0.5 and 2


@pytest.mark.parametrize("count", [1, 3])
def test_the_table_of_three_rules_beside_dense_fits_into_80_columns(count):
    dense, sampled = simulated(np.random.default_rng(0), count)
    runs = [*dense, *(replace(each, rule=rule) for rule in ("sampled", "topk", "compensated") for each in sampled)]
    table, lines = shown(runs)
    assert "dense" in table.splitlines()[1]
    assert table.splitlines()[1].split() == ["dense", "sampled", "topk", "compensated"]
    assert all(len(row(table, f"{label}, s")) <= 80 for label in ("whole step", "forward", "backward", "optimizer"))
    assert row(table, "test accuracy, %").count(".") == 4 * min(count, 2)
    assert [line.split()[1] for line in lines] == ["sampled:", "topk:", "compensated:"]


def test_runs_of_equal_seconds_are_set_side_by_side_per_step():
    runs = [replace(run("dense"), steps=100), replace(run("topk"), steps=200)]
    table, _ = shown(runs, budget="seconds")
    assert "After 10.0 seconds of training each" in table
    assert row(table, "whole step, ms/step").split()[-3:] == ["100.0", "50.00", "(2.00x)"]


def test_runs_without_a_count_of_steps_are_set_side_by_side_per_epoch():
    table, _ = shown([run("dense"), replace(run("topk"), epochs=4)], budget="seconds")
    assert row(table, "whole step, s/epoch").split()[-3:] == ["5.00", "2.50", "(2.00x)"]


def test_the_times_to_the_target_say_how_many_seeds_reached_it():
    dense, sparse = simulated(np.random.default_rng(0), 2, spread=0.001)
    fallen = replace(sparse[1], curve=[{**each, "dev": {"accuracy": 90.0}} for each in sparse[1].curve])
    assert row(shown([*dense, *sparse])[0], "time to").endswith("x)")
    assert row(shown([*dense, sparse[0], fallen])[0], "time to").endswith("in 1 of 2 seeds")


def test_the_line_of_a_verdict_begins_with_the_word_and_what_decides():
    quick = [{"gains": [0.02, 0.04, 0.03], "ratios": [1.6, 1.7, 1.65]}, {"gains": [-11.0]}]
    (use,), (loss,) = ([*map(verdict_line, judge_all([*d, *s], "accuracy"))] for d, s in (made_up(**k) for k in quick))
    assert use.startswith("USE sampled: reaches 97.80 in 0.61 of dense's time [0.5")
    assert use.endswith("dev +0.03 [+0.01, +0.05] of margin 0.2, 3 seeds.")
    assert loss.startswith("DON'T sampled: loses 11.00 points of accuracy")


def test_the_table_shows_each_rule_and_k():
    two_seeds = run_table([run("dense"), run("topk"), run("dense", 1, accuracy=95.0), run("topk", 1)], "accuracy")
    assert next(iter(two_seeds.columns[1].cells)) == "96.00 ± 1.41"  # of 97 and 95
    table, _ = shown([run("dense"), replace(run("topk"), k=0.05), replace(run("sampled"), k=None, density=None)])
    assert row(table, "k").split() == ["k", "all", "0.05", "by", "gradient"]
    assert row(table, "density").split() == ["density", "100.0%", "4.0%", "by", "gradient"]
    alone, lines = shown([run("topk")])
    assert "x)" not in alone  # nothing to compare with
    assert lines == []


def test_many_kinds_of_runs_have_colours_of_their_own_and_one_legend(tmp_path, made):
    names = ["dense", "topk", "topk:k=0.1,scope=global", "sampled:noise=0.5", "dense:precision=bf16-mixed"]
    runs = [replace(run(name), steps=10 * index) for index, name in enumerate(names, start=1)]
    draw_runs(runs, "accuracy", tmp_path / "curves.png")
    by_epoch, by_time, bars = made[0].axes
    assert len({to_hex(line.get_color()) for line in by_epoch.lines}) == len(names)
    assert by_epoch.get_legend() is by_time.get_legend() is None
    (legend,) = made[0].legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert bars.get_xlabel() == "milliseconds of a step"  # they have different numbers of them
    assert [text.get_text() for text in bars.texts] == [f"{1000 / index:.1f} ms" for index in range(1, 6)]

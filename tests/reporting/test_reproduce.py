"""What is shown of an experiment: its table from fixed runs, the figure, the page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typeguard")

from matplotlib.figure import Figure

from meprop import experiments
from meprop.experiments import Records
from meprop.reporting import figures, pages
from meprop.reporting import reproduce as report
from meprop.training import tracking
from meprop.training.config import SimplifyConfig
from meprop.training.records import EpochRecord, Run, Seconds
from tiny import TinyConfig, TinyTask

TEXT = """
title = "A table"
seeds = [0, 1]
[task]
name = "tiny"
[variants.dense]
rule = "dense"
published = { epochs = 17, dev = 98.32, test = 97.82 }
[variants.topk-5]
rule = "topk"
k = 5
published = { test = 98.01, backprop = 21.4 }
[variants.topk-10]
rule = "topk"
k = 10
published = { test = 98.1 }
[variants.random-5]
rule = "random"
k = 5
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "table.toml").write_text(TEXT)
    return experiments.load(str(tmp_path / "table.toml"), {"tiny": TinyConfig})


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "results" / "table")


def run(seed, epochs, backward, density=1.0):
    """A run whose epochs have these (dev, test) accuracies."""
    curve = [
        asdict(EpochRecord(number, 0.1, {"accuracy": dev}, {"accuracy": test}, 1.0))
        for number, (dev, test) in enumerate(epochs, start=1)
    ]
    seconds = asdict(Seconds(forward=2.0, backward=backward, optimizer=1.0, step=3.0 + backward))
    return Run("", seed, len(epochs), curve[-1]["dev"], curve[-1]["test"], seconds, None, density, curve)


@pytest.fixture
def filled(experiment, records):
    """Both seeds of dense and topk-5, one of topk-10 that was run alone, none of random-5."""

    def write(name, seed, epochs, backward, beside, density=1.0):
        records.write(experiment.variant(name), run(seed, epochs, backward, density), TinyTask(), beside)

    write("dense", 0, [(90, 80), (95, 91), (94, 99)], 8.0, ["topk-5"])
    write("dense", 1, [(92, 93), (91, 70), (91, 71)], 8.0, ["topk-5"])
    write("topk-5", 0, [(90, 80), (91, 81), (96, 92)], 2.0, ["dense"], 0.01)
    write("topk-5", 1, [(90, 93.5), (89, 81), (90, 92)], 2.0, ["dense"], 0.01)
    write("topk-10", 0, [(90, 90), (89, 81), (88, 82)], 4.0, [], 0.02)
    return records


def cells(experiment, records):
    head, *rows = report._cells(report._rows(experiment, records))
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_scores_are_those_of_the_epoch_that_dev_selects_beside_those_of_the_last(experiment, filled):
    dense = cells(experiment, filled)["dense"]
    assert dense["test"] == "92.00 ± 1.41"  # of 91 and 93
    assert dense["dev"] == "93.50 ± 2.12"
    assert dense["epoch"] == "1.5"
    assert dense["test, last epoch"] == "85.00 ± 19.80"  # of 99 and 71


def test_a_simplified_run_is_judged_with_its_last_widths(experiment, filled):
    of_seed = run(0, [(96, 92), (94, 91), (95, 90)], 2.0)
    for epoch, width in zip(of_seed.curve, (500, 60, 60), strict=True):
        epoch["widths"] = {"0": width, "3": width + 40}
    filled.write(experiment.variant("random-5"), of_seed, TinyTask(), [])
    shown = cells(experiment, filled)
    assert (shown["random-5"]["dev"], shown["random-5"]["test"], shown["random-5"]["width"]) == (
        "95.00",
        "90.00",
        "80.0",
    )
    assert shown["dense"]["width"] == ""


def test_differences_are_paired_by_seed(experiment, filled):
    shown = cells(experiment, filled)
    assert shown["topk-5"]["to dense"] == "+0.75 ± 0.35"  # 92 - 91 and 93.5 - 93
    assert shown["topk-10"]["to dense"] == "-1.00"  # 90 - 91: the seed that both have
    assert shown["dense"]["to dense"] == ""


def test_ratios_are_of_runs_that_were_trained_in_turns(experiment, filled):
    shown = cells(experiment, filled)
    assert shown["topk-5"]["backward, s"] == "2.0 (4.00x)"
    assert shown["topk-5"]["forward + backward, s"] == "4.0 (2.50x)"
    assert shown["topk-5"]["whole step, s"] == "5.0 (2.20x)"
    assert shown["topk-10"]["backward, s"] == "4.0"
    assert shown["dense"]["backward, s"] == "8.0"


def test_a_run_that_was_repeated_alone_is_compared_in_seconds_with_none(experiment, filled):
    for seed in (0, 1):
        filled.write(experiment.variant("dense"), run(seed, [(90, 80)], 8.0), TinyTask(), [])
    shown = cells(experiment, filled)["topk-5"]
    assert shown["backward, s"] == "2.0"
    assert shown["to dense"] != ""


def test_a_difference_is_named_after_the_run_that_it_is_to(experiment, filled, tmp_path):
    text = TEXT.replace("k = 10", 'k = 10\nagainst = "topk-5"')
    (tmp_path / "table.toml").write_text(text)
    shown = cells(experiments.load(str(tmp_path / "table.toml"), {"tiny": TinyConfig}), filled)
    assert (shown["topk-5"]["to dense"], shown["topk-5"]["to topk-5"]) == ("+0.75 ± 0.35", "")
    assert (shown["topk-10"]["to dense"], shown["topk-10"]["to topk-5"]) == ("", "-2.00")
    assert shown["topk-10"]["paper: to topk-5"] == "+0.09"


def test_what_was_not_run_is_said_and_the_paper_is_beside_it(experiment, filled):
    shown = cells(experiment, filled)
    assert shown["random-5"]["test"] == "not run"
    assert (shown["dense"]["paper: epoch"], shown["dense"]["paper: dev"]) == ("17", "98.32")
    assert (shown["topk-5"]["paper: test"], shown["topk-5"]["paper: to dense"]) == ("98.01", "+0.19")
    assert shown["topk-5"]["paper: back-prop"] == "21.4x"
    assert "paper: overall" not in shown["dense"]  # the paper says it of none


def test_an_experiment_without_runs_shows_what_the_paper_has(experiment, records):
    shown = report.table(experiment, records)
    assert shown.count("not run") == 4
    assert "98.01" in shown
    assert "Not run yet: meprop reproduce table" in shown


def test_runs_of_other_settings_are_not_shown(experiment, filled, tmp_path):
    (tmp_path / "table.toml").write_text(TEXT.replace("k = 5", "k = 6", 1))
    changed = experiments.load(str(tmp_path / "table.toml"), {"tiny": TinyConfig})
    assert cells(changed, filled)["topk-5"]["test"] == "not run"


def change(path, **parts):
    content = tracking.read_content(path)
    for name, value in parts.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def test_the_conditions_are_a_line_for_each_place_and_commit_and_data(experiment, filled):
    *_, line = report.table(experiment, filled).splitlines()
    assert line.startswith("- ")
    place = {"cpu": "A CPU", "gpu": "A GPU", "threads": 2}
    paths = sorted(filled.folder.glob("*.json"))
    for path in paths:
        change(path, machine=place, versions={"torch": "2", "meprop": "1"}, commit="0123456789abcdef-dirty")
    about = "threads: 2; torch 2, meprop 1, commit 0123456789ab-dirty; data 1a2b3c."
    assert report.table(experiment, filled).endswith(f"\n\n- A GPU, {about}")
    change(paths[0], machine={"threads": 1})
    assert report.table(experiment, filled).endswith(f"\n\n- A GPU, {about.replace('2;', '1;')}\n- A GPU, {about}")


def test_no_gpu_is_named_of_a_run_on_the_cpu(experiment, filled):
    cpu = replace(
        experiment,
        variants=tuple(replace(v, training=replace(v.training, accelerator="cpu")) for v in experiment.variants),
    )
    filled.write(cpu.variant("dense"), run(0, [(90, 80)], 8.0), TinyTask(), [])
    change(filled.path(cpu.variant("dense"), 0), machine={"cpu": "A CPU", "gpu": "A GPU"})
    assert "A CPU, threads" in report.table(cpu, filled)
    assert "A GPU" not in report.table(cpu, filled)


@pytest.mark.parametrize(
    ("commit", "shown"),
    [(None, "unknown"), ("0123456789abcdef", "0123456789ab"), ("0123456789abcdef-dirty", "0123456789ab-dirty")],
)
def test_of_a_commit_the_hash_alone_is_shortened(commit, shown):
    assert pages.short_commit(commit) == f"commit {shown}"


def test_the_figure_is_drawn_of_two_densities_or_more(experiment, filled, records, tmp_path):
    path = tmp_path / "figure.png"
    assert report.draw_densities(experiment, filled, path)
    assert path.exists()
    for seed in (0, 1):
        records.path(experiment.variant("topk-5"), seed).unlink()
    path.unlink()
    assert not report.draw_densities(experiment, filled, path)
    assert not path.exists()


def test_the_figures_points_are_the_scores_over_density_ours_and_the_papers(experiment, filled, tmp_path, monkeypatch):
    figures, make = [], report._densities
    monkeypatch.setattr(report, "_densities", lambda *parts: figures.append(make(*parts)) or figures[0])
    assert report.draw_densities(experiment, filled, tmp_path / "figure.png")
    (axes,) = figures[0].axes
    found = {tuple(zip(line.get_xdata(), map(float, line.get_ydata()), strict=True)) for line in axes.lines}
    assert ((0.01, 92.75), (0.02, 90.0)) in found  # top-k, ours: mean over seeds
    assert ((0.01, 98.01), (0.02, 98.1)) in found  # and the paper's
    assert ((1, 92.0),) in found
    assert ((1, 97.82),) in found  # dense
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["dense", "the paper's", "top-k"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1%", "2%", "100%"]


def test_curves_of_several_rules_have_looks_and_labels_of_their_own(experiment, filled, tmp_path, monkeypatch):
    for density in (0.01, 0.02):
        name = f"random-{density}"
        variant = replace(experiment.variant("random-5"), name=name)
        experiment = replace(experiment, variants=(*experiment.variants, variant))
        filled.write(variant, run(0, [(80, 70)], 8.0, density), TinyTask(), [])
    made = []
    monkeypatch.setattr(report, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    assert report.draw_densities(experiment, filled, tmp_path / "figure.png")
    lines = {each.get_label(): each.lines[0] for each in made[0].axes[0].containers}
    for label, points in (("top-k", [92.75, 90.0]), ("random-k", [70.0, 70.0])):
        assert lines[label].get_ydata().tolist() == points
    assert lines["top-k"].get_marker() != lines["random-k"].get_marker()
    assert lines["top-k"].get_color() != lines["random-k"].get_color()


def test_scores_over_dense_s_time_and_densities_are_drawn_where_a_density_follows_the_gradient(
    experiment, filled, tmp_path, monkeypatch
):
    path = tmp_path / "figure.png"
    assert not report.draw_times(experiment, filled, path)
    assert not path.exists()
    base = experiment.variant("topk-5")
    variant = replace(base, name="noise", rule="sampled", training=replace(base.training, k=None, noise=0.25))
    experiment = replace(experiment, variants=(*experiment.variants, variant))
    drawn = run(0, [(90, 80), (94, 81)], 2.0)
    for record, seconds, density in zip(drawn.curve, (1.1, 5.5), (0.1, 0.02), strict=True):
        record["seconds"], record["density"] = seconds, density
    filled.write(variant, drawn, TinyTask(), ["dense"])
    assert not report.draw_times(experiment, filled, path)  # the dense run was trained at another time
    assert not path.exists()
    filled.write(experiment.variant("dense"), run(0, [(90, 80)] * 3, 8.0), TinyTask(), ["topk-5", "noise"])
    made = []
    monkeypatch.setattr(figures, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    assert report.draw_times(experiment, filled, path)
    assert path.exists()
    quality, density = made[0].axes
    lines = {line.get_label().partition(",")[0]: line for line in quality.lines}
    assert set(lines) == {"dense", "topk-5", "noise"}  # the run of topk-10 was trained alone
    assert lines["noise"].get_xdata() == pytest.approx([0.1, 0.5])  # dense took 11 seconds
    assert lines["noise"].get_ydata() == pytest.approx([90, 94])
    (kept,) = density.lines
    assert kept.get_ydata() == pytest.approx([10, 2])


def test_no_figure_over_density_if_the_models_differ_too(experiment, filled, tmp_path):
    *others, last = experiment.variants
    wider = replace(last, task=replace(last.task, hidden=(130,)))
    mixed = replace(experiment, variants=(*others, wider))
    assert not report.draw_densities(mixed, filled, tmp_path / "figure.png")


def test_the_page_keeps_what_was_written_by_hand(experiment, filled, tmp_path):
    page = tmp_path / "paper.md"
    begin, end = "<!-- reproduce table: begin -->", "<!-- reproduce table: end -->"
    page.write_text(f"# Paper\n\nBefore.\n\n{begin}\nold\n{end}\n\nAfter.\n")
    assert report.experiments_of(page) == ["table"]
    for _ in range(2):  # writing again changes nothing
        report.write_page(page, [(experiment, filled)])
        text = page.read_text()
        assert text.startswith(f"# Paper\n\nBefore.\n\n{begin}\n")
        assert text.endswith(f"\n{end}\n\nAfter.\n")
        assert "old" not in text
        assert text.count("| topk-5 | 1.0% | 2 |") == 1
    assert "![A table](paper-table.png)" in text
    assert (tmp_path / "paper-table.png").exists()


@pytest.mark.parametrize("text", ["", "<!-- reproduce table: begin -->", "<!-- bench linear: begin -->"])
def test_a_page_without_sections_is_refused(tmp_path, text):
    (tmp_path / "paper.md").write_text(text)
    with pytest.raises(ValueError, match=r"paper\.md: there must be such a file, with the lines <!-- reproduce "):
        report.experiments_of(tmp_path / "paper.md")


def test_a_simplified_run_is_no_point_of_the_curve(experiment, filled, tmp_path):
    variants = tuple(
        replace(variant, simplify=SimplifyConfig()) if variant.name == "topk-10" else variant
        for variant in experiment.variants
    )
    simplified = replace(experiment, variants=variants)
    filled.write(simplified.variant("topk-10"), run(0, [(90, 90)], 4.0, 0.3), TinyTask(), [])
    assert not report.draw_densities(simplified, filled, tmp_path / "figure.png")


def test_a_run_with_dense_phases_is_no_point_of_the_curve(experiment, filled, tmp_path):
    variants = tuple(
        replace(variant, training=replace(variant.training, dense_end_steps=3))
        if variant.name == "topk-10"
        else variant
        for variant in experiment.variants
    )
    scheduled = replace(experiment, variants=variants)
    filled.write(scheduled.variant("topk-10"), run(0, [(90, 90)], 4.0, 0.3), TinyTask(), [])
    assert not report.draw_densities(scheduled, filled, tmp_path / "figure.png")

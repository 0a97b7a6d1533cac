"""A rule with a name is known everywhere by its definition alone: here one that only these tests have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from meprop import cli, experiments, ops
from meprop.experiments import Records
from meprop.reporting import figures
from meprop.reporting import reproduce as report
from meprop.rules import Rule, TopK, named
from meprop.rules.base import unregister
from meprop.training import tasks
from meprop.training.config import TrainingConfig
from tiny import TinyConfig, TinyTask

OPTIONS = ["--epochs", "1", "--k", "6", "--accelerator", "cpu"]


@pytest.fixture
def toy():
    """The 2 entries more than k of each row that are largest."""

    @dataclass(frozen=True)
    class Toy(Rule):
        k: int | float
        scope: str = "example"

        name: ClassVar[str] = "toy"
        label: ClassVar[str] = "k and two"
        color: ClassVar[str] = "#123456"
        marker: ClassVar[str] = "*"

        def count(self, features):
            return min(int(self.k) + 2, features)

        def select(self, grad_output_NO):
            return ops.topk_rows(grad_output_NO, self.count(grad_output_NO.shape[1]))

    yield Toy
    if named().get("toy") is Toy:
        unregister(Toy)
    assert "toy" not in named()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, threads):
    torch.set_num_threads(1)  # so little work is slowed by a second thread that must wait for a busy core
    entry = tasks.TaskEntry(TinyConfig, TinyTask, lambda folder: None, str, TrainingConfig(k=5))
    monkeypatch.setattr(tasks, "table", lambda: {"tiny": entry})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made."""
    made: list[Figure] = []

    def figure(**options):
        made.append(Figure(**options))
        return made[-1]

    monkeypatch.setattr(figures, "Figure", figure)
    monkeypatch.setattr(report, "Figure", figure)
    return made


def test_the_command_line_offers_it_and_no_longer_once_it_is_gone(toy, capsys):
    for command in ("train", "compare", "simplify"):
        assert cli.main([command, "tiny", "--help"]) == 0
        assert "toy: k and two" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    unregister(toy)
    assert cli.main(["train", "tiny", "--help"]) == 0
    assert "toy" not in capsys.readouterr().out
    assert cli.main(["train", "tiny", "--rule", "toy"]) == 2


def test_the_loop_trains_with_it_and_tables_and_figures_show_it(toy, drawn, capsys):
    assert cli.main(["compare", "tiny", "--rule", "toy", *OPTIONS]) == 0
    dense, sparse = json.loads(Path("runs/compare-tiny/result.json").read_text())["runs"]
    assert (dense["rule"], sparse["rule"], sparse["k"]) == ("dense", "toy", 6)
    assert sparse["density"] == 8 / 128  # two more than k
    shown = capsys.readouterr()
    assert "toy k=6, seed 0: epoch 1/1" in shown.err
    assert "6.2%" in shown.out
    by_epoch = drawn[0].axes[0]
    assert {line.get_label(): to_hex(line.get_color()) for line in by_epoch.lines}["toy"] == "#123456"


def test_experiments_run_it_and_draw_it_over_density(toy, drawn, capsys):
    variants = "".join(f'[variants.toy-{k}]\nrule = "toy"\nk = {k}\n' for k in (5, 9))
    text = f'title = "Toys"\nseeds = [0]\n[task]\nname = "tiny"\n[training]\nepochs = 1\n{variants}'
    Path("toys.toml").write_text(text)
    assert cli.main(["reproduce", "toys.toml", "--out", "results"]) == 0
    (axes,) = drawn[-1].axes
    (curve,) = (each for each in axes.containers if each.get_label() == "k and two")
    line = curve.lines[0]
    assert (to_hex(line.get_color()), line.get_marker()) == ("#123456", "*")
    assert line.get_xdata().tolist() == [7 / 128, 11 / 128]

    experiment = experiments.load("toys.toml", {"tiny": TinyConfig})
    unregister(toy)
    records = Records(Path("results/toys"))  # an old result of a rule that is gone
    assert report.draw_densities(experiment, records, Path("figure.png"))
    (curve,) = (each for each in drawn[-1].axes[0].containers if each.get_label() == "toy")
    assert curve.lines[0].get_xdata().tolist() == [7 / 128, 11 / 128]
    assert "toy-5" in report.table(experiment, records)
    with pytest.raises(ValueError, match=r"rule is 'toy'; it must be .*'topk'"):
        experiments.load("toys.toml", {"tiny": TinyConfig})


def test_a_rule_that_does_not_say_how_much_it_keeps_has_no_density(toy, tmp_path):
    from dataclasses import replace

    from meprop.reporting.terminal import run_table
    from meprop.training.loop import Trainer, fit

    config = TrainingConfig(epochs=1, k=5, accelerator="cpu")
    (run,) = fit([Trainer(TinyTask(), config, config.rule("toy"), 0)], lambda trainer: None)
    unknown = replace(run, density=None)
    assert list(run_table([unknown], "accuracy").columns[1].cells)[-1] == "by gradient"


def test_an_unknown_rule_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"rule is 'toy'; the rules are .*topk"):
        TrainingConfig().rule("toy")


def test_a_subclass_without_a_name_of_its_own_leaves_that_of_its_base():
    class Another(TopK):
        pass

    with pytest.raises(KeyError, match="Another is no named rule"):
        unregister(Another)
    assert named()["topk"] is TopK

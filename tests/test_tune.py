"""The search for the rule that pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

from interrupted import Stop, write_mnist
from meprop import cli
from meprop.training import loop

pytestmark = pytest.mark.usefixtures("no_drawing")
RULES = ["topk:k=5", "topk:k=100", "random:k=1", "sampled:noise=0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("data"), 60, packed=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that the machine does not disturb: each time that it is read, a millisecond has passed."""
    now = [0.0]

    def read():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(loop, "perf_counter", read)


def tune(data, *options):
    small = ["--hidden", "128", "--dev-size", "20", "--accelerator", "cpu", "--epochs", "2"]
    return cli.main(["tune", "mnist", "--data-dir", str(data), *small, "--budget", "2s", *options])


def answer(folder="runs/tune-mnist"):
    return json.loads(Path(folder, "result.json").read_text())


def test_the_best_go_on_and_the_last_is_confirmed_with_other_seeds(data, capsys):
    assert tune(data, "--rule", *RULES, "--margin", "90") == 0
    found = answer()
    first, second = found["rounds"]
    assert set(first["scores"]) == {"dense", *RULES}
    assert list(first["scores"].values()) == sorted(first["scores"].values(), reverse=True)
    assert first["seconds"] == pytest.approx(2 / 2 / 2 / 5)  # half of the budget, two rounds, five runs
    left = [name for name in first["scores"] if name != "dense"][:2]
    assert set(second["scores"]) == {"dense", *left}
    assert found["winner"] == next(name for name in second["scores"] if name != "dense")
    assert found["verdict"]["rule"] == found["winner"]
    assert found["verdict"]["seeds"] == [1, 2, 3]  # the search had 0
    assert found["verdict"]["budget"] == "seconds"
    confirmed = json.loads(Path("runs/tune-mnist/confirm/result.json").read_text())
    assert {(run["rule"], run["seed"]) for run in confirmed["runs"]} == {
        (name, seed) for name in ("dense", found["winner"]) for seed in (1, 2, 3)
    }
    shown = capsys.readouterr().out
    assert "round 2, " in shown
    assert f" {found['winner']}: " in shown
    assert (found["line"] or "Leave it dense.") in shown


def test_no_run_is_longer_than_dense_training(data):
    assert tune(data, "--rule", *RULES[:1], "--margin", "90", "--budget", "4s") == 0
    found = answer()
    assert found["rounds"][0]["seconds"] == pytest.approx(1.0)
    confirmed = json.loads(Path("runs/tune-mnist/confirm/result.json").read_text())
    steps = [run["steps"] for run in confirmed["runs"] if run["rule"] == "dense"]
    assert steps == pytest.approx([2 * 4] * 3, abs=1)  # two epochs of 40 examples in batches of 10, not a second


def test_the_line_has_what_convert_takes():
    from meprop.cli.tune import _line
    from meprop.training.choices import read_choices
    from meprop.training.config import TrainingConfig

    _, choice = read_choices(["sampled:noise=0.5,compute_dtype=bfloat16,fuse=true"], TrainingConfig())
    expected = (
        'meprop.convert(model, meprop.Sampled(noise=0.5), compute_dtype=torch.bfloat16, when="always", fuse=True)'
    )
    assert _line(choice) == f"{expected}  # sampled:noise=0.5,compute_dtype=bfloat16,fuse=True"


def test_a_loser_is_not_confirmed(data, monkeypatch, capsys):
    from meprop.cli import tune as command

    scores = {"dense": 97.0, "topk:k=5": 96.0, "topk:k=100": 95.0}
    monkeypatch.setattr(command, "_scores", lambda runs, metric: scores)
    assert tune(data, "--rule", *RULES[:2]) == 0
    found = answer()
    assert (found["winner"], found["verdict"], found["line"]) == ("topk:k=5", None, "")
    assert (
        "Leave it dense: the best, topk:k=5, has 96.00 in the time in which dense has 97.00." in capsys.readouterr().out
    )
    assert not Path("runs/tune-mnist/confirm").exists()


def test_what_was_stopped_goes_on(data, monkeypatch, capsys):
    with monkeypatch.context() as stopped:
        Stop(stopped, 12)  # in the second round
        assert tune(data, "--rule", *RULES, "--margin", "90") == 130
    first = Path("runs/tune-mnist/round-1/result.json").read_text()
    assert not Path("runs/tune-mnist/result.json").exists()
    assert tune(data, "--rule", *RULES, "--margin", "90") == 2
    assert "exists; give another --out" in capsys.readouterr().err
    assert tune(data, "--rule", *RULES, "--margin", "90", "--resume") == 0
    assert Path("runs/tune-mnist/round-1/result.json").read_text() == first
    assert len(answer()["rounds"]) == 2
    assert tune(data, "--rule", *RULES[1:], "--margin", "90", "--overwrite") == 0
    assert set(answer()["rounds"][0]["scores"]) == {"dense", *RULES[1:]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "ten"], "--budget must be a time"),
        (["--margin", "0"], "--margin must be a positive number"),
        (["--seeds", "0", "1", "2"], "--seeds: the first one searches, and 3 or more others confirm"),
        (["--budget-seconds", "3"], "--budget-seconds: the seconds of each run follow from --budget"),
        (["--rule", "topk:k=0.1", "topj"], "--rule topj: the rules are"),
    ],
)
def test_wrong_requests_end_in_one_line(data, capsys, options, message):
    assert tune(data, *options) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not Path("runs").exists()


def test_a_report_of_a_search_names_its_comparisons(data, capsys):
    assert tune(data, "--rule", *RULES[:1], "--margin", "90") == 0
    assert cli.main(["report", "runs/tune-mnist"]) == 1
    assert "it is of meprop tune: give its folder confirm" in capsys.readouterr().err
    assert cli.main(["report", "runs/tune-mnist/confirm"]) == 0

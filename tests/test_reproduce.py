"""The command `meprop reproduce`: what is run, resumed, refused and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

from filelock import FileLock

import meprop
from interrupted import Stop
from meprop import cli, experiments
from meprop.experiments import Records
from meprop.training import checkpoint, tasks, tracking
from meprop.training.config import TrainingConfig
from tiny import TinyConfig, TinyTask

pytestmark = pytest.mark.usefixtures("no_drawing")
TEXT = """
title = "A small one"
seeds = [0, 1]
[task]
name = "tiny"
[training]
epochs = 2
accelerator = "cpu"
[variants.dense]
rule = "dense"
published = { test = 97.82 }
[variants.topk-5]
rule = "topk"
k = 5
[variants.deep]
rule = "dense"
task.hidden = [128, 128]
[variants.random-5]
rule = "random"
k = 5
task.hidden = [128, 128]
"""
NAMES = [f"{name}-seed{seed}.json" for name in ("deep", "dense", "random-5", "topk-5") for seed in (0, 1)]


@pytest.fixture(autouse=True)
def built(monkeypatch, tmp_path, threads):
    """The configs that the task was built with, in a folder with the experiment."""
    torch.set_num_threads(1)  # so little work is slowed by a second thread that must wait for a busy core
    found: list[TinyConfig] = []

    def build(config):
        found.append(config)
        return TinyTask(config)

    entry = tasks.TaskEntry(TinyConfig, build, lambda folder: None, str, TrainingConfig())
    monkeypatch.setattr(tasks, "table", lambda: {"tiny": entry})
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(TEXT)
    return found


def reproduce(*options, out="results"):
    return cli.main(["reproduce", "small.toml", "--out", out, *options])


def files(out="results"):
    names = (path.name for path in (Path(out) / "small").iterdir())
    return sorted(name for name in names if name != ".lock" and "-before" not in name)


def outcomes(out="results"):
    """All but the seconds, by file."""
    found = {}
    for name in files(out):
        (run,) = json.loads((Path(out) / "small" / name).read_text())["runs"]
        found[name] = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in run["curve"]]
    return found


def record(name):
    return json.loads(Path(f"results/small/{name}-seed0.json").read_text())


def test_every_variant_is_run_with_every_seed_and_shown(built, capsys):
    assert reproduce() == 0
    assert files() == sorted(NAMES)
    content = json.loads(Path("results/small/random-5-seed1.json").read_text())
    assert set(content) == {"task", "config", "machine", "versions", "commit", "runs", "sha256"}
    assert content["config"]["settings"]["hidden"] == [128, 128]
    assert content["config"]["beside"] == ["deep"]
    assert [(run["rule"], run["seed"], run["k"]) for run in content["runs"]] == [("random", 1, 5)]
    shown = capsys.readouterr().out
    for text in ("A small one", "random-5", "97.82", "±", "percent, after the epoch with the best dev score"):
        assert text in shown
    assert built == [TinyConfig(), TinyConfig(hidden=(128, 128))]  # data are read once for each setting of the task


def test_finished_runs_are_not_repeated(built, monkeypatch, capsys):
    assert reproduce("--seeds", "1") == 0
    before = {name: Path("results/small", name).stat().st_mtime_ns for name in files()}
    assert len(before) == 4
    built.clear()
    assert reproduce("--seeds", "1") == 0
    assert not built  # not even the data are read
    assert "A small one" in capsys.readouterr().out
    Path("results/small/topk-5-seed1.json").unlink()
    assert reproduce("--seeds", "1") == 0
    after = {name: Path("results/small", name).stat().st_mtime_ns for name in files()}
    assert [name for name in after if after[name] != before[name]] == ["topk-5-seed1.json"]
    alone = json.loads(Path("results/small/topk-5-seed1.json").read_text())
    assert alone["config"]["beside"] == []  # so its seconds are compared with nothing


@pytest.mark.parametrize("saves", [1, 2, 3, 4, 5, 8])
def test_an_interrupted_experiment_ends_as_an_uninterrupted_one(monkeypatch, capsys, saves):
    assert reproduce(out="whole") == 0
    with monkeypatch.context() as patch:
        Stop(patch, saves)
        assert reproduce() == 130
    assert "the same command continues" in capsys.readouterr().err
    assert any(name.endswith(".pt") for name in files())
    assert reproduce() == 0
    assert files() == sorted(NAMES)  # and no checkpoint is left
    assert outcomes() == outcomes("whole")
    assert json.loads(Path("results/small/topk-5-seed0.json").read_text())["config"]["beside"] == ["dense"]


@pytest.mark.parametrize("records", [0, 1])
def test_a_kill_among_the_records_of_a_group_loses_nothing(monkeypatch, records):
    assert reproduce("--seeds", "0", out="whole") == 0
    write, left = Records.write, [records]

    def write_or_die(*arguments):
        if not left[0]:
            raise SystemExit(9)
        left[0] -= 1
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "write", write_or_die)
        assert reproduce("--seeds", "0") == 9
    assert files() == [["dense-seed0.pt", "topk-5-seed0.pt"], ["dense-seed0.json", "topk-5-seed0.pt"]][records]
    assert reproduce("--seeds", "0") == 0
    assert files() == [name for name in sorted(NAMES) if "seed0" in name]
    assert outcomes() == outcomes("whole")
    for name, other in (("dense", "topk-5"), ("topk-5", "dense")):
        assert record(name)["config"]["beside"] == [other]


def test_a_checkpoint_of_a_finished_run_is_deleted(monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce() == 130
    stale = Path("results/small/dense-seed0.pt").read_bytes()
    assert reproduce() == 0
    Path("results/small/dense-seed0.pt").write_bytes(stale)
    assert reproduce() == 0
    assert files() == sorted(NAMES)


def test_a_run_that_goes_on_alone_is_compared_in_seconds_with_none(monkeypatch):
    assert reproduce("--seeds", "0", out="whole") == 0
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce("--seeds", "0") == 130
    Path("results/small/dense-seed0.json").write_bytes(Path("whole/small/dense-seed0.json").read_bytes())
    assert reproduce("--seeds", "0") == 0
    assert record("topk-5")["config"]["beside"] == []


def test_other_data_are_refused_and_replaced_on_request(monkeypatch, capsys):
    assert reproduce("--seeds", "0") == 0
    monkeypatch.setattr(TinyTask, "fingerprint", "another")
    before = outcomes()
    assert reproduce("--seeds", "0", "1") == 2
    assert "-seed0.json was made with other settings (data was '1a2b3c', now 'another')" in capsys.readouterr().err
    assert outcomes() == before
    assert reproduce("--seeds", "0", "1", "--overwrite") == 0
    assert record("dense")["config"]["settings"]["data"] == "another"


def test_a_checkpoint_of_other_data_is_refused(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce() == 130
    monkeypatch.setattr(TinyTask, "fingerprint", "another")
    assert reproduce() == 2
    assert "dense-seed0.pt belongs to a run with other settings (data was '1a2b3c'" in capsys.readouterr().err


def test_a_variant_that_diverges_does_not_stop_the_others(monkeypatch, capsys):
    loss = TinyTask.loss

    def diverging(task, model, batch):
        sparse = isinstance(model[0], meprop.nn.Linear) and model[0].rule == meprop.TopK(5)
        return loss(task, model, batch) * (float("nan") if sparse else 1)

    assert reproduce("--seeds", "0", out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(TinyTask, "loss", diverging)
        assert reproduce("--seeds", "0") == 1
    assert files() == [name for name in sorted(NAMES) if "seed0" in name and "topk" not in name]
    shown = capsys.readouterr()
    assert "A small one" in shown.out
    last = shown.err.splitlines()[-1]
    assert last.startswith("meprop: error: not finished: topk-5 of small: the loss became nan in epoch 1, step 1 ")
    assert "[training] lr" in last
    assert outcomes() == {name: run for name, run in outcomes("whole").items() if "topk" not in name}
    assert record("dense")["config"]["beside"] == []


def test_two_processes_do_not_share_a_folder(built, capsys):
    folder = Path("results/small")
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert reproduce() == 1
    shown = capsys.readouterr().err
    assert "results/small: another meprop command is at work there; wait for it, or give another --out" in shown
    assert shown.count("\n") == 1
    assert not built
    assert reproduce("--seeds", "0") == 0


def test_the_commit_is_read_before_anything_else(monkeypatch):
    def commit():
        raise ValueError("read")

    monkeypatch.setattr(tracking, "commit", commit)
    monkeypatch.setattr(experiments, "load", lambda name, tasks: pytest.fail("too late"))
    assert reproduce() == 70


def test_a_group_is_saved_together_so_that_it_continues_side_by_side(monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce() == 130
    states = [checkpoint.read(Path(f"results/small/{name}-seed0.pt"))["state"] for name in ("dense", "topk-5")]
    assert [(len(state["curve"]), state["step"]) for state in states] == [(1, 0), (1, 0)]


def test_runs_of_other_settings_are_refused_and_replaced_on_request(capsys):
    assert reproduce("--seeds", "0") == 0
    before = outcomes()
    Path("small.toml").write_text(TEXT.replace("k = 5\ntask", "k = 6\ntask"))
    assert reproduce() == 2
    shown = capsys.readouterr().err
    assert "random-5-seed0.json was made with other settings (k was 5, now 6)" in shown
    assert "--overwrite" in shown
    assert outcomes() == before
    assert reproduce("--seeds", "0", "--overwrite") == 0
    after = outcomes()
    assert [name for name in after if after[name] != before[name]] == ["random-5-seed0.json"]


def test_a_checkpoint_of_other_settings_is_refused_and_replaced_on_request(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce() == 130
    Path("small.toml").write_text(TEXT.replace("epochs = 2", "epochs = 1"))
    assert reproduce() == 2
    assert "dense-seed0.pt belongs to a run with other settings (epochs was 2, now 1)" in capsys.readouterr().err
    assert reproduce("--overwrite") == 0
    assert files() == sorted(NAMES)


def test_a_damaged_checkpoint_is_named_and_replaced_on_request(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert reproduce() == 130
    Path("results/small/topk-5-seed0.pt").write_bytes(b"half of it")
    assert reproduce() == 1
    assert "topk-5-seed0.pt is damaged" in capsys.readouterr().err
    assert reproduce("--overwrite") == 0


def test_seeds_and_threads_are_taken_from_the_command_line(capsys):
    assert reproduce("--seeds", "7", "--threads", "2") == 0
    assert torch.get_num_threads() == 1
    assert files() == ["deep-seed7.json", "dense-seed7.json", "random-5-seed7.json", "topk-5-seed7.json"]
    content = json.loads(Path("results/small/dense-seed7.json").read_text())
    assert content["machine"]["threads"] == 2


def test_the_data_folder_is_handed_on_and_not_part_of_the_settings(built):
    assert reproduce("--seeds", "0", "--data-dir", "here") == 0
    assert all(config.data_dir == Path("here") for config in built)
    built.clear()
    assert reproduce("--seeds", "0", "--data-dir", "there") == 0
    assert not built


def test_the_list_says_what_is_finished(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "FOLDER", Path.cwd())
    assert cli.main(["reproduce", "small", "--seeds", "0", "--out", "results"]) == 0
    capsys.readouterr()
    assert cli.main(["reproduce", "--list", "--out", "results"]) == 0
    assert " ".join(capsys.readouterr().out.split()) == "small A small one (4 of 8 runs finished)"


def test_the_list_is_of_the_seeds_that_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "FOLDER", Path.cwd())
    assert cli.main(["reproduce", "small", "--seeds", "0", "--out", "results"]) == 0
    capsys.readouterr()
    assert cli.main(["reproduce", "--list", "--seeds", "0", "5", "6", "--out", "results"]) == 0
    assert "(4 of 12 runs finished)" in capsys.readouterr().out


def test_a_page_may_be_of_experiments_of_ones_own():
    Path("paper.md").write_text("<!-- reproduce small: begin -->\n<!-- reproduce small: end -->\n")
    assert reproduce("--seeds", "0", "--page", "paper.md") == 0
    assert "| topk-5 | 3.9% | 1 |" in Path("paper.md").read_text()


def test_a_page_without_a_section_for_what_is_run_is_refused_before_anything_is_run(built, capsys):
    Path("paper.md").write_text("<!-- reproduce table-5: begin -->\n<!-- reproduce table-5: end -->\n")
    assert reproduce("--page", "paper.md") == 2
    assert "with the lines <!-- reproduce small: begin -->" in capsys.readouterr().err
    assert not built


def test_the_page_is_written_from_what_is_there(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "FOLDER", Path.cwd())
    Path("paper.md").write_text("Text.\n<!-- reproduce small: begin -->\n<!-- reproduce small: end -->\n")
    assert cli.main(["reproduce", "--page", "paper.md", "--out", "results"]) == 0
    assert Path("paper.md").read_text().count("not run") == 4
    assert cli.main(["reproduce", "small", "--page", "paper.md", "--out", "results", "--seeds", "0"]) == 0
    assert "not run" not in Path("paper.md").read_text()
    assert "| topk-5 | 3.9% | 1 |" in Path("paper.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which experiment? There are figure-4, "),
        (["nonsense"], "experiment 'nonsense': there are figure-4"),
        (["missing.toml"], "missing.toml: there is no such file"),
        (["small.toml", "--seeds", "1", "1"], "--seeds must be"),
        (["small.toml", "--seeds", str(2**64)], "--seeds must be"),
        (["small.toml", "--threads", "-1"], "--threads must be"),
        (["small.toml", "--threads", "2000000000"], "--threads must be from 0 to 1024"),
        (["small.toml", "--page", "missing.md"], "--page missing.md: there must be such a file"),
    ],
)
def test_wrong_requests_end_in_one_line_before_anything_is_run(built, capsys, arguments, message):
    assert cli.main(["reproduce", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("meprop: error: ")
    assert shown.count("\n") == 1
    assert not built
    assert not Path("benchmarks").exists()


def test_a_page_with_an_unknown_section_is_refused_before_anything_is_run(built, capsys):
    begin_end = "<!-- reproduce {0}: begin -->\n<!-- reproduce {0}: end -->\n"
    Path("paper.md").write_text(begin_end.format("small") + begin_end.format("table-99"))
    assert reproduce("--page", "paper.md") == 2
    assert "experiment 'table-99'" in capsys.readouterr().err
    assert not built


def test_help_explains_every_option(capsys):
    assert cli.main(["reproduce", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--list", "--out", "--seeds", "--data-dir", "--threads", "--page", "--overwrite", "[NAME ...]"):
        assert option in shown

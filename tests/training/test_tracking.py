from __future__ import annotations

import json
import subprocess

import pytest
import torch

pytest.importorskip("lightning_fabric")

from meprop.errors import DataError
from meprop.training import tracking
from meprop.training.config import TrainingConfig
from meprop.training.loop import Trainer, fit


@pytest.fixture
def result(task):
    config = TrainingConfig(epochs=1, k=5)
    runs = fit([Trainer(task, config, rule, 0) for rule in (None, config.rule())], lambda trainer: None)
    return tracking.describe("tiny", {"training": tracking.plain(config)}, runs)


def test_result_json_has_the_published_keys(result, tmp_path):
    path = tmp_path / "result.json"
    tracking.write_result(path, result)
    content = json.loads(path.read_text())
    assert set(content) == {"task", "config", "machine", "versions", "commit", "runs", "sha256"}
    assert [run["rule"] for run in content["runs"]] == ["dense", "topk"]
    for run in content["runs"]:
        assert {"rule", "seed", "epochs", "dev", "test", "seconds"} <= set(run)
        assert set(run["seconds"]) == {"forward", "backward", "optimizer", "step"}
        assert set(run["dev"]) == set(run["test"]) == {"accuracy", "loss"}
    assert content["config"]["training"]["seeds"] == [0]
    assert content["versions"]["torch"] == str(torch.__version__)
    assert {"cpu", "cores", "memory_gib", "threads", "gpu"} <= set(content["machine"])


@pytest.mark.parametrize("layout", [{"indent": 2}, {}, {"indent": "\t", "ensure_ascii": False}])
def test_a_result_is_read_back_however_it_is_laid_out(result, tmp_path, layout):
    path = tmp_path / "result.json"
    tracking.write_result(path, result)
    path.write_text(json.dumps(json.loads(path.read_text()), **layout))
    assert tracking.read_result(path, tracking.Result) == result


def test_a_changed_result_is_never_read_as_another(result, tmp_path):
    path = tmp_path / "result.json"
    tracking.write_result(path, result)
    content = path.read_bytes()
    refused = 0
    for bit in torch.randint(0, 8 * len(content), (500,), generator=torch.Generator().manual_seed(0)).tolist():
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert tracking.read_result(path, tracking.Result) == result  # such as of a space that is a line's end
        except DataError:
            refused += 1
    assert refused > 300


def test_a_result_of_an_earlier_version_has_no_digest(result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(tracking.plain(result)))
    assert tracking.read_result(path, tracking.Result) == result


def test_a_failed_write_keeps_the_old_result(result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    tracking.write_result(path, result)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tracking.write_result(path, result)
    assert path.read_bytes() == before


def test_live_curves_hold_every_epoch_once(task, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainingConfig(epochs=3, k=5)
    with tracking.LiveCurves(tmp_path) as curves:
        fit([Trainer(task, config, None, 4)], curves.update, turn=3)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "dense-seed4"))
    events.Reload()
    assert [event.step for event in events.Scalars("dev/accuracy")] == [1, 2, 3]


def test_no_curves_unless_asked_for(task, tmp_path):
    with tracking.LiveCurves(None) as curves:
        fit([Trainer(task, TrainingConfig(epochs=1), None, 4)], curves.update)
    assert not list(tmp_path.iterdir())


def test_the_commit_is_read_once_and_is_dirty_if_the_code_is(monkeypatch):
    asked = []

    def run(command, **options):
        assert command[:3] == ["git", "--no-optional-locks", "-C"]  # a killed process leaves no lock in the checkout
        asked.append(command[4:])
        return subprocess.CompletedProcess(command, 0, stdout="abc\n")

    monkeypatch.setattr(tracking.subprocess, "run", run)
    monkeypatch.setattr(tracking.Path, "exists", lambda path: True)
    tracking.commit.cache_clear()
    try:
        assert [tracking.commit(), tracking.commit()] == ["abc-dirty", "abc-dirty"]
    finally:
        tracking.commit.cache_clear()
    assert asked == [["rev-parse", "HEAD"], ["status", "--porcelain", "--", "src", "csrc"]]

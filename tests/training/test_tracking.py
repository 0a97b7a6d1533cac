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


def scalars(folder):
    """The curves in TensorBoard's files: by name, (epoch, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


OF_LAYERS = {"density", "k", "energy"}
ALWAYS = {"loss", "dev/accuracy", "dev/loss", "test/accuracy", "test/loss"}
ALWAYS |= {"density", "milliseconds/forward", "milliseconds/backward", "milliseconds/optimizer"}


def test_live_curves_hold_every_epoch_once(task, tmp_path):
    config = TrainingConfig(epochs=3, k=5)
    trainers = [Trainer(task, config, None, 4), Trainer(task, config, config.rule(), 4)]
    with tracking.LiveCurves(trainers, tracking.tensorboard_in(tmp_path)) as curves:
        fit(trainers, curves.update, turn=3)
    dense, sparse = (scalars(tmp_path / "tensorboard" / f"{name}-seed4") for name in ("dense", "topk"))
    assert set(dense) == ALWAYS
    assert set(sparse) == ALWAYS | OF_LAYERS
    assert all([step for step, _ in curve] == [1, 2, 3] for curve in (*dense.values(), *sparse.values()))
    for trainer, found in zip(trainers, (dense, sparse), strict=True):
        for record in trainer.curve:
            expected = {"loss": record.loss, "dev/loss": record.dev["loss"], **record.live}
            assert {name: found[name][record.epoch - 1][1] for name in expected} == pytest.approx(expected)
    assert {value for _, value in sparse["k"]} == {5.0}
    assert all(0 < value < 1 for _, value in sparse["energy"])


class Collected:
    """As much of a logger of Fabric as is used."""

    def __init__(self, trainer):
        self.trainer, self.logged, self.ended = trainer, [], []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))

    def save(self):
        pass

    def finalize(self, status):
        self.ended.append(status)


def test_any_logger_gets_the_milliseconds_of_a_step_and_the_energy_of_one(task, monkeypatch):
    from meprop.energy import Energy

    measured = []
    add = Energy.add
    monkeypatch.setattr(Energy, "add", lambda self, grad, kept: (measured.append(trainer.step), add(self, grad, kept)))
    config, loggers = TrainingConfig(epochs=2, k=5), []
    trainer = Trainer(task, config, config.rule(), 0)
    with tracking.LiveCurves([trainer], lambda of: loggers.append(Collected(of)) or loggers[-1]) as curves:
        fit([trainer], curves.update)
    (logger,) = loggers
    assert logger.trainer is trainer
    assert logger.ended == ["success"]
    assert [step for step, _ in logger.logged] == [1, 2]
    assert measured == [0, 0]  # the first step of each epoch
    for part in ("forward", "backward", "optimizer"):
        total = sum(metrics[f"milliseconds/{part}"] for _, metrics in logger.logged) * task.steps_per_epoch / 1000
        assert total == pytest.approx(getattr(trainer.seconds, part))


def test_live_curves_change_no_bit_of_the_training(task):
    config = TrainingConfig(epochs=2, noise=0.5)
    plain, live = (Trainer(task, config, config.rule(), 3) for _ in range(2))
    fit([plain], lambda trainer: None)
    with tracking.LiveCurves([live], Collected) as curves:
        fit([live], curves.update)
    assert all(map(torch.equal, plain.model.state_dict().values(), live.model.state_dict().values()))
    assert [record.density for record in plain.curve] == [record.density for record in live.curve]
    assert [record.live for record in plain.curve] == [{}, {}]


def test_a_run_goes_live_within_an_epoch(task):
    config = TrainingConfig(epochs=1, k=5)
    trainer = Trainer(task, config, config.rule(), 0)
    trainer.advance(task.steps_per_epoch)
    trainer.go_live()
    trainer.advance(1)  # no step is left
    assert set(trainer.curve[0].live) == {"density", "k"}


def test_no_curves_unless_asked_for(task, tmp_path, monkeypatch):
    monkeypatch.setattr("meprop.energy.Energy.add", lambda *_: pytest.fail("the energy is measured"))
    config = TrainingConfig(epochs=1, k=5)
    trainers = [Trainer(task, config, config.rule(), 4)]
    with tracking.LiveCurves(trainers, None) as curves:
        fit(trainers, curves.update)
    assert trainers[0].curve[0].live == {}


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

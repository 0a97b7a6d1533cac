from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("lightning_fabric")

import meprop
from meprop import machine
from meprop.errors import DataError
from meprop.training import checkpoint, tracking
from meprop.training.config import SimplifyConfig, TrainingConfig
from meprop.training.loop import Trainer, fit
from tiny import TinyConfig, TinyTask

SETTINGS = {"k": 5, "hidden": [500, 500]}


def ignore(trainer):
    pass


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_a_resumed_run_with_row_sparse_gradients(task, tmp_path, optimizer, sparse_rows):
    config = TrainingConfig(
        epochs=3, k=5, accelerator="cpu", optimizer=optimizer, scope="batch", sparse_rows=sparse_rows
    )
    whole, interrupted, resumed = (Trainer(task, config, config.rule(), 7) for _ in range(3))
    (expected,) = fit([whole], ignore)
    interrupted.advance(5)
    assert isinstance(interrupted.optimizer, meprop.optim.SGD | meprop.optim.Adam | meprop.optim.Adagrad)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    (actual,) = fit([resumed], ignore)
    assert [record["loss"] for record in actual.curve] == [record["loss"] for record in expected.curve]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


@pytest.mark.parametrize("sparse_rows", ["no", "decay"])
@pytest.mark.parametrize("steps", [3, 8, 11])  # between checks, at the end of an epoch, in a cycle that only trains
def test_a_resumed_run_that_is_simplified(task, tmp_path, steps, sparse_rows):
    config = TrainingConfig(epochs=3, k=5, accelerator="cpu", scope="batch", sparse_rows=sparse_rows)
    simplify = SimplifyConfig(threshold=0.05, checks=4, cycle=1)
    whole, interrupted, resumed = (Trainer(task, config, config.rule(), 7, simplify) for _ in range(3))
    (expected,) = fit([whole], ignore)
    interrupted.advance(steps)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    interrupted.advance(3)
    checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    (actual,) = fit([resumed], ignore)
    assert actual.checks == expected.checks
    assert expected.checks[-1]["widths"]["0"] < 128
    assert [record["loss"] for record in actual.curve] == [record["loss"] for record in expected.curve]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("steps", [5, 8, 9, 13])  # within the first epoch, at its end, evaluated, within the second
@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(task, tmp_path, steps, sparse, optimizer):
    config = TrainingConfig(epochs=3, k=5, accelerator="cpu", optimizer=optimizer)
    rule = config.rule() if sparse else None
    whole = Trainer(task, config, rule, 7)
    (expected,) = fit([whole], ignore)

    interrupted = Trainer(task, config, rule, 7)
    for _ in range(steps):
        interrupted.advance(1)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    interrupted.advance(3)  # what the checkpoint holds is not what goes on living in memory

    resumed = Trainer(task, config, rule, 7)
    saved = checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    assert asdict(resumed.seconds) == saved["seconds"]
    assert resumed.seconds.step > 0
    (actual,) = fit([resumed], ignore)
    assert (actual.dev, actual.test) == (expected.dev, expected.test)
    assert [r["loss"] for r in actual.curve] == [r["loss"] for r in expected.curve]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


SCHEDULED = {"noise": 0.5, "noise_start": 0.1, "noise_of": "model", "dense_warmup_steps": 4, "dense_end_steps": 5}


@pytest.mark.parametrize("steps", [3, 4, 8, 9, 14, 21])  # in each phase and at its beginning; 8 steps are an epoch
def test_a_resumed_run_with_a_schedule_equals_an_uninterrupted_one(task, tmp_path, steps):
    config = TrainingConfig(epochs=3, accelerator="cpu", **SCHEDULED)
    whole, interrupted, resumed = (Trainer(task, config, config.rule("sampled"), 7) for _ in range(3))
    (expected,) = fit([whole], ignore)
    for _ in range(steps):
        interrupted.advance(1)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    interrupted.advance(3)
    checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    (actual,) = fit([resumed], ignore)
    assert [record["loss"] for record in actual.curve] == [record["loss"] for record in expected.curve]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict() == {"steps": 24}


def test_a_checkpoint_from_before_there_were_schedules_goes_on(task, tmp_path):
    config = TrainingConfig(k=5, accelerator="cpu")
    then = tracking.settings(TinyConfig(), config, "topk")
    for name in ("noise_of", "noise_start", "dense_warmup_steps", "dense_end_steps"):
        del then[name]
    state = Trainer(task, config, config.rule(), 7).state_dict()
    del state["schedule"]
    checkpoint.save(tmp_path / "c.pt", state, then)
    trainer = Trainer(task, config, config.rule(), 7)
    checkpoint.resume(tmp_path / "c.pt", trainer, tracking.settings(TinyConfig(), config, "topk"), TinyConfig)
    other = TrainingConfig(k=5, dense_end_steps=3)
    with pytest.raises(ValueError, match="dense_end_steps was 0, now 3"):
        checkpoint.load(tmp_path / "c.pt", tracking.settings(TinyConfig(), other, "topk"), TinyConfig)


@pytest.mark.parametrize("failing", ["save", "fsync", "replace"])
def test_a_crash_while_saving_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1}, SETTINGS)

    def crash(*args):
        if failing == "save":
            args[1].write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch if failing == "save" else os, failing, crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 2}, SETTINGS)
    monkeypatch.undo()
    assert checkpoint.load(path, SETTINGS, TinyConfig) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("call", "nth"), [("fsync", 0), ("replace", 0), ("replace", 1), ("open", 0), ("fsync", 1)])
def test_kill_9_leaves_the_newest_whole_checkpoint(tmp_path, monkeypatch, call, nth):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1}, SETTINGS)
    checkpoint.save(path, {"step": 2}, SETTINGS)
    child = os.fork()
    if child == 0:  # dies at the nth such call, without any clean-up
        left = [nth]

        def die(*arguments):
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return original(*arguments)

        original = getattr(os, call)
        setattr(os, call, die)
        checkpoint.save(path, {"step": 3}, SETTINGS)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert checkpoint.exists(path)
    assert checkpoint.load(path, SETTINGS, TinyConfig) == {
        "step": 3 if (call, nth) in (("open", 0), ("fsync", 1)) else 2
    }
    checkpoint.save(path, {"step": 4}, SETTINGS)  # the remains are no obstacle
    assert checkpoint.load(path, SETTINGS, TinyConfig) == {"step": 4}
    machine.remove_remains(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([path, checkpoint.earlier(path)])


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weight": torch.arange(100.0)}, SETTINGS)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 8 * len(content), (300,), generator=generator).tolist()
    for bit in [0, 8 * len(content) - 1, *bits]:
        path.write_bytes(flipped(content, bit))
        with pytest.raises(DataError, match=r"c\.pt is damaged"):
            checkpoint.load(path, SETTINGS, TinyConfig)


@pytest.mark.parametrize("damage", [lambda content: flipped(content, 9000), lambda content: b"", None])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, damage):
    path = tmp_path / "c.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step, "weight": torch.zeros(1000)}, SETTINGS)
    if damage is None:  # killed between the two renames
        path.unlink()
        assert checkpoint.load(path, SETTINGS, TinyConfig)["step"] == 1
    else:
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(
            UserWarning, match=r"c\.pt is damaged .* Going on from the checkpoint before it, .*c-before\.pt"
        ):
            assert checkpoint.load(path, SETTINGS, TinyConfig)["step"] == 1
        checkpoint.earlier(path).write_bytes(b"half of it")
        with pytest.raises(DataError, match=r"c-before\.pt is damaged"), pytest.warns(UserWarning, match="before it"):
            checkpoint.load(path, SETTINGS, TinyConfig)
    checkpoint.delete(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x00" * len(content),
        lambda content: b"not a checkpoint",
    ],
)
def test_a_damaged_checkpoint_is_named_with_a_remedy(tmp_path, damage):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"weight": torch.zeros(1000)}, SETTINGS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"c\.pt is damaged or not a checkpoint of meprop .*--overwrite"):
        checkpoint.load(path, SETTINGS, TinyConfig)


def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(DataError, match="not a checkpoint of meprop"):
        checkpoint.load(tmp_path / "c.pt", SETTINGS, TinyConfig)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint.save(tmp_path / "c.pt", {"evil": Evil()}, SETTINGS)
    with pytest.raises(DataError):
        checkpoint.load(tmp_path / "c.pt", SETTINGS, TinyConfig)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_settings_is_refused_naming_them(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {}, SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(k was 5, now 6\)"):
        checkpoint.load(tmp_path / "c.pt", {**SETTINGS, "k": 6}, TinyConfig)


def test_an_option_that_came_later_had_its_default_then(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {}, SETTINGS)
    assert checkpoint.load(tmp_path / "c.pt", {**SETTINGS, "dropout": 0.3, "precision": "32-true"}, TinyConfig) == {}
    with pytest.raises(ValueError, match=r"dropout was 0\.3, now 0\.5"):
        checkpoint.load(tmp_path / "c.pt", {**SETTINGS, "dropout": 0.5}, TinyConfig)


@pytest.mark.parametrize("other", ["model", "state", "format"])
def test_a_checkpoint_that_does_not_fit_is_named_with_a_remedy(task, tmp_path, monkeypatch, other):
    config = TrainingConfig(k=5, accelerator="cpu")
    state = Trainer(task, config, None, 7).state_dict()
    if other == "format":
        monkeypatch.setattr(checkpoint, "_FORMAT", 1)
    checkpoint.save(tmp_path / "c.pt", {"model": state["model"]} if other == "state" else state, SETTINGS)
    monkeypatch.undo()
    wider = Trainer(TinyTask(TinyConfig(hidden=(130,))) if other == "model" else task, config, None, 7)
    with pytest.raises(DataError, match=r"c\.pt (does not fit|is damaged or not a checkpoint).*--overwrite"):
        checkpoint.resume(tmp_path / "c.pt", wider, SETTINGS, TinyConfig)

from __future__ import annotations

import io
import os
import random
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("lightning_fabric")

import meprop
from meprop import casts, machine
from meprop.errors import DataError
from meprop.training import checkpoint, encoding, tracking
from meprop.training.config import SimplifyConfig, TrainingConfig
from meprop.training.loop import Trainer, fit
from tiny import TinyConfig, TinyTask

SETTINGS = {"k": 5, "hidden": [500, 500]}


def ignore(trainer):
    pass


def whole_and_resumed(tmp_path, build, steps):
    """A run that was not stopped, and one that was after so many calls, both at their end, which has to be the same."""
    whole, interrupted, resumed = build(), build(), build()
    (expected,) = fit([whole], ignore)
    for _ in range(steps):
        interrupted.advance(1)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    interrupted.advance(3)  # what the checkpoint holds is not what goes on living in memory
    saved = checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    assert asdict(resumed.seconds) == saved["seconds"]
    assert resumed.seconds.step > 0
    assert resumed.state_dict()["disturbance"] == saved["disturbance"]
    (actual,) = fit([resumed], ignore)
    assert (actual.dev, actual.test, actual.checks) == (expected.dev, expected.test, expected.checks)
    assert actual.activity == expected.activity
    assert [record["loss"] for record in actual.curve] == [record["loss"] for record in expected.curve]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    return whole, resumed


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("steps", [5, 8, 9, 13])  # within the first epoch, at its end, evaluated, within the second
@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(task, tmp_path, steps, sparse, optimizer):
    config = TrainingConfig(epochs=3, k=5, accelerator="cpu", optimizer=optimizer)
    whole_and_resumed(tmp_path, lambda: Trainer(task, config, config.rule() if sparse else None, 7), steps)


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_a_resumed_run_with_row_sparse_gradients(task, tmp_path, optimizer, sparse_rows):
    config = TrainingConfig(
        epochs=3, k=5, accelerator="cpu", optimizer=optimizer, scope="batch", sparse_rows=sparse_rows
    )
    _, resumed = whole_and_resumed(tmp_path, lambda: Trainer(task, config, config.rule(), 7), 5)
    assert isinstance(resumed.optimizer, meprop.optim.SGD | meprop.optim.Adam | meprop.optim.Adagrad)


@pytest.mark.parametrize("sparse_rows", ["no", "decay"])
@pytest.mark.parametrize("steps", [3, 8, 11])  # between checks, at the end of an epoch, in a cycle that only trains
def test_a_resumed_run_that_is_simplified(task, tmp_path, steps, sparse_rows):
    config = TrainingConfig(epochs=3, k=5, accelerator="cpu", scope="batch", sparse_rows=sparse_rows)
    simplify = SimplifyConfig(threshold=0.05, checks=4, cycle=1)
    whole, _ = whole_and_resumed(tmp_path, lambda: Trainer(task, config, config.rule(), 7, simplify), steps)
    assert whole.result().checks[-1]["widths"]["0"] < 128


@pytest.mark.parametrize("settings", [{}, {"scope": "batch", "sparse_rows": "decay"}, {"noise": 0.5}])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_with_states_in_bfloat16(task, tmp_path, sparse, optimizer, settings):
    config = TrainingConfig(epochs=3, k=5, accelerator="cpu", optimizer=optimizer, state_dtype="bfloat16", **settings)
    rule = config.rule() if sparse else None
    _, resumed = whole_and_resumed(tmp_path, lambda: Trainer(task, config, rule, 7), 11)
    state = next(iter(resumed.optimizer.state.values()))
    assert state["exp_avg" if optimizer == "adam" else "sum"].dtype == torch.bfloat16


@pytest.mark.parametrize("rule", [None, "sampled"])
def test_a_resumed_run_with_updates_in_the_backward_pass(tmp_path, rule):
    wide = TinyTask(TinyConfig(hidden=(1024, 1024)))  # one weight is large enough
    config = TrainingConfig(epochs=1, accelerator="cpu", state_dtype="bfloat16")
    in_backward = replace(config, in_backward=True)
    build = {each: lambda each=each: Trainer(wide, each, rule and each.rule(rule), 7) for each in (config, in_backward)}
    whole, _ = whole_and_resumed(tmp_path, build[in_backward], 3)
    assert whole.optimizer.in_backward
    apart = build[config]()  # with the separate step of the same optimizer
    fit([apart], ignore)
    assert all(map(torch.equal, whole.model.parameters(), apart.model.parameters()))


@pytest.mark.parametrize("settings", [{"compute_dtype": "bfloat16"}, {"precision": "bf16-mixed", "in_backward": True}])
def test_a_resumed_run_with_forward_products_in_bfloat16(tmp_path, settings):
    wide = TinyTask(TinyConfig(hidden=(1024, 1024)))  # one weight is large enough for a copy
    config = TrainingConfig(epochs=1, accelerator="cpu", noise=0.5, **settings)
    whole, _ = whole_and_resumed(tmp_path, lambda: Trainer(wide, config, config.rule("sampled"), 7), 3)
    assert whole.optimizer.copy_dtype is torch.bfloat16
    first, second = (casts.cast(whole.model[3].weight, torch.bfloat16) for _ in range(2))
    assert first is second  # the copy that the last step has written
    products = {layer.compute_dtype for layer in whole.model if isinstance(layer, meprop.nn.Linear)}
    assert products == {torch.bfloat16 if "compute_dtype" in settings else None}
    dense = Trainer(wide, config, None, 7)
    assert type(dense.optimizer) is (torch.optim.Adam if "compute_dtype" in settings else meprop.optim.Adam)


def test_on_a_gpu_forward_products_in_bfloat16_leave_the_optimizer_to_torch(monkeypatch):
    task, here = TinyTask(TinyConfig()), TrainingConfig(accelerator="cpu", compute_dtype="bfloat16")
    assert type(task.make(0, here).optimizer) is meprop.optim.Adam  # it writes copies, which it does on a CPU only
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(task.make(0, replace(here, accelerator="auto")).optimizer) is torch.optim.Adam


SCHEDULED = {"noise": 0.5, "noise_start": 0.1, "noise_of": "model", "dense_warmup_steps": 4, "dense_end_steps": 5}


@pytest.mark.parametrize("steps", [3, 4, 8, 9, 14, 21])  # in each phase and at its beginning; 8 steps are an epoch
def test_a_resumed_run_with_a_schedule_equals_an_uninterrupted_one(task, tmp_path, steps):
    config = TrainingConfig(epochs=3, accelerator="cpu", **SCHEDULED)
    whole, resumed = whole_and_resumed(tmp_path, lambda: Trainer(task, config, config.rule("sampled"), 7), steps)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict() == {"steps": 24}


@pytest.mark.parametrize("steps", [3, 8, 9])
def test_a_resumed_run_whose_k_changes_equals_an_uninterrupted_one(task, tmp_path, steps):
    config = TrainingConfig(epochs=2, accelerator="cpu", k=30, k_start=5, k_ratio=(1.0,))
    whole, resumed = whole_and_resumed(tmp_path, lambda: Trainer(task, config, config.rule(), 7), steps)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict() == {"steps": 16}


def test_a_checkpoint_from_before_there_were_schedules_goes_on(task, tmp_path):
    config = TrainingConfig(k=5, accelerator="cpu")
    then = tracking.settings(TinyConfig(), config, "topk")
    for name in ("k_start", "k_ratio", "noise_of", "noise_start", "dense_warmup_steps", "dense_end_steps"):
        del then[name]
    state = Trainer(task, config, config.rule(), 7).state_dict()
    del state["schedule"]
    checkpoint.save(tmp_path / "c.pt", state, then)
    trainer = Trainer(task, config, config.rule(), 7)
    checkpoint.resume(tmp_path / "c.pt", trainer, tracking.settings(TinyConfig(), config, "topk"), TinyConfig)
    other = TrainingConfig(k=5, dense_end_steps=3)
    with pytest.raises(ValueError, match="dense_end_steps was 0, now 3"):
        checkpoint.load(tmp_path / "c.pt", tracking.settings(TinyConfig(), other, "topk"), TinyConfig)


class DrawingTask(TinyTask):
    """Draws from Python's and numpy's random numbers as well, as a task of a user's own may."""

    def loss(self, model, batch):
        return super().loss(model, batch) * (1 + random.random()) * (1 + np.random.normal() ** 2)  # noqa: NPY002


@pytest.mark.parametrize("steps", [5, 8, 13])
def test_a_resumed_run_draws_what_an_undisturbed_one_does(tmp_path, steps):
    config = TrainingConfig(epochs=2, k=5, accelerator="cpu")
    whole, interrupted, resumed = (Trainer(DrawingTask(), config, None, 2**64 - 1) for _ in range(3))
    (expected,) = fit([whole], ignore, turn=3)
    interrupted.advance(steps)
    checkpoint.save(tmp_path / "c.pt", interrupted.state_dict(), SETTINGS)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    checkpoint.resume(tmp_path / "c.pt", resumed, SETTINGS, TinyConfig)
    (actual,) = fit([resumed], ignore)
    assert [record["loss"] for record in actual.curve] == [record["loss"] for record in expected.curve]
    assert random.random() == random.Random(0).random()  # the caller's own are not disturbed
    assert np.random.random() == np.random.RandomState(0).random()  # noqa: NPY002


@pytest.mark.parametrize("failing", ["flatten", "fsync", "replace"])
def test_a_crash_while_saving_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1}, SETTINGS)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding if failing == "flatten" else os, failing, crash)
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
    assert sorted(tmp_path.iterdir()) == sorted([path, *checkpoint.earlier(path)])


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
    (before,) = checkpoint.earlier(path)
    if damage is None:  # killed between the two renames
        path.unlink()
        assert checkpoint.load(path, SETTINGS, TinyConfig)["step"] == 1
    else:
        damaged = damage(path.read_bytes())
        path.write_bytes(damaged)
        with (
            pytest.raises(ValueError, match=r"c-before\.pt belongs to a run with other settings"),
            pytest.warns(UserWarning, match="before it"),
        ):
            checkpoint.load(path, {**SETTINGS, "k": 6}, TinyConfig)
        assert path.exists()  # a refused request deletes nothing
        with pytest.warns(
            UserWarning, match=r"c\.pt is damaged .* Going on from the checkpoint before it, .*c-before\.pt"
        ):
            assert checkpoint.load(path, SETTINGS, TinyConfig)["step"] == 1
        assert not path.exists()  # else the next save would move it to where the good one is
        path.write_bytes(damaged)
        before.write_bytes(b"half of it")
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
    path = tmp_path / "c.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="is an archive, and not a checkpoint of meprop"):
        checkpoint.load(path, SETTINGS, TinyConfig)


def sealed(path, members, compression=zipfile.ZIP_STORED):
    """A file with a right digest and any members."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = bytes(checkpoint._SEAL_LENGTH)
    content = body.getvalue()[: -checkpoint._SEAL_LENGTH]
    path.write_bytes(content + checkpoint._seal(content))


@pytest.mark.parametrize(
    "state",
    [
        "[]", "{}", '{"format": 7}', '{"format": 7, "content": 3}', '{"format": 7, "content": {"dict": [1]}}',
        '{"format": 7, "content": {"pickle": "x"}}', '{"format": 7, "content": {"tensor": "0"}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_right_digest_of_wrong_content(tmp_path, state):
    path = tmp_path / "c.pt"
    sealed(path, {checkpoint._STATE: state, checkpoint._TENSORS: safetensors.torch.save({})})
    with pytest.raises(DataError, match=r"c\.pt is damaged or not a checkpoint of meprop"):
        checkpoint.load(path, SETTINGS, TinyConfig)


def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path):
    path = tmp_path / "c.pt"
    sealed(path, {checkpoint._STATE: b" " * 10_000_000, checkpoint._TENSORS: b""}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="it is compressed"):
        checkpoint.load(path, SETTINGS, TinyConfig)


@pytest.mark.parametrize("count", [2, 3])
def test_so_many_checkpoints_are_kept(tmp_path, monkeypatch, count):
    monkeypatch.setattr(checkpoint, "KEPT", count)
    path = tmp_path / "c.pt"
    for step in range(5):
        checkpoint.save(path, {"step": step}, SETTINGS)
    found = [checkpoint.read(each)["state"]["step"] for each in (path, *checkpoint.earlier(path))]
    assert found == [4, 3, 2][:count]
    assert len(list(tmp_path.iterdir())) == count
    for each in (path, *checkpoint.earlier(path)[:-1]):  # all but the oldest
        each.write_bytes(b"")
    with pytest.warns(UserWarning, match="before it"):
        assert checkpoint.load(path, SETTINGS, TinyConfig) == {"step": found[-1]}
    checkpoint.delete(path)
    assert not list(tmp_path.iterdir())


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(TypeError, match="no Evil"):
        checkpoint.save(tmp_path / "c.pt", {"evil": Evil()}, SETTINGS)
    torch.save({"format": 3, "state": Evil()}, tmp_path / "c.pt")
    with pytest.raises(
        DataError, match="a checkpoint of an older meprop, of format 3, and this version reads format 7"
    ):
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


@pytest.mark.parametrize("other", ["model", "state", "newer", "older"])
def test_a_checkpoint_that_does_not_fit_is_named_with_a_remedy(task, tmp_path, monkeypatch, other):
    config = TrainingConfig(k=5, accelerator="cpu")
    state = Trainer(task, config, None, 7).state_dict()
    if other in ("newer", "older"):
        monkeypatch.setattr(checkpoint, "_FORMAT", checkpoint._FORMAT + (1 if other == "newer" else -1))
    checkpoint.save(tmp_path / "c.pt", {"model": state["model"]} if other == "state" else state, SETTINGS)
    monkeypatch.undo()
    wider = Trainer(TinyTask(TinyConfig(hidden=(130,))) if other == "model" else task, config, None, 7)
    said = {
        "model": r"size mismatch for 0.weight: .*\[128, 6\].*\[130, 6\]",
        "state": "KeyError: 'records'",
        "newer": "another version of meprop: it is of format 8, and this version reads format 7",
        "older": "another version of meprop: it is of format 6, and this version reads format 7",
    }
    with pytest.raises(DataError, match=rf"c\.pt .*{said[other]}.*--overwrite"):
        checkpoint.resume(tmp_path / "c.pt", wider, SETTINGS, TinyConfig)

"""Commands that are stopped, killed, or run out of disk, and what they then go on with and leave behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

import commands
from interrupted import Stop
from meprop import cli
from meprop.cli.session import Session
from meprop.errors import DataError
from meprop.training import checkpoint, tracking

pytestmark = pytest.mark.usefixtures("no_drawing")
SMALL = ["--hidden", "128", "--dev-size", "20", "--k", "5", "--accelerator", "cpu"]
SLOW = pytest.mark.slow  # of a kind of which another case is run always
COMMANDS = {
    "train": ["train", "mnist", "--epochs", "2", "--dropout", "0.2"],
    "compare": ["compare", "mnist", "--epochs", "2", "--seeds", "0", "1"],
    "simplify": ["simplify", "mnist", "--epochs", "2", "--seeds", "0", "1", "--cycle", "1", "--seconds", "0.01"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEPROP_DATA", raising=False)


def arguments(command, data, *options, out="out"):
    return [*COMMANDS[command], "--data-dir", str(data), *SMALL, "--out", out, *options]


def run(command, data, *options, out="out"):
    return cli.main(arguments(command, data, *options, out=out))


def outcome(out):
    """All of an experiment but seconds and disturbance: its runs, and the numbers of its models."""
    content = json.loads(Path(out, "result.json").read_text())
    runs = [
        {
            **{name: value for name, value in each.items() if name not in ("seconds", "disturbance", "curve")},
            "curve": [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in each["curve"]],
        }
        for each in content["runs"]
    ]
    models = {}
    for path in sorted(Path(out).glob("*.pt")):
        if path.name.startswith("compact"):
            state = torch.load(path, weights_only=False).state_dict()
        else:
            state = checkpoint.read(path)["state"]["model"]
        models[path.name] = {name: value.tolist() for name, value in state.items()}
    return runs, models


def files(out="out"):
    return sorted(path.name for path in Path(out).iterdir())


@pytest.mark.parametrize(
    ("command", "saves"),
    [("train", (1, 2)), ("compare", (3, 8)), ("simplify", (5,))]
    + [pytest.param(*each, marks=SLOW) for each in (("compare", (1, 2, 4, 5)), ("simplify", (1, 3, 6, 9)))],
)
def test_an_interrupted_command_resumes_bit_for_bit(small_mnist, monkeypatch, capsys, command, saves):
    assert run(command, small_mnist, out="whole") == 0
    for count in saves:
        out = f"part-{count}"
        with monkeypatch.context() as patch:
            Stop(patch, count)
            assert run(command, small_mnist, out=out) == 130
        assert "continue with --resume" in capsys.readouterr().err
        assert run(command, small_mnist, out=out) == 2  # neither --resume nor --overwrite
        assert run(command, small_mnist, "--resume", out=out) == 0
        assert outcome(out) == outcome("whole")
        assert files(out) == files("whole")
        assert run(command, small_mnist, "--resume", out=out) == 0  # there is nothing left to do
        assert outcome(out) == outcome("whole")


@pytest.mark.parametrize("command", ["compare", "simplify"])
def test_a_kill_between_the_record_and_the_end_of_its_checkpoints(small_mnist, monkeypatch, command):
    assert run(command, small_mnist, out="whole") == 0

    def die(path):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "delete", die)
        assert run(command, small_mnist) == 9
    assert len(json.loads(Path("out/result.json").read_text())["runs"]) == (2 if command == "compare" else 3)
    assert run(command, small_mnist, "--resume") == 0
    assert outcome("out") == outcome("whole")
    assert files() == files("whole")


def test_every_picture_of_a_finished_seed_is_there(small_mnist, monkeypatch):
    """Killed between the record, with which a seed is finished, and what comes then."""
    from meprop.reporting import simplify

    assert run("simplify", small_mnist, "--seeds", "0", out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(simplify, "draw_activity", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
        assert run("simplify", small_mnist, "--seeds", "0") == 1
    assert run("simplify", small_mnist, "--seeds", "0", "--resume") == 0
    assert files() == files("whole")


@pytest.mark.parametrize("command", COMMANDS)
def test_resuming_where_nothing_is_starts_from_the_beginning(small_mnist, capsys, command):
    assert run(command, small_mnist, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().err
    assert Path("out/result.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--lr", "0.5"], 2, r"other settings (lr was 0.001, now 0.5)"),
        (["--dropout", "0.3"], 2, r"other settings (dropout was 0.2, now 0.3)"),
        (["--seeds", "1"], 2, r"has results of the seeds [0]; give them to --seeds as well"),
        (["--rule", "random"], 2, r"other settings (rule was 'topk', now 'random')"),
        (["--overwrite"], 2, r"give one of them"),
    ],
)
def test_another_comparison_is_not_resumed(small_mnist, capsys, options, code, message):
    assert run("compare", small_mnist, "--seeds", "0") == 0
    before = Path("out/result.json").read_bytes()
    assert run("compare", small_mnist, "--resume", "--seeds", "0", *options) == code
    assert message in capsys.readouterr().err
    assert Path("out/result.json").read_bytes() == before


def test_the_result_of_another_command_or_a_damaged_one_is_not_resumed(small_mnist, capsys):
    assert run("train", small_mnist) == 0
    assert run("compare", small_mnist, "--resume") == 1
    assert "is not of this command" in capsys.readouterr().err
    assert run("simplify", small_mnist, "--resume") == 1
    assert "is damaged or not a result of this command" in capsys.readouterr().err
    Path("out/result.json").write_text("{")
    assert run("compare", small_mnist, "--resume") == 1
    assert "result.json is damaged" in capsys.readouterr().err


def test_more_seeds_can_be_added(small_mnist):
    assert run("compare", small_mnist, "--seeds", "0") == 0
    assert run("compare", small_mnist, "--resume", "--seeds", "0", "3") == 0
    assert [(each["rule"], each["seed"]) for each in outcome("out")[0]] == [
        ("dense", 0), ("topk", 0), ("dense", 3), ("topk", 3)
    ]  # fmt: skip


def test_a_seed_that_diverges_leaves_the_finished_ones(small_mnist, monkeypatch, capsys):
    from meprop.training.loop import Trainer

    step = Trainer._train_step

    def diverging(trainer, batch):
        if trainer.seed == 1:
            raise DataError("the loss became nan")
        step(trainer, batch)

    monkeypatch.setattr(Trainer, "_train_step", diverging)
    assert run("compare", small_mnist) == 1
    shown = capsys.readouterr()
    assert "the loss became nan" in shown.err
    assert "test accuracy" in shown.out
    assert [each["seed"] for each in outcome("out")[0]] == [0, 0]


# ---------------------------------------------------------------- replacing


@pytest.mark.parametrize("command", ["compare", *(pytest.param(each, marks=SLOW) for each in ("train", "simplify"))])
def test_overwriting_leaves_nothing_of_the_earlier_experiment(small_mnist, command):
    assert run("simplify", small_mnist, "--tensorboard") == 0
    assert run("train", small_mnist, "--overwrite", "--tensorboard", "--rule", "random") == 0
    assert files() == [".lock", "checkpoint.pt", "curves.png", "result.json", "tensorboard"]
    assert files("out/tensorboard") == ["random-seed0"]
    Path("out/notes.txt").write_text("mine")
    assert run(command, small_mnist, out="new") == 0
    assert run(command, small_mnist, "--overwrite") == 0
    assert files() == sorted([*files("new"), "notes.txt"])


def test_what_is_to_be_replaced_stays_until_there_is_something_new(small_mnist, monkeypatch):
    assert run("compare", small_mnist) == 0
    before = outcome("out")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "train", lambda *arguments: (_ for _ in ()).throw(DataError("no step was made")))
        assert run("compare", small_mnist, "--overwrite", "--lr", "0.01") == 1
    assert outcome("out") == before
    with monkeypatch.context() as patch:
        Stop(patch, 1)
        assert run("compare", small_mnist, "--overwrite", "--lr", "0.01") == 130
    assert files() == [".lock", "checkpoint-dense-seed0.pt"]


# ---------------------------------------------------------------- signals


MANY_STEPS = ["--batch-size", "1", "--epochs", "15", "--seeds", "0"]


def started(command, data, *options, out="out"):
    """The command in a process of its own, when it trains."""
    process = subprocess.Popen(
        commands.command(*arguments(command, data, *MANY_STEPS, *options, out=out)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()  # of an epoch, or of what is continued
    return process


@pytest.mark.slow  # a minute for each command, and longer than its time limit on a busy machine
@pytest.mark.parametrize("command", ["train", "compare", "simplify"])
def test_a_stopped_process_saves_its_steps_and_ends_as_an_undisturbed_one(small_mnist, command):
    assert run(command, small_mnist, *MANY_STEPS, out="whole") == 0
    for number, (signum, code) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]):
        process = started(command, small_mnist, *(["--resume"] if number else []))
        time.sleep(0.2 * number)
        process.send_signal(signum)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code
        assert "Traceback" not in said
        if code > 0:
            assert "continue with --resume" in said
        assert any(name.startswith("checkpoint") for name in files())
    assert run(command, small_mnist, *MANY_STEPS, "--resume") == 0
    assert outcome("out") == outcome("whole")
    assert files() == files("whole")


# ---------------------------------------------------------------- a full disk


def limited(command, data, size, *options):
    """The command where no file can be larger than so many bytes."""
    return commands.run(
        *arguments(command, data, *options),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.parametrize(
    ("command", "name"),
    [("compare", "checkpoint-dense-seed0.pt"), pytest.param("train", "checkpoint.pt", marks=SLOW)],
)
def test_a_full_disk_is_found_before_training(small_mnist, command, name):
    done = limited(command, small_mnist, 1000)
    assert done.returncode == 1
    assert done.stderr == f"meprop: error: [Errno 27] File too large: '{Path.cwd()}/out/{name}'\n"


FAILING = ["checkpoint", "result.json", "curves.png"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("failing", FAILING)
def test_what_was_computed_is_shown_though_it_cannot_be_saved(small_mnist, monkeypatch, capsys, command, failing):
    from meprop import machine

    fsync = os.fsync

    def full(descriptor):
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(machine.os, "fsync", full)
    code = run(command, small_mnist, "--seeds", "0")
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out
    assert f"No space left on device: '{Path.cwd()}/out/{failing}" in shown.err
    assert code == (0 if failing == "checkpoint" and command != "train" else 1)
    assert "Traceback" not in shown.err
    assert not list(Path("out").glob("*.tmp"))


def test_a_folder_that_is_deleted_while_it_is_trained_for(small_mnist, monkeypatch, capsys):
    import shutil

    update = tracking.LiveCurves.update

    def delete(curves, trainer):
        shutil.rmtree("out", ignore_errors=True)
        update(curves, trainer)

    monkeypatch.setattr(tracking.LiveCurves, "update", delete)
    assert run("compare", small_mnist, "--seeds", "0") == 1
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out
    assert f"No such file or directory: '{Path.cwd()}/out/result.json'" in shown.err


def test_a_terminal_that_goes_away_does_not_end_a_training(small_mnist):
    """Under nohup and the like, when the window is closed."""
    import pty

    master, slave = pty.openpty()
    command = commands.command(*arguments("train", small_mnist, "--epochs", "5", "--batch-size", "4"))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env={**os.environ, "TERM": "dumb"}) as run:
        os.close(slave)
        os.read(master, 100)  # of the first epoch
        os.close(master)
    assert run.returncode == 0
    assert len(json.loads(Path("out/result.json").read_text())["runs"][0]["curve"]) == 5

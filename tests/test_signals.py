"""Ctrl-C and requests to end, at every stage of a command: the documented exit code, what is kept, and no traceback."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

from meprop import cli
from meprop.bench import conv
from meprop.cli.stop import Stopped, StopRequest
from meprop.training import checkpoint
from meprop.training.loop import Trainer
from test_interruptions import outcome, run

pytestmark = pytest.mark.usefixtures("no_drawing")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """Signals are ignored where the tests run under nohup, or in the background of a script."""
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def at_call(monkeypatch, owner, name, calls):
    """Sends this process a signal at calls of a function: from the number of the call to the signal."""
    original, count = getattr(owner, name), [0]

    def called(*arguments, **options):
        count[0] += 1
        if count[0] in calls:
            signal.raise_signal(calls[count[0]])
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("form", [["-m", "meprop"], ["-m", "meprop.cli"], ["meprop"]])
def test_while_torch_is_imported(tmp_path, form, signum):
    (tmp_path / "torch.py").write_text(f"import os, time; os.kill(os.getpid(), {int(signum)}); time.sleep(60)")
    (tmp_path / "meprop").write_text("from meprop.cli import main")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *form, "doctor"], capture_output=True, text=True, timeout=50, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (128 + signum, "meprop: interrupted\n")


def test_a_program_that_imports_meprop_keeps_its_own_handlers(tmp_path):
    (tmp_path / "torch.py").write_text("import os, time; os.kill(os.getpid(), 15); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "import meprop"], timeout=50, check=False, env=environment)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("command", ["train", "compare", "simplify"])
def test_while_data_are_read(small_mnist, monkeypatch, capsys, command, signum, hidden):
    from meprop.tasks import mnist

    def read(path):
        try:
            signal.raise_signal(signum)
        except KeyboardInterrupt as error:
            if hidden:  # as numpy does when it is imported
                raise ImportError("something could not be imported") from error
            raise

    before = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(mnist, "read_idx", read)
    assert run(command, small_mnist) == 128 + signum
    assert capsys.readouterr().err == "meprop: interrupted\n"
    assert not Path("out").exists()
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.fixture(scope="module")
def undisturbed(small_mnist, tmp_path_factory):
    """What each command comes to."""

    @functools.cache
    def outcome_of(command):
        out = tmp_path_factory.mktemp(command) / "out"
        assert run(command, small_mnist, "--seeds", "0", out=str(out)) == 0
        return outcome(out)

    return outcome_of


@pytest.mark.parametrize("step", [1, 5, 11, 12, 13])  # an epoch has 10 steps, and two runs take turns
@pytest.mark.parametrize(("command", "signum"), [("train", signal.SIGTERM), ("compare", signal.SIGINT)])
def test_while_training(small_mnist, undisturbed, monkeypatch, capsys, command, signum, step):
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "_train_step", {step: signum})
        assert run(command, small_mnist, "--seeds", "0") == 128 + signum
    said = capsys.readouterr().err
    assert "continue with --resume" in said
    assert "Traceback" not in said
    assert run(command, small_mnist, "--seeds", "0", "--resume") == 0
    assert outcome("out") == undisturbed(command)


def test_a_second_time_while_the_step_is_saved(small_mnist, monkeypatch, capsys):
    assert run("train", small_mnist, out="whole") == 0
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "_train_step", {13: signal.SIGINT})
        at_call(patch, os, "fsync", {3: signal.SIGTERM})  # the first epoch's checkpoint has two
        assert run("train", small_mnist) == 143
    assert "Traceback" not in capsys.readouterr().err
    assert not list(Path("out").glob("*.tmp"))
    assert checkpoint.exists(Path("out/checkpoint.pt"))
    assert run("train", small_mnist, "--resume") == 0
    assert outcome("out") == outcome("whole")


def test_a_third_time_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
            try:
                signal.raise_signal(signal.SIGINT)
            except Stopped:
                signal.raise_signal(signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


BENCH = ["bench", "conv", "--seconds", "0.001", "--out", "out", "--cases"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_benchmark_shows_and_saves_what_it_has_measured(monkeypatch, capsys, times):
    cases = [case.name for case in conv.Conv.default_cases()[:3]]
    count = [0]

    def measured(case, seconds):
        count[0] += 1
        if count[0] == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return conv.CaseResult(case.name, case, "not looked at")

    monkeypatch.setattr(conv, "run_case", measured)
    assert cli.main([*BENCH, *cases]) == 130
    shown = capsys.readouterr()
    finished = 2 if times == 1 else 1  # the first time the case is finished
    assert len(json.loads(Path("out/result.json").read_text())["cases"]) == finished
    assert shown.out.count("WRONG: ") == finished
    assert "interrupted" in shown.err


def test_a_benchmark_that_has_measured_nothing_leaves_nothing(monkeypatch):
    def stopped(case, seconds):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(conv, "run_case", stopped)
    assert cli.main([*BENCH, "*"]) == 143
    assert not Path("out/result.json").exists()

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

import commands
import meprop
from interrupted import write_mnist
from meprop import cli, machine
from meprop.cli import messages
from meprop.cli.compare import Compare
from meprop.cli.main import parse
from meprop.cli.simplify import Simplify
from meprop.cli.train import Train
from meprop.tasks.mnist import MnistConfig
from meprop.training import checkpoint, tracking
from meprop.training.config import TrainingConfig
from meprop.training.loop import Trainer

SMALL_DENSE = ["--hidden", "128", "--dev-size", "20", "--accelerator", "cpu"]
SMALL = [*SMALL_DENSE, "--k", "5"]
SLOW = pytest.mark.slow  # of a kind of which another case is run always


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("data"), 100, packed=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, no_drawing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEPROP_DATA", raising=False)


def compare(data, *options):
    return cli.main(["compare", "mnist", "--data-dir", str(data), "--epochs", "2", *SMALL, *options])


def train(data, *options):
    return cli.main(["train", "mnist", "--data-dir", str(data), "--epochs", "3", *SMALL, "--dropout", "0.2", *options])


def err(capsys):
    return capsys.readouterr().err


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text())


def test_compare_writes_the_result_and_shows_it(data, capsys):
    assert compare(data, "--seeds", "0", "1") == 0
    content = result("runs/compare-mnist")
    assert set(content) == {"task", "config", "machine", "versions", "commit", "command", "runs", "verdicts", "sha256"}
    assert [(each["rule"], each["seeds"], each["margin"]) for each in content["verdicts"]] == [("topk", [0, 1], 0.2)]
    assert [(run["rule"], run["seed"]) for run in content["runs"]] == [
        ("dense", 0), ("topk", 0), ("dense", 1), ("topk", 1)
    ]  # fmt: skip
    assert content["config"]["task"]["hidden"] == [128]
    assert (content["config"]["training"]["k"], content["config"]["training"]["epochs"]) == (5, 2)
    assert Path("runs/compare-mnist/curves.png").exists()  # what is in it: tests/reporting
    shown = capsys.readouterr()
    for text in ("16 x 128", "test accuracy", "backward, s", "density", "3.9%", "±", "of margin 0.2", ", 2 seeds"):
        assert text in shown.out
    assert "topk k=5, seed 1: epoch 2/2" in shown.err  # no terminal: a line per epoch


def test_simplify_trains_three_ways_and_leaves_small_models(data, capsys):
    options = ["--seeds", "0", "1", "--epochs", "3", "--cycle", "1", "--threshold", "0.2", "--seconds", "0.01"]
    assert cli.main(["simplify", "mnist", "--data-dir", str(data), *SMALL, *options]) == 0
    content = result("runs/simplify-mnist")
    assert [(run["rule"], run["seed"]) for run in content["runs"]] == [
        (rule, seed) for seed in (0, 1) for rule in ("dense", "topk", "simplified")
    ]
    simplify = {"threshold": 0.2, "of_mean": None, "checks": 8, "cycle": 1, "warmup": 0}
    simplify |= {"max_removal": 1.0, "min_units": 1}
    assert content["config"]["simplify"] == simplify
    for run, model in zip(content["runs"], content["models"], strict=True):
        assert (model["rule"], model["seed"]) == (run["rule"], run["seed"])
        assert model["first_step"] > 0
        assert model["inference"]["p20"] > 0
        width = run["checks"][-1]["widths"]["0"] if run["rule"] == "simplified" else 128
        assert model["width"] == width
        assert model["parameters"] == width * (16 + 1) + 3 * (width + 1)
        if run["rule"] == "simplified":
            assert 0 < width < 128
            compact = torch.load(f"runs/simplify-mnist/compact-seed{run['seed']}.pt", weights_only=False)
            assert compact[0].out_features == width
    for picture in ("curves.png", "widths.png", "activity.png"):
        assert Path("runs/simplify-mnist", picture).exists()
    shown = capsys.readouterr()
    for text in ("of 128", "can be pruned", "the model's output", "parameters, thousands", "inference, ms"):
        assert text in shown.out
    assert "simplified k=5, seed 1: epoch 3/3" in shown.err


def test_random_k_is_compared_and_trained_like_top_k(data, capsys):
    assert compare(data, "--rule", "random", "--out", "pair") == 0
    assert [run["rule"] for run in result("pair")["runs"]] == ["dense", "random"]
    assert Path("pair/curves.png").exists()
    shown = capsys.readouterr().out
    for text in ("random", "3.9%", " random: ", "1 seed"):
        assert text in shown
    assert train(data, "--rule", "random", "--out", "one") == 0
    assert result("one")["config"]["rule"] == result("one")["runs"][0]["rule"] == "random"
    assert train(data, "--rule", "topk", "--out", "one", "--resume") == 2
    assert "rule was 'random', now 'topk'" in err(capsys)


def test_a_logger_that_fails_ends_no_training(data, capsys, monkeypatch):
    monkeypatch.setattr("lightning_fabric.loggers.TensorBoardLogger.log_metrics", lambda *_: 1 / 0)
    assert train(data, "--tensorboard", "--out", "one") == 0
    assert "live curves could not be written: division by zero" in capsys.readouterr().err
    assert result("one")["runs"][0]["curve"][-1]["live"]["energy"] < 1


def test_nothing_is_replaced_unless_asked_for(data, capsys):
    assert compare(data) == 0
    before = Path("runs/compare-mnist/result.json").read_bytes()
    assert compare(data) == 2
    assert "result.json exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert Path("runs/compare-mnist/result.json").read_bytes() == before
    assert compare(data, "--overwrite", "--seeds", "3") == 0
    assert result("runs/compare-mnist")["runs"][0]["seed"] == 3


def test_a_bad_request_does_not_touch_an_earlier_result(data):
    assert compare(data) == 0
    before = Path("runs/compare-mnist/result.json").read_bytes()
    assert compare("missing", "--overwrite") == 1
    assert compare(data, "--overwrite", "--dev-size", "1000") == 2
    assert Path("runs/compare-mnist/result.json").read_bytes() == before


@pytest.mark.parametrize(("every", "step"), [((), 0), (("--checkpoint-every", "3"), 3)])
def test_an_interrupted_run_continues_bit_for_bit(data, monkeypatch, capsys, every, step):
    assert train(data, "--out", "whole") == 0
    save = checkpoint.save

    def save_then_ctrl_c(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_ctrl_c)
        assert train(data, "--out", "part", *every) == 130
    assert "part/checkpoint.pt is kept: continue with --resume" in err(capsys)
    assert checkpoint.read(Path("part/checkpoint.pt"))["state"]["step"] == step
    assert not Path("part/result.json").exists()

    assert train(data, "--out", "part") == 2  # neither --resume nor --overwrite
    assert "checkpoint.pt exists" in err(capsys)
    assert train(data, "--out", "part", "--resume", *every) == 0
    whole, part = result("whole")["runs"][0], result("part")["runs"][0]
    assert (part["dev"], part["test"]) == (whole["dev"], whole["test"])
    states = [checkpoint.read(Path(name, "checkpoint.pt"))["state"] for name in ("whole", "part")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_resuming_with_other_options_or_from_a_damaged_file_is_refused(data, capsys):
    assert train(data, "--out", "x") == 0
    saved = Path("x/checkpoint.pt").read_bytes()
    assert train(data, "--out", "x", "--resume", "--lr", "0.01") == 2
    assert re.search(r"checkpoint\.pt belongs to a run with other settings \(lr was 0\.001, now 0\.01\)", err(capsys))
    assert Path("x/checkpoint.pt").read_bytes() == saved
    Path("x/checkpoint.pt").write_bytes(saved[:1000])
    assert train(data, "--out", "x", "--resume") == 1
    assert re.search(r"checkpoint\.pt is damaged .*--overwrite", err(capsys))


def test_a_schedule_is_written_down_and_kept(data, capsys):
    schedule = {"noise": 0.5, "noise_start": 0.1, "noise_of": "model", "dense_warmup_steps": 2, "dense_end_steps": 3}
    options = [text for name, value in schedule.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert train(data, "--rule", "sampled", *options, "--out", "x") == 0
    config = result("x")["config"]["training"]
    assert {name: config[name] for name in schedule} == schedule
    assert train(data, "--rule", "sampled", *options[:-1], "4", "--out", "x", "--resume") == 2
    assert "dense_end_steps was 3, now 4" in err(capsys)


def test_resuming_on_other_data_is_refused(data, tmp_path, capsys):
    assert train(data, "--out", "x") == 0
    shutil.copytree(data, "moved")
    assert train("moved", "--out", "x", "--resume") == 0  # where they lie does not matter
    (images,) = Path("moved").glob("t10k-images*")
    pixels = bytearray(gzip.decompress(images.read_bytes()))
    pixels[-1] ^= 1
    images.write_bytes(gzip.compress(bytes(pixels)))
    assert train("moved", "--out", "x", "--resume") == 2
    assert re.search(r"checkpoint\.pt belongs to a run with other settings \(data was '\w+', now '\w+'\)", err(capsys))


@pytest.mark.parametrize("command", [train, compare])
def test_the_commit_is_read_before_anything_else(monkeypatch, command):
    def commit():
        raise ValueError("read")

    monkeypatch.setattr(tracking, "commit", commit)
    assert command("missing") == 70  # and not the 1 of missing data


def test_resuming_without_a_checkpoint_says_that_it_starts_anew(data, capsys):
    options = ["--data-dir", str(data), "--epochs", "3", *SMALL_DENSE, "--dropout", "0.2"]
    assert cli.main(["train", "mnist", *options, "--out", "x", "--resume", "--rule", "dense"]) == 0
    assert "checkpoint.pt does not exist: starting from the beginning" in err(capsys)
    assert result("x")["runs"][0]["rule"] == "dense"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--epochs", "0"], 2, "--epochs must be at least 1, got 0"),
        (["--rule", "dense", "--k-start", "9"], 2, "--k-start: --rule dense keeps everything, and would ignore that"),
        (["--rule", "dense", "--noise", "0.1", "--fuse"], 2, "--noise, --fuse: --rule dense keeps everything"),
        (["--seeds", "1", "1"], 2, "--seeds must be one or more different"),
        (["--k", "0"], 2, "k=0 keeps nothing"),
        (["--k", "1.5"], 2, "k=1.5 is out of range"),
        (["--seeds", str(2**64)], 2, "--seeds must be one or more different integers from 0 to 2**64 - 1"),
        (["--lr", "-1"], 2, "--lr must be a positive number"),
        (["--data-dir", "nowhere"], 1, "nowhere"),
        (["--checkpoint-every", "-1"], 2, "--checkpoint-every must be 0 or more"),
        (["--seeds", "1", "2"], 2, "give one seed"),
        (["--resume", "--overwrite"], 2, "give one of them"),
    ],
)
def test_wrong_requests_end_in_one_line(capsys, options, code, message):
    assert cli.main(["train", "mnist", *options]) == code
    shown = err(capsys)
    assert message in shown
    assert shown.startswith("meprop: error: ")
    assert shown.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [["--nonsense"], ["compare", "mnist", "--epochs", "x"], ["train", "mnits"], []])
def test_what_does_not_parse_is_refused(capsys, arguments):
    assert cli.main(arguments) == 2
    assert "Traceback" not in err(capsys)


@pytest.mark.parametrize(("text", "k"), [("20", 20), ("0.05", 0.05), ("1", 1), ("1.0", 1.0)])
def test_k_is_a_count_or_a_share(text, k):
    command = parse(["compare", "mnist", "--k", text])
    assert isinstance(command, Compare)
    assert command.training.k == k
    assert type(command.training.k) is type(k)


@pytest.mark.parametrize("command", [Train, Compare, Simplify])
def test_help_explains_every_option_with_its_default(capsys, command):
    assert cli.main([command.__name__.lower(), "mnist", "--help"]) == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for fields in (command, MnistConfig, TrainingConfig):
        for field in dataclasses.fields(fields):
            if field.name in ("task", "training", "simplify"):
                continue
            option = f"--{field.name.replace('_', '-')} "
            explanation = shown.split(option, 1)[1].split(" --", 1)[0]
            assert "(default:" in shown.split(option, 1)[1], field.name
            assert len(explanation.split()) > 3, field.name


def test_data_says_what_is_there(data, capsys):
    assert cli.main(["data", "mnist", "--data-dir", str(data), "--dev-size", "20"]) == 0
    shown = capsys.readouterr().out
    assert "80 training, 20 development, 30 test images of 4 x 4 pixels in 3 classes" in shown
    assert str(data) in shown


def test_doctor_downloads_nothing_and_finds_the_data(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "cache"))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "not here yet; get them with: meprop data mnist" in shown
    assert "native:" in shown
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("MEPROP_DATA", str(data))
    assert cli.main(["doctor"]) == 0
    assert f"mnist: {data}" in capsys.readouterr().out


def test_a_missing_extra_is_named_with_the_remedy():
    done = commands.run("data", without=["tyro"])
    assert done.returncode == 1
    assert done.stderr == "meprop: error: tyro is not installed: pip install 'meprop[tasks]'\n"


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        *(("-m meprop", arguments) for arguments in ("", "-h", "--help", "--version", "tarin", "--hlep")),
        *((form, "--help") for form in ("-m meprop.cli", "meprop")),
    ],
)
def test_what_names_no_command_is_answered_without_torch(tmp_path, monkeypatch, capsys, form, arguments):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    (tmp_path / "meprop").write_text("import sys; from meprop.cli import main; sys.exit(main())")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    done = subprocess.run(
        [sys.executable, *form.split(), *arguments.split()], capture_output=True, text=True, check=False
    )
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as slowly:
        code = cli.main(arguments.split())
    slowly.seek(0)
    assert (done.returncode, done.stdout, done.stderr) == (code, slowly.read(), capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--version"], ["train", "digits", "--help"], ["doctor"]])
def test_a_reader_that_leaves_ends_the_command_silently(arguments):
    with subprocess.Popen(commands.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_command_without_output_is_done():
    closed = ["sh", "-c", '"$@" >&-', "sh", *commands.command("--version")]
    done = subprocess.run(closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_module_that_is_run_and_imports_meprop_is_not_the_command(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    (tmp_path / "other.py").write_text("import sys; import meprop")
    done = subprocess.run(
        [sys.executable, "-m", "other", "meprop"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "torch is imported" in done.stderr


def test_garbage_is_collected_again_when_a_command_runs(tmp_path):
    script = tmp_path / "meprop"
    script.write_text(
        "import gc, sys\nfrom meprop.cli import main\nprint(gc.isenabled())\nmain()\nprint(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, script, "doctor"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:: len(done.stdout.splitlines()) - 1] == ["False", "True"]


def test_python_m_is_the_same_command(monkeypatch, capsys):
    """That a process starts by each of them: test_signals.py."""
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)  # it would be that of later tests

    def shown(start):
        monkeypatch.setattr(sys, "argv", ["meprop", "train", "mnits"])
        with pytest.raises(SystemExit) as ended:
            start()
        return ended.value.code, *capsys.readouterr()

    script = shown(lambda: sys.exit(cli.main()))
    assert script[0] == 2
    assert "mnits" in script[2]
    for module in ("meprop", "meprop.cli"):
        assert shown(lambda name=module: runpy.run_module(name, run_name="__main__", alter_sys=True)) == script


def test_help_breaks_lines_for_lists_and_not_where_the_source_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    def lines(*command):
        assert cli.main([*command, "--help"]) == 0
        return [line.strip(" │") for line in capsys.readouterr().out.splitlines()]

    shown = lines("train", "digits")
    assert any("as there, or as at the strongest end of the paper's ranges. (default: paper)" in each for each in shown)
    for listed in ("2: 1500-1000-500.", "1 or more: Where no processor", "batch: The same k features"):
        assert any(each.startswith(listed) for each in shown), listed
    assert not any(each.startswith("None: ") for each in shown)  # the end of a text, and no list
    of_generic = lines("bench", "linear")
    assert any(each.startswith("--out") and each.endswith("(default: None)") for each in of_generic)


def test_every_benchmark_is_a_command_with_its_own_help(capsys):
    for name in ("linear", "lstm", "conv", "step", "layers"):
        assert cli.main(["bench", name, "--help"]) == 0
        shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        assert shown.startswith(f"usage: meprop bench {name} ")
        assert "Time " in shown


@pytest.mark.parametrize(("arguments", "asks"), [(["--keep-memory"], True), ([], False)])
def test_a_benchmark_keeps_memory_only_where_it_is_asked_to(tmp_path, monkeypatch, capsys, arguments, asks):
    asked = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: asked.append(True))  # and says no
    options = [
        "--models",
        "6-140-130-3@5",
        "--train-steps",
        "0",
        "--seconds",
        "0.001",
        "--out",
        str(tmp_path / "out"),
        *arguments,
    ]
    assert cli.main(["bench", "step", *options]) == int(asks)
    assert bool(asked) == asks
    assert ("--keep-memory: the C library" in capsys.readouterr().err) == asks


def test_training_keeps_memory_where_the_process_is_the_command_lines(data, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)
    command = ["compare", "mnist", "--data-dir", str(data), "--out", str(data / "kept"), "--epochs", "1", *SMALL]
    assert cli.main(command) == 0
    assert not asked
    monkeypatch.setattr(sys, "argv", ["meprop", *command, "--overwrite"])
    assert cli.main() == 0
    assert asked


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("compare minst", "did you mean mnist?"),
        ("compare MNIST", "did you mean mnist?"),
        ("compair mnist", "did you mean compare?"),
        ("docter", "did you mean doctor?"),
        ("data taging", "did you mean tagging?"),
        ("simplify --epochs 3 parsin", "did you mean parsing?"),
        ("bench lineer", "did you mean linear?"),
        ("bench layers tagger", "did you mean tagging?"),
        ("train mnist --rule topc", "did you mean topk?"),
        ("compare mnist --rule=compensate", "did you mean compensated?"),
        ("train mnist --optimizer adamm", "did you mean adam?"),
        ("train mnist --scope exmaple", "did you mean example?"),
        ("reproduce table1-mnist-adam", "did you mean table-1-mnist-adam?"),
        ("compare mnist --epocs 3", "--epochs"),
        ("compare mnist --overwite", "--overwrite"),
        ("reproduce --sedes 1", "--seeds"),
        ("bench linear --treads 2", "--threads"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_right_one(capsys, arguments, meant):
    assert cli.main(arguments.split()) == 2
    shown = err(capsys)
    assert meant in shown
    assert shown.count("did you mean") == meant.count("did you mean")


@pytest.mark.parametrize(
    "arguments", ["compare xyzzy", "train mnist --rule xyzzy", "compare", "train mnist --epochs x"]
)
def test_what_is_like_no_name_is_answered_with_none(capsys, arguments):
    assert cli.main(arguments.split()) == 2
    assert "did you mean" not in err(capsys)


EXTRA_MODULES = sorted({name for names in messages.extras().values() for name in names})


def test_the_extras_are_those_of_the_package():
    assert messages.extras()["hf"] == ["accelerate", "transformers"]
    assert {"tyro", "rich", "lightning_fabric"} < set(messages.extras()["tasks"])


def test_version_and_doctor_need_no_extras():
    first = "from meprop.cli import main; print(main(['--version']))"
    done = commands.run("doctor", without=EXTRA_MODULES, before=first)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"meprop {meprop.__version__}\n0\n")
    for text in ("native:", "torch: ", "pip install 'meprop[tasks]'", "pip install 'meprop[hf]'", "not looked for"):
        assert text in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        *("tyro", "typeguard", "safetensors"),
        *(pytest.param(each, marks=SLOW) for each in ("rich", "lightning_fabric", "matplotlib", "filelock")),
    ],
)
def test_a_missing_module_of_an_extra_is_named_with_the_remedy(module, data):
    command = "reproduce table-5" if module == "typeguard" else f"compare mnist --data-dir {data} --epochs 1"
    done = commands.run(*command.split(), *([] if module == "typeguard" else SMALL), without=[module])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"meprop: error: {module} is not installed: pip install 'meprop[tasks]'"


# ---------------------------------------------------------------- the terminal, the home directory, faults


@pytest.mark.parametrize(
    ("encoding", "out"),
    [
        ("ascii", b"plain"),
        pytest.param("latin-1", b"plain", marks=SLOW),
        pytest.param("utf-8", b"caf\xe9", marks=SLOW),
    ],
)
def test_what_a_terminal_cannot_show_does_not_end_a_command(data, encoding, out):
    options = ["--data-dir", str(data), *SMALL, "--epochs", "1", "--seeds", "0", "1", "--out", os.fsdecode(out)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = commands.run("compare", "mnist", *options, errors="replace", env=environment)
    assert done.returncode == 0, done.stderr
    assert "written: " in done.stdout
    assert Path(os.fsdecode(out), "result.json").exists()


@pytest.mark.parametrize("term", ["dumb", pytest.param("xterm", marks=SLOW)])
def test_progress_shows_on_every_terminal(data, term):
    import pty

    master, slave = pty.openpty()
    command = commands.command("train", "mnist", "--data-dir", str(data), *SMALL, "--epochs", "3")
    environment = {**os.environ, "TERM": term}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while part := _read(master):
            shown += part
    assert process.returncode == 0
    for epoch in (1, 2, 3) if term == "dumb" else (3,):
        assert f"epoch {epoch}/3".encode() in shown
    assert (b"\x1b" in shown) == (term != "dumb")


def _read(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


def test_a_tilde_is_the_home_directory(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train(data, "--out=~/runs") == 0
    assert (tmp_path / "home/runs/result.json").exists()
    assert not Path("~").exists()
    for options in (["--out", "~nobody-here/x"], ["--data-dir=~nobody-here/x"]):
        assert cli.main(["train", "mnist", *options]) == 2
        assert "~nobody-here/x: there is no such home directory" in " ".join(err(capsys).split())


FAULTS = {
    "ValueError of Python": "int('x')",
    "ValueError of torch": "torch.ones(2).numpy().reshape(3)",
    "TypeError": "len(3)",
    "RuntimeError": "torch.ones(2) @ torch.ones(3)",
    "KeyError": "{}['x']",
    "AssertionError": "exec('assert False')",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_our_own_is_no_mistake_of_the_user(data, monkeypatch, tmp_path, capsys, fault):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Trainer, "_clock", lambda trainer: eval(FAULTS[fault]))
    assert train(data) == 70
    shown = err(capsys)
    assert "internal error: " in shown
    assert "Traceback" not in shown
    (path,) = tmp_path.glob("meprop-fault-*.txt")
    assert shown.rstrip().endswith(f"its traceback, to be reported, is {path}")
    assert "_train_step" in path.read_text()


def test_a_fault_that_cannot_be_written_down_is_shown(data, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setattr(Trainer, "_clock", lambda trainer: len(3))
    assert train(data) == 70
    assert "Traceback" in err(capsys)


def test_an_interrupt_while_it_imports_shows_no_traceback():
    interrupt = (
        "import builtins; original = builtins.__import__\n"
        "def late(name, *rest):\n"
        "    if name == 'meprop.cli.doctor': raise KeyboardInterrupt\n"
        "    return original(name, *rest)\n"
        "builtins.__import__ = late"
    )
    done = commands.run("doctor", before=interrupt)
    assert (done.returncode, done.stderr) == (130, "meprop: interrupted\n")


def test_several_rules_are_compared_with_settings_of_their_own(data, capsys):
    rules = ["topk", "topk:k=9,scope=global", "dense:precision=bf16-mixed"]
    assert compare(data, "--rule", *rules, "--seeds", "0", "1") == 0
    content = result("runs/compare-mnist")
    assert [(run["rule"], run["seed"]) for run in content["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("dense", *rules)
    ]
    assert [run["k"] for run in content["runs"][:4]] == [None, 5, 9, None]
    assert [verdict["rule"] for verdict in content["verdicts"]] == rules
    shown = capsys.readouterr().out
    for rule in rules:
        assert f" {rule}: " in shown
    assert compare(data, "--rule", *rules, "--seeds", "0", "1", "2", "--resume") == 0
    assert len(result("runs/compare-mnist")["runs"]) == 12
    assert compare(data, "--rule", *rules[:2], "--seeds", "0", "1", "2", "--resume") == 2
    assert "rule was" in err(capsys)


def test_a_comparison_of_equal_seconds(data, capsys):
    assert compare(data, "--budget-seconds", "0.4", "--seeds", "0", "1") == 0
    content = result("runs/compare-mnist")
    for run in content["runs"]:
        assert run["seconds"]["step"] >= 0.4
        first, last = run["curve"]
        assert first["seconds"] >= 0.2
        assert last["seconds"] >= 0.4
    assert [verdict["budget"] for verdict in content["verdicts"]] == ["seconds"]
    shown = capsys.readouterr().out
    for text in ("seconds of training each", "whole step, ms/step"):
        assert text in shown


def test_the_result_is_there_after_each_epoch(data, monkeypatch, capsys):
    written = []
    write = tracking.write_result

    def watched(path, content):
        written.append([(run.rule, run.seed, run.epochs) for run in (*content.runs, *content.running)])
        write(path, content)
        if len(written) == 1:
            shown = result(path.parent)
            assert (shown["runs"], [run["epochs"] for run in shown["running"]]) == ([], [1, 1])

    monkeypatch.setattr(tracking, "write_result", watched)
    assert compare(data, "--seeds", "3", "4") == 0
    first, second = [("dense", 3), ("topk", 3)], [("dense", 4), ("topk", 4)]
    assert written == [
        [(*each, epochs) for each in first] for epochs in (1, 2, 2)
    ] + [[(*each, 2) for each in first] + [(*each, epochs) for each in second] for epochs in (1, 2, 2)]  # fmt: skip
    assert "running" not in result("runs/compare-mnist")

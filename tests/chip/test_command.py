"""`meprop chip` on the command line."""

from __future__ import annotations

import json

import pytest

from meprop import cli

SHORT = ["--splits", "2", "--epochs", "2", "--neurons", "4"]


def test_train_compares_and_records(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["chip", "train", "wine", *SHORT, "--out", str(out)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["float64, all deltas", "18 bits, all deltas", "18 bits, k=0.25"]
    record = json.loads((out / "result.json").read_text())
    assert record["task"] == "chip-train"
    assert record["config"]["data"] == "wine"
    assert {"scikit-learn", "amaranth"} <= record["versions"].keys()
    assert [len(each["accuracy"]) for each in record["results"]] == [2, 2, 2]
    assert cli.main(["chip", "train", "wine", *SHORT, "--out", str(out)]) == 2
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert cli.main(["chip", "train", "wine", *SHORT, "--k", "None", "--out", str(out), "--overwrite"]) == 0
    assert len(json.loads((out / "result.json").read_text())["results"]) == 2


def test_explore_draws(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["chip", "explore", *SHORT, "--words", "8", "12", "--ks", "1.0", "1", "--out", str(out)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "float64, all deltas",
        "8 bits, all deltas",
        "8 bits, k=1",
        "12 bits, all deltas",
        "12 bits, k=1",
    ]
    assert (out / "explore.png").read_bytes().startswith(b"\x89PNG")


def test_simulate_says_what_was_compared(tmp_path, capsys):
    pytest.importorskip("amaranth", reason="the core is made with amaranth, of the extra [chip]")
    file = tmp_path / "core.vcd"
    options = ["--inputs", "2", "--neurons", "2", "--outputs", "1", "--k", "1", "--patterns", "1"]
    assert cli.main(["chip", "simulate", *options, "--waveforms", str(file)]) == 0
    assert "every error, output and weight is the model's" in capsys.readouterr().out
    assert "$enddefinitions" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--neurons", "61"], "neurons=61; it must be from 1 to 60"),
        (["train", "--splits", "0"], "splits=0; it must be at least 1"),
        (["explore", "--words", "7", "--out", "OUT"], "word=7; it must be from 8 to 24"),
        (["explore", "--ks", "--out", "OUT"], "--words and --ks need at least one value each"),
        (["simulate", "--compiled", "--waveforms", "x.vcd"], "--waveforms with --compiled; leave out one of them"),
        (["simulate", "--rate", "0.3"], "rate=0.3; it must be a power of two"),
    ],
)
def test_wrong_options_are_refused_in_words(tmp_path, capsys, arguments, message):
    arguments = [str(tmp_path / "out") if each == "OUT" else each for each in arguments]
    assert cli.main(["chip", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()

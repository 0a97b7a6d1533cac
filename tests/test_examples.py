"""The examples run, on a tiny budget, and print dense beside sparse."""

import json
import math
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


PRINTING = ["huggingface_encoder.py", "huggingface_trainer.py", "lightning_callback.py"]


def losses(printed: str) -> tuple[str, str]:
    """Of the dense line and of the sparse line below it."""
    found = re.findall(r"^(dense|sparse) +loss (\S+) +\S+ ms a step", printed, re.MULTILINE)
    assert [name for name, _ in found] == ["dense", "sparse"]
    assert all(math.isfinite(float(loss)) for _, loss in found)
    return found[0][1], found[1][1]


@pytest.mark.parametrize("name", PRINTING)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")  # of k = 1.0
def test_an_example_prints_dense_and_sparse_which_differ_by_what_is_left_out(name, monkeypatch, capsys):
    run(monkeypatch, name, "--steps", "2", "--k", "0.02")
    dense, sparse = losses(capsys.readouterr().out)
    assert dense != sparse
    run(monkeypatch, name, "--steps", "2", "--k", "1.0")
    assert losses(capsys.readouterr().out) == (dense, dense)


@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")  # of k = 1.0
def test_the_image_classifier_trains_on_images_of_ones_own(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", random.integers(0, 256, (count, 8, 9))),
            ("labels-idx1", np.arange(count) % 4),
        ):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    arguments = ("image_classifier.py", "--data", str(tmp_path), "--steps", "3", "--batch", "20")
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert re.search(r"^4 +Conv2d.* sparse +13 ", printed, re.MULTILINE)
    assert len(re.findall(r"^(?:dense|sparse) .* \d+\.\d\d% of the test images$", printed, re.MULTILINE)) == 2
    dense, sparse = losses(printed)
    assert dense != sparse
    run(monkeypatch, *arguments, "--k", "1.0")
    assert losses(capsys.readouterr().out) == (dense, dense)


TINY = ["--layers", "1", "--width", "128", "--heads", "2", "--context", "8", "--batch", "2", "--evaluate-every", "2"]


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("to be, or not to be: that is the question. " * 20)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        ["--k", "0.1"],
        ["--k", "6", "--scope", "batch", "--sparse-rows", "decay", "--dense", "linear2,self_attn"],
        ["--rule", "compensated", "--seconds", "0.01"],
        ["--rule", "sampled", "--noise", "1.0", "--ceiling", "0.9"],
        ["--rule", "sampled", "--noise", "1.0", "--weight-noise", "2.0", "--ceiling", "0.9"],
    ],
    ids=["per token", "unified", "by time", "drawn", "drawn for each product"],
)
def test_char_gpt_records_dense_and_sparse(options, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "record" / "gpt.json"
    run(monkeypatch, "char_gpt.py", "--data", text, *TINY, "--steps", "3", *options, "--out", str(out))
    record = json.loads(out.read_text())
    assert {"task", "config", "machine", "versions", "commit", "runs"} == set(record)
    dense, sparse = record["runs"]
    assert (dense["rule"], dense["density"]) == ("dense", 1.0)
    assert ("Sampled" if "--noise" in options else "TopK") in sparse["rule"]
    assert 0.05 < sparse["density"] < (0.7 if "--dense" in options or "--noise" in options else 0.2)
    assert sparse["layers"]["head"] == 1.0
    for run_ in record["runs"]:
        assert run_["curve"][-1]["dev"] == run_["dev"]["loss"]
        if "--seconds" in options:
            assert run_["seconds"]["step"] >= 0.01
        else:
            assert [point["step"] for point in run_["curve"]] == [2, 3]
        parts = sum(run_["seconds"][part] for part in ("forward", "backward", "optimizer"))
        assert run_["seconds"]["step"] == pytest.approx(parts)
    if "--seconds" not in options:
        assert dense["dev"]["loss"] != sparse["dev"]["loss"]
    assert re.search(r"^dense .*100\.0%\nsparse .*%$", capsys.readouterr().out, re.MULTILINE)


def test_char_gpt_repeats_itself_and_trains_one_side(text, tmp_path, monkeypatch):
    losses = []
    out = tmp_path / "gpt.json"
    for _ in range(2):
        run(monkeypatch, "char_gpt.py", "--data", text, *TINY, "--steps", "2", "--only", "sparse", "--out", str(out))
        (found,) = json.loads(out.read_text())["runs"]
        losses.append(found["dev"]["loss"])
    assert losses[0] == losses[1]


def test_char_gpt_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MEPROP_DATA", raising=False)
    with pytest.raises(SystemExit):
        run(monkeypatch, "char_gpt.py")
    assert "give --data FILE" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(SystemExit, match="give a longer text"):
        run(monkeypatch, "char_gpt.py", "--data", str(short))


def test_the_benchmark_of_char_gpt_says_that_it_has_nothing_to_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["char_gpt.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES.parent / "benchmarks" / "char_gpt.py"), run_name="__main__")
    assert "give --time, --seeds" in capsys.readouterr().err


def test_the_distributed_example_says_how_few_bytes_are_sent():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "distributed.py"), "--random", "--steps", "20", "--hidden", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240, env=environment).stdout
    found = re.findall(r"^(.+?) +loss ([\d.]+) +([\d.]+) MB", output, re.MULTILINE)
    assert [variant for variant, _, _ in found] == ["dense", "with the hook", "without a wrapper"]
    dense, hook, unwrapped = (float(sent) * 1e6 for _, _, sent in found)
    assert dense == 4 * (784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10)
    rows = 4 * (784 * 6 + 64 + 64 * 6 + 64 + 64 * 10 + 10) + 8 * 128  # k = 6, and the scores
    assert hook == pytest.approx(rows + 64 + 64 + 10, abs=100)  # and a byte for each row
    assert unwrapped == pytest.approx(rows + 64 + 64 + 6, abs=100)
    assert float(found[1][1]) == pytest.approx(float(found[2][1]), abs=0.01)  # the same gradients


def write_digits(folder):
    random = np.random.default_rng(0)
    for split, count in (("train", 5100), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def test_deformed_digits_are_drawn_below_their_own(tmp_path, monkeypatch):
    write_digits(tmp_path)
    run(monkeypatch, "draw_deformed_digits.py", str(tmp_path / "digits.png"), "--data", str(tmp_path))
    pixels = pyplot.imread(tmp_path / "digits.png")[..., 0]
    assert pixels.shape == (10 * 58, 10 * 58)
    rows = pixels.reshape(10, 58, 10, 58).swapaxes(1, 2)
    assert len({row.tobytes() for row in rows.reshape(100, -1)}) == 100


def test_deformed_digits_compares_rules(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path)
    results = tmp_path / "results.json"
    options = ("--steps", "2", "--seeds", "0", "1", "--hidden", "150", "--out", str(results))
    run(monkeypatch, "deformed_digits.py", "--data", str(tmp_path), "--rules", "dense", "rows", "noise", *options)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+) +dev \d+\.\d\d ± \d+\.\d\d% test", printed, re.MULTILINE) == ["dense", "rows", "noise"]
    runs = json.loads(results.read_text())["runs"]
    assert {name: [run["density"] for run in each] for name, each in runs.items() if name != "noise"} == {
        "dense": [1.0, 1.0],
        "rows": [0.04, 0.04],
    }
    assert runs["dense"] != runs["rows"]


TESTS = {
    **dict.fromkeys(PRINTING, test_an_example_prints_dense_and_sparse_which_differ_by_what_is_left_out),
    "image_classifier.py": test_the_image_classifier_trains_on_images_of_ones_own,
    "char_gpt.py": test_char_gpt_records_dense_and_sparse,
    "draw_deformed_digits.py": test_deformed_digits_are_drawn_below_their_own,
    "deformed_digits.py": test_deformed_digits_compares_rules,
    "distributed.py": test_the_distributed_example_says_how_few_bytes_are_sent,
}


def test_every_example_has_a_test_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TESTS)

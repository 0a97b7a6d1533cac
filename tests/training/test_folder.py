"""The folder of an experiment: who owns it, what in it is meprop's, and what is replaced."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

from meprop.errors import MepropError
from meprop.training import folder

OURS = [
    "result.json",
    "checkpoint.pt",
    "checkpoint-before.pt",
    "checkpoint-dense-seed0.pt",
    "checkpoint-topk-seed12-before.pt",
    "checkpoint-topk:k=20,k_ratio=[1,3]-seed0.pt",
    "compact-seed0.pt",
    "curves.png",
    "widths.png",
    "activity.png",
    "performance-step.png",
    "explore.png",
    "tensorboard/topk-seed0/events.out.tfevents.1.host.2.0",
]
NOT_OURS = [
    "notes.txt",
    "checkpoint-mine.pt",
    "my-checkpoint.pt",
    "compact-seed0.pt.bak",
    "compact-seed.pt",
    "old/result.json",
    "figure.png",
    "tensorboard/notes.txt",
    "tensorboard/topk-seed0/notes.txt",
    "tensorboard/other/events.out.tfevents.1.host.2.0",
]


def make(out, names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("earlier")


def left(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("name", OURS)
def test_each_file_of_an_experiment_protects_it(tmp_path, name):
    make(tmp_path, [name])
    with pytest.raises(ValueError, match=rf"{re.escape(name)} exists; give another --out, or --overwrite"):
        folder.check_free(tmp_path)
    assert left(tmp_path) == [name]
    folder.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    folder.check_free(tmp_path)


def test_what_is_not_ours_is_no_obstacle_and_stays(tmp_path):
    make(tmp_path, NOT_OURS)
    folder.check_free(tmp_path)
    make(tmp_path, OURS)
    folder.clear(tmp_path)
    assert left(tmp_path) == sorted(NOT_OURS)


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path):
    make(tmp_path, ["elsewhere/result.json", "out/notes.txt"])
    (tmp_path / "out/result.json").symlink_to(tmp_path / "elsewhere/result.json")
    folder.clear(tmp_path / "out")
    assert left(tmp_path) == ["elsewhere/result.json", "out/notes.txt"]


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    code = f"""
from meprop.training import folder
from pathlib import Path
for _ in range(2):
    input()
    try:
        with folder.owned(Path({str(tmp_path)!r})): print("owned", flush=True)
    except Exception as error: print(type(error).__name__, error, flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, bufsize=1) as process:

        def other():
            process.stdin.write("\n")
            return process.stdout.readline()

        with folder.owned(tmp_path):
            assert f"MepropError {tmp_path}: another meprop command is at work there" in other()
            with pytest.raises(MepropError, match="another meprop command"), folder.owned(tmp_path):
                pass
        assert other() == "owned\n"
    assert process.returncode == 0


def test_the_remains_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    make(tmp_path, [f"result.json.{'0a' * 8}.tmp", "result.json.tmp", "mine.123.tmp", "notes.txt"])
    with folder.owned(tmp_path):
        assert left(tmp_path) == ["mine.123.tmp", "notes.txt", "result.json.tmp"]


def test_a_file_is_no_folder(tmp_path):
    make(tmp_path, ["x"])
    with pytest.raises(ValueError, match="is a file"), folder.owned(tmp_path / "x"):
        pass


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(OSError, match="/proc/nowhere"), folder.owned(Path("/proc/nowhere")):
        pass

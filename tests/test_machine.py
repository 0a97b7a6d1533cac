"""The machine's description, the cache folder, and writing without ever leaving half a file."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import commands
from meprop import machine


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert machine.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MEPROP_CACHE")
    assert machine.cache_folder() == tmp_path / "xdg" / "meprop"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert machine.cache_folder() == Path.home() / ".cache" / "meprop"


def test_the_description_is_plain_data():
    facts = machine.describe()
    assert facts == json.loads(json.dumps(facts))
    assert facts["threads"] >= 1
    assert facts["cpu"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path, failing):
    path = tmp_path / "a"
    machine.write_atomically(path, lambda file: file.write(b"old"))

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        machine.write_atomically(path, lambda file: file.write(b"new"))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
@pytest.mark.parametrize("setting", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(setting):
    code = (
        "import resource; from meprop import machine; kept = machine.keep_freed_memory()\n"
        "size = 64 * 2**20\n"
        "def touch(): block = bytearray(size); del block\n"
        "touch(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; touch()\n"
        "print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | setting
    )
    kept, faults = run.stdout.split()
    assert kept == str(not setting)
    if not setting:
        assert int(faults) < 64  # of 16384 pages


NO_HOME = """
import os, pwd
for name in ("HOME", "MEPROP_CACHE", "MEPROP_DATA", "XDG_CACHE_HOME"): os.environ.pop(name, None)
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
"""


def test_without_a_home_directory_layers_are_measured_without_the_cache_which_is_named_with_the_remedy():
    code = (
        NO_HOME + "import torch, meprop\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))\n"
        "meprop.convert(model, meprop.TopK(0.1))\n"
        "model(torch.randn(8, 64)).sum().backward()\n"
        "print(model[0].decision)\n"
        "meprop.machine.cache_folder()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "measured" in done.stdout, done.stderr
    assert "MepropError: there is no folder for the cache" in done.stderr
    assert "set MEPROP_CACHE" in done.stderr


def test_without_a_home_directory_the_doctor_and_who_asks_for_data_are_told_the_remedy():
    pytest.importorskip("tyro")
    doctor = "from meprop.cli import main; print('exit', main(['doctor']))"
    done = commands.run("data", "mnist", before=f"{NO_HOME}\n{doctor}")
    assert "exit 0\n" in done.stdout
    assert "set MEPROP_CACHE" in done.stdout
    assert done.returncode == 1
    assert "set MEPROP_CACHE" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["~nobody-here/x", "~nobody-here"])
def test_an_unknown_home_directory_is_named(path):
    with pytest.raises(ValueError, match=rf"{path}: there is no such home directory; give the whole path"):
        machine.expanded(path)
    assert machine.expanded("~/x") == Path.home() / "x"
    assert machine.expanded("a/~") == Path("a/~")


@pytest.mark.parametrize("kind", [lambda folder: folder / "missing" / "a", lambda folder: folder / "file" / "a"])
def test_an_error_of_the_disk_names_the_file(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = kind(tmp_path)
    for attempt in (lambda: machine.write_atomically(path, lambda file: None), lambda: machine.check_room(path, 1)):
        with pytest.raises(OSError, match=f"'{path}'"):
            attempt()


def test_asking_for_room_leaves_nothing(tmp_path):
    machine.check_room(tmp_path / "a", 10_000)
    machine.check_room(tmp_path / "a", 0)
    with pytest.raises(OSError, match=f"{tmp_path / 'a'}"):
        machine.check_room(tmp_path / "a", 2**60)
    assert not list(tmp_path.iterdir())


def test_the_file_before_is_kept_where_that_is_asked_for(tmp_path):
    for content in (b"1", b"2", b"3"):
        machine.write_atomically(tmp_path / "a", lambda file, c=content: file.write(c), earlier=[tmp_path / "b"])
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"3", b"2"]


def test_two_writers_with_the_same_process_number(tmp_path):
    code = """
import os, sys
os.getpid = lambda: 1
from pathlib import Path
from meprop.machine import write_atomically
path = Path(sys.argv[1])
for _ in range(50):
    write_atomically(path, lambda file: file.write(sys.argv[2].encode() * 100_000))
    assert len(set(path.read_bytes())) == 1
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    writers = [subprocess.Popen([*command, letter]) for letter in "xy"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

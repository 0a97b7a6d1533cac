"""The machine's description, the cache folder, and writing without ever leaving half a file."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

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

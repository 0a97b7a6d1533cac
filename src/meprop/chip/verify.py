"""The core beside the net in fixed point, on random patterns: every error, output, weight and cycle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meprop.chip import cost, simulate
from meprop.chip.core import Command, Core
from meprop.chip.design import Design
from meprop.chip.model import FixedNet, initial_weights
from meprop.errors import MepropError


@dataclass(frozen=True)
class Cycles:
    """Simulated cycles, which are those of the formula.

    Attributes:
        train_cycles: To train on a pattern.
        validate_cycles: To validate a pattern.
    """

    train_cycles: int
    validate_cycles: int


def verify(
    design: Design,
    patterns: int,
    seed: int = 0,
    compiled: bool = False,
    waveforms: Path | None = None,
    scale: float = 1.0,
) -> Cycles:
    """Train the core and the net on the same random patterns, and validate both on the first one.

    Args:
        design: Of both.
        patterns: How many there are, at least 1. Inputs are uniform in [-2.2, 2.2], targets 0 or 1.
        seed: Of weights and patterns.
        compiled: Whether to compile the core, see `meprop.chip.compiled`.
        waveforms: A VCD file to be written, if it is not compiled; None: none.
        scale: The initial weights are multiplied with it.

    Raises:
        ValueError: There are no patterns.
        MepropError: The core differs from the net, or from the formulas of cycles.
    """
    if patterns < 1:
        raise ValueError(f"patterns={patterns}; there must be at least 1")
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(-2.2, 2.2, (patterns, design.inputs))
    targets = generator.integers(0, 2, (patterns, design.outputs)).astype(np.float64)
    net = FixedNet(design, [scale * each for each in initial_weights(design, seed)])
    commands = [
        simulate.load(design, net.weights),
        *(simulate.pattern(design, Command.TRAIN, *each) for each in zip(inputs, targets, strict=True)),
        simulate.pattern(design, Command.VALIDATE, inputs[0], targets[0]),
        [Command.READ],
    ]
    if compiled:
        from meprop.chip import compiled as program

        _, *trained, validated, read = program.run(design, commands)
    else:
        _, *trained, validated, read = simulate.run(Core(design), commands, waveforms)
    for number, (reply, *pattern) in enumerate(zip(trained, inputs, targets, strict=True)):
        _compare(f"the error of pattern {number}", reply.words, [int(net.learn(*pattern))])
        _compare(f"the cycles of pattern {number}", reply.cycles, cost.train_cycles(design))
    outputs, error = net.activations(inputs[0])[-1], net.error(inputs[0], targets[0])
    _compare("the validation", validated.words, [*outputs.tolist(), int(error)])
    _compare("the cycles of the validation", validated.cycles, cost.validate_cycles(design))
    for layer, (found, expected) in enumerate(zip(simulate.unload(design, read.words), net.weights, strict=True)):
        _compare(f"the weights of layer {layer}", found.tolist(), expected.tolist())
    return Cycles(trained[0].cycles, validated.cycles)


def _compare(what: str, core: object, expected: object) -> None:
    if core != expected:
        raise MepropError(f"{what} differ: the core has {str(core)[:200]}, expected was {str(expected)[:200]}")

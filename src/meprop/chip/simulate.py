"""The core in amaranth's simulator: commands in, replies and cycles out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.sim import Simulator

from meprop.chip.core import Command, Core
from meprop.chip.design import Design
from meprop.chip.fixed import Integers


@dataclass(frozen=True)
class Reply:
    """What the core gave for one command.

    Attributes:
        words: In their order.
        cycles: From the command to the last word, both included.
    """

    words: list[int] = field(default_factory=list[int])
    cycles: int = 0


def pattern(design: Design, command: Command, inputs: Iterable[float], target: Iterable[float]) -> list[int]:
    """The words of a command with a pattern: TRAIN or VALIDATE."""
    numbers = np.array([*inputs, *target], dtype=np.float64)
    return [int(command), *design.value.of_reals(numbers).tolist()]


def load(design: Design, weights: Sequence[Integers]) -> list[int]:
    """The words of LOAD, for the weights of a `FixedNet`."""
    rows = np.zeros((design.rows, design.lanes + 1), dtype=np.int64)
    first = 0
    for each in weights:
        part = rows[first : first + len(each)]
        part[:, : each.shape[1] - 1], part[:, -1] = each[:, :-1], each[:, -1]
        first += len(each)
    return [int(Command.LOAD), *rows.ravel().tolist()]


def unload(design: Design, words: Sequence[int]) -> list[Integers]:
    """The weights in the reply to READ, as those of a `FixedNet`."""
    rows = np.array(words, dtype=np.int64).reshape(design.rows, design.lanes + 1)
    weights: list[Integers] = []
    for inputs, neurons in zip(design.widths, design.widths[1:], strict=False):
        weights.append(np.hstack([rows[:neurons, :inputs], rows[:neurons, -1:]]))
        rows = rows[neurons:]
    return weights


def run(core: Core, commands: Sequence[Sequence[int]], waveforms: Path | None = None) -> list[Reply]:
    """Simulate the core from its reset, with a host that never waits.

    Args:
        core: A core, which has not been elaborated.
        commands: The words of each command, see `pattern` and `load`.
        waveforms: A VCD file to be written; None: none.

    Returns:
        The reply to each command.
    """
    simulator = Simulator(core)
    simulator.add_clock(1e-8)
    replies: list[Reply] = []

    async def host(context: Any) -> None:
        context.set(core.given_ready, 1)
        for words in commands:
            replies.append(await _reply(context, core, words))

    simulator.add_testbench(host)
    if waveforms is None:
        simulator.run()
    else:
        with simulator.write_vcd(str(waveforms)):
            simulator.run()
    return replies


def reply_length(design: Design, command: int) -> int:
    """How many words the core gives for a command."""
    weights = design.rows * (design.lanes + 1)
    return {Command.LOAD: 0, Command.VALIDATE: design.outputs + 1, Command.READ: weights}.get(Command(command), 1)


async def _reply(context: Any, core: Core, words: Sequence[int]) -> Reply:
    expected, given, cycles, place = reply_length(core.design, words[0]), list[int](), 0, 0
    while place < len(words) or len(given) < expected:
        context.set(core.taken_valid, place < len(words))
        if place < len(words):
            context.set(core.taken, words[place])
        if context.get(core.given_valid):
            given.append(context.get(core.given))
        place += bool(place < len(words) and context.get(core.taken_ready))
        await context.tick()
        cycles += 1
    context.set(core.taken_valid, 0)
    return Reply(given, cycles)

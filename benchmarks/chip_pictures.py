"""Draw the pictures of docs/chip.md: the blocks of the core, and what it does with one pattern.

python benchmarks/chip_pictures.py docs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from amaranth.sim import Simulator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from meprop.chip import simulate
from meprop.chip.core import Command, Core
from meprop.chip.design import Design
from meprop.chip.lane import Product
from meprop.chip.model import FixedNet, initial_weights

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
BLOCKS = {  # name: left, bottom, width, height, colour, text
    "bank": (1.0, 5.0, 2.6, 1.2, BLUE, "bank of weights\na row for each neuron\n(and the best so far)"),
    "activations": (1.0, 3.0, 2.6, 1.2, BLUE, "bank of activations\na word for each layer"),
    "multiplier": (4.6, 4.0, 1.8, 1.2, ORANGE, "multiplier"),
    "sum": (7.2, 5.0, 2.0, 1.2, ORANGE, "sum of errors"),
    "delta": (7.2, 3.0, 2.0, 1.2, ORANGE, "derivative,\ndelta"),
    "tree": (11.2, 5.0, 2.0, 1.2, GREEN, "adder tree\nof all lanes"),
    "sigmoid": (14.0, 5.0, 2.0, 1.2, GREEN, "sigmoid\n512 segments"),
    "selector": (11.2, 3.0, 2.0, 1.2, GREEN, "selector\nof the k largest"),
    "control": (14.0, 3.0, 2.0, 1.2, GREEN, "control\nof layers"),
}
ARROWS = [  # points on the way, and what passes
    ([(3.6, 5.6), (4.1, 5.6), (4.1, 4.8), (4.6, 4.8)], ""),
    ([(3.6, 3.6), (4.1, 3.6), (4.1, 4.4), (4.6, 4.4)], ""),
    ([(6.4, 4.8), (6.8, 4.8), (6.8, 5.6), (7.2, 5.6)], ""),
    ([(6.4, 4.4), (6.8, 4.4), (6.8, 3.6), (7.2, 3.6)], ""),
    ([(5.5, 5.2), (5.5, 6.6), (2.3, 6.6), (2.3, 6.2)], "update"),
    ([(5.9, 5.2), (5.9, 6.6), (12.2, 6.6), (12.2, 6.2)], "products"),
    ([(8.2, 5.0), (8.2, 4.2)], "error"),
    ([(9.2, 3.6), (11.2, 3.6)], "delta"),
    ([(13.2, 5.6), (14.0, 5.6)], ""),
    ([(15.0, 6.2), (15.0, 7.2), (0.4, 7.2), (0.4, 3.6), (1.0, 3.6)], "one activation a cycle"),
    ([(12.2, 3.0), (12.2, 2.0), (5.5, 2.0), (5.5, 4.0)], "one kept delta at a time, to all lanes"),
    ([(14.0, 3.6), (13.2, 3.6)], ""),
    ([(17.0, 4.0), (16.0, 4.0)], ""),
    ([(16.0, 3.2), (17.0, 3.2)], ""),
]


def draw_blocks(path: Path) -> None:
    """Draw the blocks of the core."""
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.add_patch(
        FancyBboxPatch((0.7, 2.5), 9.0, 4.4, boxstyle="round,pad=0.1", fill=False, edgecolor=GREY, linestyle="--")
    )
    axes.text(9.6, 2.55, "a lane for each input", ha="right", color=GREY)
    for left, bottom, width, height, color, text in BLOCKS.values():
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), width, height, boxstyle="round,pad=0.02", facecolor="white", edgecolor=color, lw=2
            )
        )
        axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)
    for points, text in ARROWS:
        *way, end = points
        axes.plot(*zip(*way, strict=True), color="black", lw=1)
        axes.annotate(
            "", end, way[-1], arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1, "shrinkA": 0, "shrinkB": 0}
        )
        if text:
            (x0, y0), (x1, y1) = max(pairwise(points), key=lambda each: abs(each[0][0] - each[1][0]))
            beside = abs(x0 - x1) < 0.1
            axes.text(
                (x0 + x1) / 2 + 0.08 * beside,
                (y0 + y1) / 2 + 0.08 * (not beside),
                text,
                fontsize=9,
                va="center" if beside else "bottom",
                ha="left" if beside else "center",
            )
    axes.text(17.1, 4.0, "patterns", va="center", fontsize=9)
    axes.text(17.1, 3.2, "errors,\nweights", va="center", fontsize=9)
    axes.set_xlim(0.2, 18.4)
    axes.set_ylim(1.6, 7.6)
    axes.set_axis_off()
    figure.savefig(path, dpi=130)


def watched(design: Design) -> list[dict[str, Any]]:
    """What happens in each cycle of one pattern in training."""
    core = Core(design)
    weights = FixedNet(design, initial_weights(design, 0)).weights
    words = simulate.pattern(design, Command.TRAIN, [0.5, -0.25, 0.75][: design.inputs], [1.0, 0.0][: design.outputs])
    cycles: list[dict[str, Any]] = []

    async def host(context: Any) -> None:
        context.set(core.given_ready, 1)
        context.set(core.taken_valid, 1)
        for word in simulate.load(design, weights):
            context.set(core.taken, word)
            await context.tick()
        done = False
        while not done:
            place = len(cycles)
            context.set(core.taken_valid, place < len(words))
            context.set(core.taken, words[place] if place < len(words) else 0)
            done = bool(context.get(core.given_valid))
            cycles.append(
                {
                    "word taken": bool(context.get(core.taken_valid)),
                    "layer": context.get(core.layer),
                    "product of all lanes": Product(context.get(core.orders.product)).name.lower(),
                    "activation written": bool(context.get(core.orders.take_activation)),
                    "bit of the selection": bool(context.get(core.selector.narrow)),
                    "delta picked": bool(context.get(core.selector.take)),
                    "row of weights written": bool(context.get(core.orders.write)),
                    "error given": done,
                }
            )
            await context.tick()

    simulator = Simulator(core)
    simulator.add_clock(1e-8)
    simulator.add_testbench(host)
    simulator.run()
    return cycles


def runs_of(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """First and length of each run of equal values, and the value."""
    starts = [place for place, value in enumerate(values) if place == 0 or value != values[place - 1]]
    return [(start, end - start, values[start]) for start, end in zip(starts, [*starts[1:], len(values)], strict=True)]


def draw_pattern(path: Path) -> None:
    """Draw what the core does with one pattern."""
    design = Design(inputs=3, neurons=4, outputs=2, word=8, k=2)
    cycles = watched(design)
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    axes = figure.subplots()
    names = list(cycles[0])
    for row, name in enumerate(names):
        _draw_signal(axes, len(names) - row, [cycle[name] for cycle in cycles])
    axes.set_yticks([len(names) - row for row in range(len(names))], names)
    for label, color in {
        "forward": BLUE,
        "update": GREEN,
        "backward": ORANGE,
        "error, derivative, delta": GREY,
    }.items():
        axes.barh([0], [0], color=color, alpha=0.35, label=label)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    axes.set_ylim(0.4, len(names) + 0.6)
    axes.set_xlabel(f"cycle, of {len(cycles)}")
    axes.set_xlim(0, len(cycles))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=130)


COLORS = {"forward": BLUE, "square": GREY, "derivative": GREY, "delta": GREY, "update": GREEN, "backward": ORANGE}


def _draw_signal(axes: Axes, height: float, values: Sequence[Any]) -> None:
    if isinstance(values[0], bool):
        places = [place for place in range(len(values) + 1) for _ in range(2)][1:-1]
        levels = [height - 0.3 + 0.6 * value for value in values for _ in range(2)]
        axes.plot(places, levels, color="black", lw=1)
        return
    for start, length, value in runs_of(values):
        if value == "nothing":
            continue
        color = COLORS.get(value, GREY)
        axes.broken_barh([(start, length)], (height - 0.35, 0.7), facecolor=color, alpha=0.35, edgecolor=color)
        if isinstance(value, int):
            axes.text(start + length / 2, height, str(value), ha="center", va="center", fontsize=8)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_blocks(folder / "chip-blocks.png")
    draw_pattern(folder / "chip-pattern.png")

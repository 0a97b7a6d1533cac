"""What a pattern costs on the chip, in cycles, by formula."""

from __future__ import annotations

from meprop.chip.design import Design

__all__ = ["backward_cycles", "forward_cycles", "train_cycles", "validate_cycles"]


def forward_cycles(design: Design) -> int:
    """Cycles from the first look at the inputs to the errors.

    Each layer takes a cycle for each neuron, 6 for the pipeline, and one for each level of the adder tree. 6 are:
    fetching the inputs, reading weights, multiplying, rounding, and 2 for the sigmoid. The errors take one.
    """
    levels = design.lanes.bit_length()
    return sum(width + 6 + levels for width in design.widths[1:]) + 1


def backward_cycles(design: Design) -> int:
    """Cycles of back-propagation and update of all layers.

    Each layer takes 5 for its deltas. Where not all are kept, the selection takes one for each bit of a word. Each kept
    delta takes one for the update, and one for back-propagation, which the lowest layer does not need.
    """
    total = 0
    for layer, width in enumerate(design.widths[1:]):
        kept = design.kept(width)
        total += 5 + (design.word if kept < width else 0) + kept * (1 if layer == 0 else 2)
    return total


def train_cycles(design: Design) -> int:
    """Cycles from the command TRAIN to the reply, both included, where the host never waits."""
    return 1 + design.inputs + design.outputs + forward_cycles(design) + backward_cycles(design) + 1


def validate_cycles(design: Design) -> int:
    """Cycles from the command VALIDATE to the last word of the reply, both included, where the host never waits.

    The outputs are given while their errors are squared and summed, which takes longer if there are few outputs.
    """
    levels = design.lanes.bit_length()
    reply = max(design.outputs, levels + 1) + 1
    return 1 + design.inputs + design.outputs + forward_cycles(design) + reply

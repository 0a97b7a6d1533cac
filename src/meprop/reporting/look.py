"""What runs of each kind are called and drawn with, in figures and on pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from meprop.training.config import DENSE


class Look(NamedTuple):
    """What runs of one kind are called and drawn with."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette, which colour-blind readers can tell apart.
_NO_RULES = {DENSE: Look("dense", "#0072B2", "D"), "simplified": Look("simplified", "#000000", "o")}
_UNKNOWN_COLOR = "#999999"
VARIANTS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"]
"""Colours of that palette that are not faint on white, for variants in the order of their experiment."""


def look(rule: str) -> Look:
    """Return the look of runs by `Run.rule`: a rule's own, or a grey one of a rule that is no longer there.

    One with settings of its own, such as "topk:k=0.04", has the look of its rule and its whole name.
    """
    from meprop import rules  # here, as the page needs no more of this file than colours of parts

    name, _, own = rule.partition(":")
    found = rules.named().get(name)
    known = _NO_RULES.get(name) or (found and Look(found.label, found.color, found.marker))
    if known is None:
        return Look(rule, _UNKNOWN_COLOR, "o")
    return known._replace(label=rule) if own else known


def distinct(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each of the runs that are shown together: its rule's own, or one that none of them has."""
    colors = {name: look(name).color for name in names}
    free = [color for color in VARIANTS if color not in colors.values()]
    taken: set[str] = set()
    for name, color in colors.items():
        colors[name] = free.pop(0) if color in taken and free else color
        taken.add(color)
    return colors


PHASE_COLORS = {"forward": "#56B4E9", "backward": "#E69F00", "optimizer": "#999999"}
"""Of the parts of a step."""

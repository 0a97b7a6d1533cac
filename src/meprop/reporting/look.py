"""What runs of each kind are called and drawn with, in figures and on pages."""

from __future__ import annotations

from typing import NamedTuple

from meprop import rules
from meprop.training.config import DENSE


class Look(NamedTuple):
    """What runs of one kind are called and drawn with."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette, which colour-blind readers can tell apart.
_NO_RULES = {DENSE: Look("dense", "#0072B2", "D"), "simplified": Look("simplified", "#000000", "o")}
_UNKNOWN_COLOR = "#999999"


def look(rule: str) -> Look:
    """Return the look of runs by `Run.rule`: a rule's own, or a grey one of a rule that is no longer there."""
    if rule in _NO_RULES:
        return _NO_RULES[rule]
    found = rules.named().get(rule)
    return Look(rule, _UNKNOWN_COLOR, "o") if found is None else Look(found.label, found.color, found.marker)


PHASE_COLORS = {"forward": "#56B4E9", "backward": "#E69F00", "optimizer": "#999999"}
"""Of the parts of a step."""

"""meSimp: units that back-propagation hardly ever selects are removed while a model trains.

`Simplifier` counts, chooses and removes. `handles` tells it what an operation of one's own does to units.
"""

from meprop.pruning.handlers import NOTHING, Call, Value, handles, remove_handler
from meprop.pruning.operations import elementwise
from meprop.pruning.report import Check, LayerWidth, SimplificationReport
from meprop.pruning.simplifier import Simplifier

__all__ = [
    "NOTHING",
    "Call",
    "Check",
    "LayerWidth",
    "SimplificationReport",
    "Simplifier",
    "Value",
    "elementwise",
    "handles",
    "remove_handler",
]

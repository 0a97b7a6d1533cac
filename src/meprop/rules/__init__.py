"""Rules: which entries of an output gradient are worth propagating.

Each rule has a file. `base` holds what they share.
"""

from meprop.rules.base import Rule, named
from meprop.rules.blocks import InBlocks, in_blocks
from meprop.rules.compensated import CompensatedTopK
from meprop.rules.products import PerProduct
from meprop.rules.random import RandomK
from meprop.rules.sampled import Sampled
from meprop.rules.topk import TopK
from meprop.rules.unscaled import UnscaledK
from meprop.selection import Scope

__all__ = [
    "CompensatedTopK",
    "InBlocks",
    "PerProduct",
    "RandomK",
    "Rule",
    "Sampled",
    "Scope",
    "TopK",
    "UnscaledK",
    "in_blocks",
    "named",
]

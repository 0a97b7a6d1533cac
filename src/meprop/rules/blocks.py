"""A rule within each of several blocks of the output features."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

from torch import Tensor

from meprop.rules.base import Rule
from meprop.rules.products import PerProduct
from meprop.selection import PlainTopK, Scope, Selection, side_by_side


def in_blocks(rule: Rule, blocks: int) -> Rule:
    """The rule within each of several equal blocks of the output features. The errors are those of `InBlocks`."""
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (InBlocks refuses others)
        return InBlocks(rule, blocks)
    if rule.differs:
        of_input, of_weight = (None if each is None else in_blocks(each, blocks) for each in rule.products())
        return PerProduct(input=of_input, weight=of_weight)
    return rule if rule.scope == "rows" else InBlocks(rule, blocks)  # whole rows are the same in all blocks


@dataclass(frozen=True)
class InBlocks(Rule):
    """Applies a rule within each of several equal blocks of the output features.

    It is for a product that serves several layers side by side, such as query, key and value of attention. If a rule
    chose among the features of all of them, some would get hardly any. At the beginning of training these are the keys.

    Args:
        rule: What to keep of each block, e.g. `meprop.TopK(0.05)`.
        blocks: The number of equal blocks of the output features, at least 1.

    Raises:
        TypeError: `rule` is not a Rule, or `blocks` is not an int.
        ValueError: `blocks` is below 1, or the rule chooses whole rows. When the rule is used: `blocks` does not divide
            the number of output features.

    Example:
        >>> import torch
        >>> InBlocks(TopK(1), 2).select(torch.tensor([[9.0, 8.0, 1.0, 2.0]])).indices.tolist()
        [[0, 3]]
    """

    rule: Rule
    blocks: int
    scope: Scope | None = field(init=False, repr=False)
    """The scope of the rule within the blocks."""

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"rule={self.rule!r} is of type {type(self.rule).__name__}; it is a rule of each block")
        if self.rule.differs:
            raise TypeError(f"rule={self.rule!r} is no single rule; give each of its rules InBlocks")
        if self.rule.scope == "rows":
            raise ValueError(f"rule={self.rule!r} chooses whole rows, which are the same in all blocks; use it alone")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, Integral):
            raise TypeError(f"blocks={self.blocks!r} is of type {type(self.blocks).__name__}; it is an int")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}; it must be at least 1")
        object.__setattr__(self, "blocks", int(self.blocks))
        object.__setattr__(self, "scope", self.rule.scope)

    @property
    def communicates(self) -> bool:
        """Whether the rule within the blocks lets several processes choose together."""
        return self.rule.communicates

    @property
    def unbiased(self) -> bool:
        """Whether the rule within the blocks is."""
        return self.rule.unbiased

    @property
    def row_sparse(self) -> bool:
        """Whether the rule leaves out rows."""
        return self.rule.row_sparse

    def count(self, features: int) -> int | None:
        """How many of `features` output features are kept, in all blocks together."""
        count = self.rule.count(self._width(features))
        return None if count is None else self.blocks * count

    def density(self, features: int) -> float | None:
        """The density of the rule within the blocks."""
        return self.rule.density(self._width(features))

    def typical(self, share: float) -> Rule:
        """The typical rule within each of the blocks."""
        return InBlocks(self.rule.typical(share), self.blocks)

    def as_topk(self, features: int) -> PlainTopK | None:
        """The rule's top-k, within each of the blocks. None if the rule is no top-k."""
        topk = self.rule.as_topk(self._width(features))
        return None if topk is None else topk._replace(blocks=self.blocks * topk.blocks)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """What the rule keeps of each block of grad_output_NO [N, O], side by side."""
        features = grad_output_NO.shape[1]
        width = self._width(features)
        return side_by_side([self.rule.select(block) for block in grad_output_NO.split(width, dim=1)])

    def _width(self, features: int) -> int:
        if features % self.blocks != 0:
            raise ValueError(f"{features} output features are not {self.blocks} equal blocks ({self})")
        return features // self.blocks

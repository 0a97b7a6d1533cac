"""Top-k, the rule of meProp: the largest entries are kept."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK
from meprop.selection import ColumnSelection, PlainTopK, RowSelection


class TopK(KeepK):
    """Keeps the k entries of largest magnitude: meProp's rule (Sun et al., ICML 2017, section 3).

    Exactly k entries are kept. Among equal magnitudes the lower index wins. NaN counts as the largest, so that it is
    never hidden. With `k` at or above the number of output features the layer is the dense one, bit for bit.

    Args:
        k: An int is a count, at least 1. A float is a share of the n output features, above 0 and at most 1. A share
            keeps ``max(1, round(k * n))`` of them.
        scope: "example" chooses anew in each row of the gradient, which is the paper's top-k. "batch" chooses the k
            features with the largest sums of magnitudes for all rows, which is the paper's simple unified top-k.

    Raises:
        ValueError: k or scope is out of range.
        TypeError: k is not a number.

    Example:
        >>> import torch
        >>> selection = TopK(2).select(torch.tensor([[0.1, -3.0, 0.0, 2.0]]))
        >>> selection.indices.tolist(), selection.values.tolist()
        ([[1, 3]], [[-3.0, 2.0]])
    """

    name: ClassVar[str] = "topk"
    label: ClassVar[str] = "top-k"
    color: ClassVar[str] = "#D55E00"

    def as_topk(self, features: int) -> PlainTopK | None:
        """k for `features` output features, and the scope."""
        return PlainTopK(self.count(features), self.scope)

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        return ops.topk_rows(grad_NO, k)

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        return ops.topk_columns(grad_NO, k)

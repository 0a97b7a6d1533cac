"""Top-k: the largest entries, meProp's rule."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK
from meprop.selection import ColumnSelection, PlainTopK, RowSelection


class TopK(KeepK):
    """Keeps the k entries of largest magnitude: meProp's rule (Sun et al., ICML 2017, section 3).

    Exactly k entries are kept. Of equal magnitudes the lower index wins; NaN counts as the largest, so that it is never
    hidden. With `k` at or above the number of output features the layer is the dense one, bit for bit.

    Args:
        k: An int is a count, at least 1. A float is a share of the output features n, above 0 and at most 1:
            ``max(1, round(k * n))`` are kept.
        scope: "example" chooses anew in every row of the gradient (the paper's top-k); "batch" chooses k features for
            the whole batch, those with the largest sum of magnitudes (the paper's simple unified top-k).

    Raises:
        ValueError: k or scope out of range.
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

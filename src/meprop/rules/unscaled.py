"""Entries that are drawn by magnitude and stay what they are, with which `Sampled` is compared. This rule is ours."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK, with_exact_sum, with_own_values
from meprop.rules.sampled import new_key
from meprop.selection import ColumnSelection, Entries, RowSelection


class UnscaledK(KeepK):
    """Keeps k entries that are drawn by magnitude, and does not divide them by their probabilities.

    The rule is for comparison, not for training. Its entries are those that `Sampled` draws with the same k, scope and
    seed. `Sampled` divides each by its probability, so that the mean over all draws is the gradient. Here small entries
    come up as rarely, and stay small. With `k` at or above the number of output features the layer is the dense one,
    bit for bit.

    Args:
        k: See `TopK`. Where fewer entries are not zero, these are kept.
        scope: "example" draws k entries anew for each row of the gradient. "batch" draws k features for all rows, by
            their norms. "global" draws k N entries of the whole gradient of N rows.
        exact_sum: See `TopK`.

    Raises:
        ValueError: k or scope is out of range, or `exact_sum` is used with scope "batch".
        TypeError: k is not a number.

    Example:
        >>> import torch
        >>> kept = UnscaledK(2).select(torch.tensor([[8.0, -1.0, 1.0, 2.0]])).to_dense()
        >>> kept[0, 0].item(), kept.count_nonzero().item(), kept.abs().sum().item() < 12
        (8.0, 2, True)
    """

    name: ClassVar[str] = "unscaled"
    label: ClassVar[str] = "drawn, not scaled"
    color: ClassVar[str] = "#0072B2"
    marker: ClassVar[str] = "v"

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        return with_own_values(ops.draw_rows(grad_NO, k, new_key(grad_NO.device)), grad_NO)

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        indices = ops.draw_columns(grad_NO, k, new_key(grad_NO.device)).indices
        return ColumnSelection(grad_NO.index_select(1, indices), indices, grad_NO.shape[1])

    def _entries(self, grad_NO: Tensor, k: int) -> RowSelection:
        drawn = ops.choose_entries(grad_NO, Entries("drawn", k, key=new_key(grad_NO.device)))
        kept = with_own_values(drawn, grad_NO)
        return with_exact_sum(kept, grad_NO) if self.exact_sum else kept

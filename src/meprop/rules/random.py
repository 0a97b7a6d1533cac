"""Random-k, with which the paper compares top-k."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK, with_exact_sum, with_own_values
from meprop.selection import ColumnSelection, Entries, RowSelection


class RandomK(KeepK):
    """Keeps k entries that are drawn uniformly. The meProp paper compares top-k with it in figure 4.

    The rule is for comparison, not for training. Every set of k entries is equally likely, whatever their values. The
    kept entries are not scaled up for what is left out. The numbers come from torch's global generator of the
    gradient's device, so `torch.manual_seed` repeats them. With `k` at or above the number of output features the layer
    is the dense one, bit for bit.

    Args:
        k: See `TopK`.
        scope: "example" draws k entries anew for each row of the gradient. "batch" draws k features for all rows. It
            is the counterpart of unified top-k. "global" draws k N entries of the whole gradient of N rows.
        exact_sum: See `TopK`.

    Raises:
        ValueError: k or scope is out of range, or `exact_sum` is used with scope "batch".
        TypeError: k is not a number.

    Example:
        >>> import torch
        >>> RandomK(2).select(torch.tensor([[0.1, -3.0, 0.0, 2.0]])).indices.shape
        torch.Size([1, 2])
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "random-k"
    color: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "s"

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        # The k largest of independent uniform numbers lie at k uniform places.
        indices = ops.topk_rows(torch.rand(grad_NO.shape, device=grad_NO.device), k).indices
        return RowSelection(grad_NO.gather(1, indices.long()), indices, grad_NO.shape[1])

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        indices = ops.topk_columns(torch.rand(1, grad_NO.shape[1], device=grad_NO.device), k).indices
        return ColumnSelection(grad_NO.index_select(1, indices), indices, grad_NO.shape[1])

    def _entries(self, grad_NO: Tensor, k: int) -> RowSelection:
        numbers = torch.rand(grad_NO.shape, device=grad_NO.device)
        kept = with_own_values(ops.choose_entries(numbers, Entries("largest", k)), grad_NO)
        return with_exact_sum(kept, grad_NO) if self.exact_sum else kept

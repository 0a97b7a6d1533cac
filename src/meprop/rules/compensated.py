"""Top-k whose mean over the batch is exact. This rule is ours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK
from meprop.selection import ColumnSelection, RowSelection


class CompensatedTopK(KeepK):
    """Top-k whose mean over the batch is exact: each row also gets the batch's mean of what top-k leaves out.

    Let g be the output gradient and S its top-k. The rule propagates ``S + mean(g - S)``, where the mean is over the N
    rows. Top-k keeps the features of each row that the row would change most. It leaves out many features that the row
    would change a little in the other direction. Where inputs have a common part, as behind ReLU, these small changes
    add up over the batch. Without them training slows down or diverges. The added part costs one more pass over the
    gradient. It also costs one more pass over input and weight and over their gradients, for the products with a matrix
    of rank one. This rule is ours, not the paper's.

    Args:
        k: See `TopK`.
        scope: "example". With "batch" nothing would be left out of the weight's gradient.

    Raises:
        ValueError: k is out of range, or the scope is another one.
        TypeError: k is not a number.

    Example:
        >>> import torch
        >>> CompensatedTopK(1).select(torch.tensor([[4.0, 1.0], [1.0, 5.0]])).to_dense().tolist()
        [[4.5, 0.5], [0.5, 5.5]]
    """

    name: ClassVar[str] = "compensated"
    label: ClassVar[str] = "compensated top-k"
    color: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "D"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "example":
            raise ValueError(f"scope={self.scope!r}; CompensatedTopK is for scope 'example' only")

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        kept = ops.topk_rows(grad_NO, k)
        rows, width = grad_NO.shape
        left_out = grad_NO.sum(dim=0, dtype=torch.promote_types(grad_NO.dtype, torch.float32))
        left_out.index_add_(0, kept.indices.flatten(), kept.values.flatten().to(left_out.dtype), alpha=-1)
        shared = (left_out / max(1, rows)).to(grad_NO.dtype)
        return RowSelection(kept.values, kept.indices, width, shared)

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        raise AssertionError("refused when it was made")

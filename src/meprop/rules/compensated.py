"""Top-k whose mean over the batch is right: a rule of ours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK
from meprop.selection import ColumnSelection, RowSelection


class CompensatedTopK(KeepK):
    """Top-k whose mean over the batch is right: each row also gets the batch's mean of what top-k leaves out.

    With g the output gradient and S its top-k, ``S + mean(g - S)`` is propagated, the mean taken over the N rows. Top-k
    keeps, of each example, the features that it wants changed most, and leaves out the many that would be changed
    against them by a little; where inputs have a common part, as behind ReLU, that adds up over the batch, and training
    slows down or diverges. What is added costs one more pass over the gradient, and over input and weight and their
    gradients: the products with a matrix of rank one. This rule is ours, not the paper's.

    Args:
        k: As of `TopK`.
        scope: "example"; with "batch" nothing would be left out of the weight's gradient.

    Raises:
        ValueError: k out of range, or another scope.
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

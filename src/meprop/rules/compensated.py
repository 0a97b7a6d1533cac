"""Top-k whose mean over the batch is exact. This rule is ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from meprop.rules.topk import TopK


@dataclass(frozen=True, repr=False)
class CompensatedTopK(TopK):
    """``TopK(k, exact_sum=True)``: each row also gets the batch's mean of what top-k leaves out.

    Let g be the output gradient and S its top-k. The rule propagates ``S + mean(g - S)``, where the mean is over the N
    rows. Top-k keeps the features of each row that the row would change most. It leaves out many features that the row
    would change a little in the other direction. Where inputs have a common part, as behind ReLU, these small changes
    add up over the batch. Without them training slows down or diverges. The added part costs one more pass over the
    gradient. It also costs one more pass over input and weight and over their gradients, for the products with a matrix
    of rank one. This rule is ours, not the paper's.

    Args:
        k: See `TopK`.
        scope: "example" or "global". See `TopK`.

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

    exact_sum: bool = field(default=True, init=False)
    energy: None = field(default=None, init=False)

    def __repr__(self) -> str:
        return f"CompensatedTopK(k={self.k!r}, scope={self.scope!r})"

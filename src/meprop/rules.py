"""Rules: which entries of an output gradient are worth propagating."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from meprop import ops
from meprop.selection import ColumnSelection, RowSelection, Selection

Scope = Literal["example", "batch"]


class Rule(ABC):
    """Answers one question for every linear map: which entries of its output gradient are propagated?"""

    @property
    def communicates(self) -> bool:
        """Whether several processes choose together, so that each has to ask whenever the others do."""
        return False

    @abstractmethod
    def select(self, grad_output_NO: Tensor) -> Selection:
        """The entries of grad_output_NO [N, O] to propagate."""

    @abstractmethod
    def count(self, features: int) -> int:
        """How many of `features` output features are kept; `features` itself means the plain dense product."""

    def as_topk(self, features: int) -> tuple[int, Scope] | None:
        """Its k and scope, if `select` is nothing but the top-k of `ops`: then one call selects and multiplies."""
        del features
        return None


@dataclass(frozen=True)
class _KeepK(Rule):
    """What the rules that keep k entries share: k, the scope, and the checks of both."""

    k: int | float
    scope: Scope = "example"

    def __post_init__(self) -> None:
        allowed = "an int of at least 1 (a count) or a float above 0 and at most 1 (a share of the output features)"
        if isinstance(self.k, bool):
            raise ValueError(f"k={self.k!r} is a bool; k is {allowed}")
        if isinstance(self.k, numbers.Integral):
            if self.k < 1:
                raise ValueError(f"k={self.k!r} keeps nothing; k is {allowed}")
            object.__setattr__(self, "k", int(self.k))
        elif isinstance(self.k, numbers.Real):
            if math.isnan(self.k) or not 0 < self.k <= 1:
                raise ValueError(f"k={self.k!r} is out of range; k is {allowed}")
            object.__setattr__(self, "k", float(self.k))
        else:
            raise TypeError(f"k={self.k!r} is of type {type(self.k).__name__}; k is {allowed}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r}; the scope is 'example' or 'batch'")

    def count(self, features: int) -> int:
        """How many of `features` output features are kept: between 1 and `features`."""
        k = self.k if isinstance(self.k, int) else max(1, round(self.k * features))
        return min(k, features)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """The kept entries of each row, or the kept columns.

        Args:
            grad_output_NO: Output gradient [N, O] of any floating dtype, O >= 1; N may be 0.

        Returns:
            A RowSelection (scope "example") or a ColumnSelection ("batch"), indices ascending.

        Raises:
            ValueError: grad_output_NO is not a matrix with at least one column.
            TypeError: it is not of a floating dtype.
        """
        if grad_output_NO.dim() != 2 or grad_output_NO.shape[1] == 0:
            raise ValueError(
                f"an output gradient is [N, O] with O >= 1, not {list(grad_output_NO.shape)}; flatten it first"
            )
        if not grad_output_NO.is_floating_point():
            raise TypeError(f"an output gradient is of a floating dtype, not {grad_output_NO.dtype}")
        k = self.count(grad_output_NO.shape[1])
        return self._rows(grad_output_NO, k) if self.scope == "example" else self._columns(grad_output_NO, k)

    @abstractmethod
    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection: ...

    @abstractmethod
    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection: ...


class TopK(_KeepK):
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

    def as_topk(self, features: int) -> tuple[int, Scope] | None:
        """k for `features` output features, and the scope."""
        return self.count(features), self.scope

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        return ops.topk_rows(grad_NO, k)

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        return ops.topk_columns(grad_NO, k)


class CompensatedTopK(_KeepK):
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


class RandomK(_KeepK):
    """Keeps k entries drawn uniformly, as they are: the yardstick of the meProp paper's figure 4, not a way to train.

    Every set of k entries is equally likely, whatever their values; nothing is scaled up for what is left out. The
    numbers come from torch's global generator of the gradient's device: `torch.manual_seed` repeats them. With `k` at
    or above the number of output features the layer is the dense one, bit for bit.

    Args:
        k: As of `TopK`.
        scope: "example" draws anew for every row of the gradient; "batch" draws k features for the whole batch.

    Raises:
        ValueError: k or scope out of range.
        TypeError: k is not a number.

    Example:
        >>> import torch
        >>> RandomK(2).select(torch.tensor([[0.1, -3.0, 0.0, 2.0]])).indices.shape
        torch.Size([1, 2])
    """

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        # The k largest of independent uniform numbers lie at k uniform places.
        indices = ops.topk_rows(torch.rand(grad_NO.shape, device=grad_NO.device), k).indices
        return RowSelection(grad_NO.gather(1, indices.long()), indices, grad_NO.shape[1])

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        indices = ops.topk_columns(torch.rand(1, grad_NO.shape[1], device=grad_NO.device), k).indices
        return ColumnSelection(grad_NO.index_select(1, indices), indices, grad_NO.shape[1])


@dataclass(frozen=True)
class InBlocks(Rule):
    """Applies a rule within each of several equal blocks of the output features.

    For layers that are several side by side, such as query, key and value of attention in one product: where the rule
    chooses among all of their features, some get hardly any (the keys, when training begins).

    Args:
        rule: What to keep of each block, e.g. `meprop.TopK(0.05)`.
        blocks: How many blocks there are, at least 1; the output features are so many equal parts.

    Raises:
        TypeError: `rule` is not a Rule, or `blocks` not an int.
        ValueError: `blocks` is below 1; when it is used, the features are not so many equal parts.

    Example:
        >>> import torch
        >>> InBlocks(TopK(1), 2).select(torch.tensor([[9.0, 8.0, 1.0, 2.0]])).indices.tolist()
        [[0, 3]]
    """

    rule: Rule
    blocks: int

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"rule={self.rule!r} is of type {type(self.rule).__name__}; it is a rule of each block")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"blocks={self.blocks!r} is of type {type(self.blocks).__name__}; it is an int")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}; it must be at least 1")

    @property
    def scope(self) -> Scope:
        """That of the rule within the blocks."""
        return getattr(self.rule, "scope", "batch")

    @property
    def communicates(self) -> bool:
        """As the rule within the blocks."""
        return self.rule.communicates

    def count(self, features: int) -> int:
        """How many of `features` output features are kept, in all blocks together."""
        return self.blocks * self.rule.count(self._width(features))

    def select(self, grad_output_NO: Tensor) -> Selection:
        """What the rule keeps of each block of grad_output_NO [N, O], side by side."""
        features = grad_output_NO.shape[1]
        width = self._width(features)
        parts = [self.rule.select(block) for block in grad_output_NO.split(width, dim=1)]
        values = torch.cat([part.values for part in parts], dim=1)
        indices = torch.cat([part.indices + number * width for number, part in enumerate(parts)], dim=-1)
        if any(isinstance(part, ColumnSelection) for part in parts):
            return ColumnSelection(values, indices, features)
        shared = [part.shared for part in parts if isinstance(part, RowSelection) and part.shared is not None]
        return RowSelection(values, indices, features, torch.cat(shared) if shared else None)

    def _width(self, features: int) -> int:
        if features % self.blocks != 0:
            raise ValueError(f"{features} output features are not {self.blocks} equal blocks ({self})")
        return features // self.blocks

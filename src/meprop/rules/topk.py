"""Top-k, the rule of meProp: the largest entries are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from meprop import ops
from meprop.rules.base import KeepK, check_flag, check_output_gradient, checked_share
from meprop.selection import ColumnSelection, Entries, PlainTopK, RowSelection, Scope, Selection


@dataclass(frozen=True, repr=False)
class TopK(KeepK):
    """Keeps the entries of largest magnitude: meProp's rule (Sun et al., ICML 2017, section 3).

    Exactly k entries are kept of each row. Among equal magnitudes the lower index wins, and in a whole gradient the
    lower row. NaN counts as the largest, so that it is never hidden. With `k` at or above the number of output features
    the layer is the dense one, bit for bit.

    Args:
        k: An int is a count, at least 1. A float is a share of the n output features, above 0 and at most 1. A share
            keeps ``max(1, round(k * n))`` of them. Leave it out if `energy` is given.
        scope: "example" chooses anew in each row of the gradient, which is the paper's top-k. "batch" chooses the k
            features with the largest sums of magnitudes for all rows, which is the paper's simple unified top-k.
            "global" chooses the k N largest entries of all N rows together. A row then keeps k on average.
        energy: Keep the largest entries of all rows that hold at least this share of the sum of their squares, above 0
            and below 1. The scope is "global" then. Magnitudes are looked at in steps of bfloat16, so that some more
            entries than necessary may be kept.
        exact_sum: Give each row in addition the batch's mean of what is left out, so that the batch's sum is exact. See
            `CompensatedTopK`.

    Raises:
        ValueError: k, scope or energy is out of range, k and energy are given together, or `exact_sum` is used with
            scope "batch".
        TypeError: k or energy is not a number, or none of them is given.

    Example:
        >>> import torch
        >>> selection = TopK(2).select(torch.tensor([[0.1, -3.0, 0.0, 2.0]]))
        >>> selection.indices.tolist(), selection.values.tolist()
        ([[1, 3]], [[-3.0, 2.0]])
        >>> TopK(1, scope="global").select(torch.tensor([[0.1, -3.0, 2.0], [0.0, 1.0, 0.0]])).to_dense().tolist()
        [[0.0, -3.0, 2.0], [0.0, 0.0, 0.0]]
    """

    name: ClassVar[str] = "topk"
    label: ClassVar[str] = "top-k"
    color: ClassVar[str] = "#D55E00"

    k: int | float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  (None with energy)
    scope: Scope | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  (None until it is checked)
    energy: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.energy is None:
            if self.k is None:
                raise TypeError("k=None without energy; k is an int (a count) or a float (a share), or give energy")
            object.__setattr__(self, "scope", self.scope or "example")
            return super().__post_init__()
        if self.k is not None:
            raise ValueError(f"k={self.k!r} with energy={self.energy!r}; give one of them")
        if self.scope not in (None, "global"):
            raise ValueError(f"scope={self.scope!r} with energy={self.energy!r}; it is for scope 'global' only")
        check_flag("exact_sum", self.exact_sum)
        object.__setattr__(self, "energy", checked_share("energy", self.energy))
        object.__setattr__(self, "scope", "global")
        return None

    def __repr__(self) -> str:
        if self.energy is None:
            return super().__repr__()
        return f"{type(self).__name__}(energy={self.energy!r}{', exact_sum=True' if self.exact_sum else ''})"

    def count(self, features: int) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]  (None with energy)
        """How many of `features` output features each row keeps, on average. None with `energy`."""
        return None if self.energy is not None else super().count(features)

    def as_topk(self, features: int) -> PlainTopK | None:
        """k for `features` output features, and the scope. None if it is not all that is kept, or of all rows."""
        if self.scope == "global" or self.exact_sum:
            return None
        count = self.count(features)
        assert count is not None  # without energy
        assert self.scope is not None
        return PlainTopK(count, self.scope)

    def as_entries(self, features: int, device: torch.device) -> Entries | None:
        """With scope "global", k N entries or those with `energy`."""
        del device
        if self.energy is not None:
            return Entries("energy", share=self.energy, exact_sum=self.exact_sum)
        count = self.count(features)
        return Entries("largest", count or 0, exact_sum=self.exact_sum) if self.scope == "global" else None

    def typical(self, share: float) -> TopK:
        """Itself with a k, and the top-k of a share in place of an energy."""
        return self if self.energy is None else TopK(share, "global", exact_sum=self.exact_sum)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """The kept entries of each row or of the whole gradient, or the kept columns. See `KeepK.select`."""
        if self.energy is None:
            return super().select(grad_output_NO)
        check_output_gradient(grad_output_NO)
        return self._entries(grad_output_NO, 0)

    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection:
        return ops.topk_rows(grad_NO, k)

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        return ops.topk_columns(grad_NO, k)

    def _entries(self, grad_NO: Tensor, k: int) -> RowSelection:
        del k
        entries = self.as_entries(grad_NO.shape[1], grad_NO.device)
        assert entries is not None  # because of the scope
        return ops.choose_entries(grad_NO, entries)

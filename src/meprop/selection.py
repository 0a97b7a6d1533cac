"""Selections: which entries of an output gradient are propagated.

A rule returns one. It is plain data, with which `ops` multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ColumnSelection",
    "Entries",
    "FeatureSelection",
    "PlainTopK",
    "RowSelection",
    "Scope",
    "Selection",
    "WholeRows",
    "everything",
    "is_everything",
    "one_after_another",
    "shared_or_zeros",
    "side_by_side",
]


Scope = Literal["example", "batch", "global", "rows"]
"""What a rule chooses, and among what.

"example" is for entries of each row, "batch" for the same columns for all rows (unified top-k), "global" for entries of
the whole output gradient, whatever row they are in, "rows" for whole rows.
"""


@dataclass(frozen=True, eq=False)
class RowSelection:
    """Some entries of each row of an output gradient [N, O].

    Without `starts` each row has k entries. With `starts` the numbers of entries may differ. E is their sum.

    Attributes:
        values: The kept entries [N, k], in the gradient's dtype. With `starts` they are [E], one row after the other.
        indices: The output features of `values`, in the same shape, int32, ascending in each row.
        width: O, the number of output features.
        shared: What every row gets in addition [O], in the gradient's dtype. None means nothing.
        starts: The place of each row's first entry [N + 1], int64, from 0 to E, not descending. Row n has the entries
            from starts[n] to starts[n + 1]. None means that each row has k.

    Raises:
        ValueError: The shapes or devices do not fit, the indices are not int32, or `width` is no number of features.
        TypeError: One of them is not a tensor.
    """

    values: Tensor
    indices: Tensor
    width: int
    shared: Tensor | None = None
    starts: Tensor | None = None

    def __post_init__(self) -> None:
        _check_types(self, shared=self.shared, starts=self.starts)
        if self.starts is None:
            _check(self.values, self.indices, 2, self.values.shape, "[N, k] with int32 indices [N, k]")
        else:
            _check(self.values, self.indices, 1, self.values.shape, "[E] with int32 indices [E] and starts [N + 1]")
            if self.starts.dim() != 1 or self.starts.dtype != torch.int64 or len(self.starts) == 0:
                raise ValueError(f"starts is [N + 1], int64, not {list(self.starts.shape)}, {self.starts.dtype}")
        _check_shared(self.shared, self.width)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return len(self.values) if self.starts is None else len(self.starts) - 1

    @property
    def density(self) -> float:
        """The share of the gradient that is kept, E / (N O). With `starts` and no rows it is 0."""
        if self.starts is None:
            return self.indices.shape[1] / self.width
        return len(self.indices) / max(1, self.rows * self.width)

    def row_numbers(self) -> Tensor:
        """The row of each entry, in the shape of `indices`, int64."""
        rows = torch.arange(self.rows, device=self.indices.device)
        return (
            rows[:, None].expand(self.indices.shape)
            if self.starts is None
            else rows.repeat_interleave(self.starts.diff())
        )

    def to_dense(self) -> Tensor:
        """The kept entries among zeros, plus what is shared: [N, O], in the dtype of `values`."""
        dense_NO = self.values.new_zeros(self.rows, self.width)
        dense_NO[self.row_numbers(), self.indices.long()] = self.values
        return dense_NO if self.shared is None else dense_NO.add_(self.shared)


@dataclass(frozen=True, eq=False)
class ColumnSelection:
    """k columns (output features) of an output gradient [N, O], the same for all rows.

    Attributes:
        values: The kept columns [N, k], in the gradient's dtype.
        indices: The output features of `values` [k], int32, ascending.
        width: O, the number of output features.
        shared: What every row gets in addition [O], in the gradient's dtype. None means nothing.

    Raises:
        ValueError: The shapes or devices do not fit, the indices are not int32, or `width` is no number of features.
        TypeError: One of them is not a tensor.
    """

    values: Tensor
    indices: Tensor
    width: int
    shared: Tensor | None = None

    def __post_init__(self) -> None:
        _check_types(self, shared=self.shared)
        _check(self.values, self.indices, 2, self.values.shape[1:], "[N, k] with int32 indices [k]")
        _check_shared(self.shared, self.width)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return len(self.values)

    @property
    def density(self) -> float:
        """The share of the gradient that is kept, k / O."""
        return len(self.indices) / self.width

    def to_dense(self) -> Tensor:
        """The kept entries among zeros, plus what is shared: [N, O], in the dtype of `values`."""
        dense_NO = self.values.new_zeros(self.rows, self.width)
        dense_NO.index_copy_(1, self.indices.long(), self.values)
        return dense_NO if self.shared is None else dense_NO.add_(self.shared)


@dataclass(frozen=True, eq=False)
class WholeRows:
    """M whole rows of an output gradient [N, O]: examples, or tokens.

    Attributes:
        values: The kept rows [M, O], in the gradient's dtype. A rule may have scaled them.
        numbers: The numbers of the rows [M], int32, ascending.
        rows: N, the number of rows of the output gradient.
        sums: The sums of the columns of the whole output gradient [O], where the choice has made them, else None.

    Raises:
        ValueError: The shapes or devices do not fit, the numbers are not int32, or `rows` is no number of rows.
        TypeError: One of them is not a tensor.
    """

    values: Tensor
    numbers: Tensor
    rows: int
    sums: Tensor | None = None

    def __post_init__(self) -> None:
        _check_type("values", self.values)
        _check_type("numbers", self.numbers)
        _check_size("rows", "N, the number of rows", self.rows)
        if self.sums is not None:
            _check_type("sums", self.sums)
            if self.sums.shape != self.values.shape[1:]:
                raise ValueError(f"sums is [O] = {list(self.values.shape[1:])}, not {list(self.sums.shape)}")
        _check(self.values, self.numbers, 2, self.values.shape[:1], "[M, O] with int32 numbers of rows [M]")

    @property
    def width(self) -> int:
        """O, the number of output features."""
        return self.values.shape[1]

    @property
    def density(self) -> float:
        """The share of the gradient that is kept, M / N. Without rows it is 0."""
        return len(self.values) / max(1, self.rows)

    def to_dense(self) -> Tensor:
        """The kept rows among zeros: [N, O], in the dtype of `values`."""
        return self.values.new_zeros(self.rows, self.width).index_copy_(0, self.numbers.long(), self.values)


FeatureSelection = RowSelection | ColumnSelection
"""Some output features, of each row or of all."""

Selection = FeatureSelection | WholeRows
"""What a rule returns."""


class PlainTopK(NamedTuple):
    """A top-k selection that has not been made yet. A backend may make it and multiply with it in one call.

    Attributes:
        k: How many entries of each row, or how many columns, are kept in each block.
        scope: "example" for entries of each row, "batch" for columns.
        blocks: The number of equal blocks of the output features.
    """

    k: int
    scope: Scope
    blocks: int = 1


class Entries(NamedTuple):
    """Entries of a whole output gradient that are yet to be chosen. `meprop.ops.choose_entries` says what they are.

    Attributes:
        keep: "largest" for a number of the largest entries, "energy" for the largest ones that hold a share of the sum
            of squares, "noise" for drawn ones under a budget of variance, "drawn" for a number of drawn ones.
        k: How many entries are kept of a row on average. With "noise" it is the least number.
        share: The share of the sum of squares, with "energy" and "noise".
        exact_sum: Whether all rows share the mean of what is left out.
        key: The key of the random numbers, int64 [], with "noise" and "drawn".
        ceiling: The density above which everything is kept.
    """

    keep: Literal["largest", "energy", "noise", "drawn"]
    k: int = 0
    share: float = 0.0
    exact_sum: bool = False
    key: Tensor | None = None
    ceiling: float = 1.0


def everything(grad_NO: Tensor) -> ColumnSelection:
    """The selection that keeps a whole output gradient."""
    outputs = grad_NO.shape[1]
    return ColumnSelection(grad_NO, torch.arange(outputs, dtype=torch.int32, device=grad_NO.device), outputs)


def is_everything(selection: Selection) -> bool:
    """Whether a selection is that of `everything`, so that its products are the dense ones."""
    return isinstance(selection, ColumnSelection) and len(selection.indices) == selection.width


def columns_with_entries(selection: RowSelection) -> Tensor:
    """The indices of the output features that have an entry in some row [k], int64, ascending."""
    return torch.bincount(selection.indices.flatten(), minlength=selection.width).nonzero()[:, 0]


def in_columns(selection: RowSelection, columns: Tensor) -> RowSelection:
    """A selection without a shared part, as one of these output features alone [N, k].

    Args:
        selection: Some entries of each row [N, O].
        columns: The indices of all output features that have an entry [k], int64, ascending.
    """
    places = torch.empty(selection.width, dtype=torch.int32, device=columns.device)
    places[columns] = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    return RowSelection(selection.values, places[selection.indices.long()], len(columns), starts=selection.starts)


def side_by_side(parts: Sequence[Selection]) -> FeatureSelection:
    """One selection of the features of all parts, one part after the other.

    Columns beside entries of rows become entries of rows.

    Raises:
        ValueError: There are no parts, or their numbers of rows differ.
        TypeError: A part is neither a RowSelection nor a ColumnSelection.
    """
    return _side_by_side([_part(each) for each in parts])


def _part(selection: Selection) -> FeatureSelection:
    if not isinstance(selection, RowSelection | ColumnSelection):
        raise TypeError(f"a selection side by side is a {type(selection).__name__}; it is a Row- or a ColumnSelection")
    return selection


def _side_by_side(parts: Sequence[FeatureSelection]) -> FeatureSelection:
    if len({part.rows for part in parts}) != 1:
        found = ", ".join(f"{type(part).__name__} of {part.rows} rows" for part in parts)
        raise ValueError(f"selections side by side are of the same rows, not {found or 'none'}")
    if len({type(part) for part in parts}) > 1:
        parts = [_by_row(part) for part in parts]
    firsts = [sum(part.width for part in parts[:number]) for number in range(len(parts) + 1)]
    indices = [part.indices + first for part, first in zip(parts, firsts, strict=False)]
    shared = None
    if any(part.shared is not None for part in parts):
        shared = torch.cat([shared_or_zeros(part) for part in parts])
    if isinstance(parts[0], ColumnSelection):
        values = torch.cat([part.values for part in parts], dim=1)
        return ColumnSelection(values, torch.cat(indices), firsts[-1], shared)
    rows_of = [part for part in parts if isinstance(part, RowSelection)]
    if all(part.starts is None for part in rows_of):
        values = torch.cat([part.values for part in parts], dim=1)
        return RowSelection(values, torch.cat(indices, dim=1), firsts[-1], shared)
    rows = torch.cat([part.row_numbers().flatten() for part in rows_of])
    order = rows.argsort(stable=True)
    values = torch.cat([part.values.flatten() for part in parts])[order]
    counts = torch.zeros(parts[0].rows + 1, dtype=torch.int64, device=rows.device)
    starts = counts.index_add_(0, rows + 1, torch.ones_like(rows)).cumsum(0)
    return RowSelection(values, torch.cat([each.flatten() for each in indices])[order], firsts[-1], shared, starts)


def _by_row(selection: FeatureSelection) -> RowSelection:
    if isinstance(selection, RowSelection):
        return selection
    indices = selection.indices.expand(selection.values.shape)
    return RowSelection(selection.values, indices, selection.width, selection.shared)


def one_after_another(parts: Sequence[RowSelection]) -> RowSelection:
    """One selection of the rows of all parts, without what their rows share. There is a part, and all are as wide."""
    values = torch.cat([part.values.flatten() for part in parts])
    indices = torch.cat([part.indices.flatten() for part in parts])
    counts = [
        torch.full((part.rows,), part.indices.shape[1]) if part.starts is None else part.starts.diff() for part in parts
    ]
    starts = torch.zeros(sum(part.rows for part in parts) + 1, dtype=torch.int64, device=indices.device)
    torch.cumsum(torch.cat(counts), 0, out=starts[1:])
    return RowSelection(values, indices, parts[0].width, starts=starts)


def shared_or_zeros(part: FeatureSelection) -> Tensor:
    """What all rows share [O], or zeros."""
    return part.values.new_zeros(part.width) if part.shared is None else part.shared


def _check_types(selection: FeatureSelection, **tensors: Tensor | None) -> None:
    _check_size("width", "O, the number of output features", selection.width)
    _check_type("values", selection.values)
    _check_type("indices", selection.indices)
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_type(name, tensor)


def _check_size(name: str, meaning: str, size: int) -> None:
    if not isinstance(size, int | torch.SymInt) or isinstance(size, bool) or size < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{name}={size!r}; it is {meaning}")


def _check_type(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} is of type {type(tensor).__name__}; it is a torch.Tensor")


def _check(values: Tensor, indices: Tensor, dims: int, shape: torch.Size, form: str) -> None:
    if values.dim() != dims or indices.shape != shape or indices.dtype != torch.int32:
        raise ValueError(
            f"a selection is values {form}, not values {list(values.shape)} with "
            f"{indices.dtype} indices {list(indices.shape)}"
        )
    if values.device != indices.device:
        raise ValueError(f"values are on {values.device}, and indices on {indices.device}; they are on one device")


def _check_shared(shared: Tensor | None, width: int) -> None:
    if shared is not None and shared.shape != (width,):
        raise ValueError(f"shared is [O] = [{width}], not {list(shared.shape)}")

"""What a rule answers: which entries of an output gradient are propagated. Plain data; `ops` multiplies with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowSelection:
    """k entries of each row (example) of an output gradient [N, O].

    Attributes:
        values: The kept entries [N, k], in the gradient's dtype.
        indices: Their output features [N, k], int32, ascending in each row.
        width: O, the number of output features.
        shared: What every row gets in addition [O], in the gradient's dtype; None: nothing.

    Raises:
        ValueError: The shapes do not fit, or the indices are not int32.
    """

    values: Tensor
    indices: Tensor
    width: int
    shared: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.values, self.indices, self.values.shape, "[N, k]")
        if self.shared is not None and self.shared.shape != (self.width,):
            raise ValueError(f"shared is [O] = [{self.width}], not {list(self.shared.shape)}")

    @property
    def density(self) -> float:
        """The share of the gradient that is kept, k / O."""
        return self.indices.shape[-1] / self.width

    def to_dense(self) -> Tensor:
        """The gradient with everything else zero, but for what is shared: [N, O], in the dtype of `values`."""
        dense_NO = self.values.new_zeros(self.values.shape[0], self.width)
        dense_NO.scatter_(1, self.indices.long(), self.values)
        return dense_NO if self.shared is None else dense_NO.add_(self.shared)


@dataclass(frozen=True, eq=False)
class ColumnSelection:
    """k columns (output features) of an output gradient [N, O], the same for the whole batch.

    Attributes:
        values: The kept columns [N, k], in the gradient's dtype.
        indices: Their output features [k], int32, ascending.
        width: O, the number of output features.

    Raises:
        ValueError: The shapes do not fit, or the indices are not int32.
    """

    values: Tensor
    indices: Tensor
    width: int

    def __post_init__(self) -> None:
        _check(self.values, self.indices, self.values.shape[1:], "[k]")

    @property
    def density(self) -> float:
        """The share of the gradient that is kept, k / O."""
        return self.indices.shape[-1] / self.width

    def to_dense(self) -> Tensor:
        """The gradient with everything else zero: [N, O], in the dtype of `values`."""
        dense_NO = self.values.new_zeros(self.values.shape[0], self.width)
        return dense_NO.index_copy_(1, self.indices.long(), self.values)


Selection = RowSelection | ColumnSelection


@dataclass(eq=False)
class Activity:
    """How often each unit (output feature) of a layer is selected: the evidence of meSimp (Sun et al., TKDE 2018).

    Attributes:
        hits: Examples (rows of the output gradient) in which a unit has a selected entry that is not zero [O], int64. A
            selected zero is no hit, NaN is one. Of an LSTM a unit [H] is hit where any of its four gates is, and a row
            is one time step of one sequence. Of a convolution an example hits a channel where any of its positions
            does.
        examples: How many rows there were.
    """

    hits: Tensor
    examples: int = 0

    @classmethod
    def of_units(cls, units: int, device: torch.device | str | None = None) -> Activity:
        """Nothing so far, of so many units."""
        return cls(torch.zeros(units, dtype=torch.int64, device=device))

    def count(self, selection: Selection, positions: int = 1) -> None:
        """Adds a selection [N, O], whose rows are so many positions of each example, one after the other.

        What it shares among all rows is not selected.
        """
        hit, indices = selection.values != 0, selection.indices
        if positions > 1:
            if isinstance(selection, RowSelection):
                nowhere = hit.new_zeros(len(hit), selection.width)
                hit = nowhere.scatter_(1, indices.long(), hit)
                indices = torch.arange(selection.width, device=hit.device)
            hit = hit.reshape(-1, positions, hit.shape[1]).any(dim=1)
        self.examples += len(hit)
        hit = hit.long() if indices.dim() == 2 else hit.sum(dim=0)
        self.hits.index_add_(0, indices.flatten(), hit.flatten())

    def reset(self) -> None:
        """Begins again."""
        self.hits.zero_()
        self.examples = 0


def _check(values: Tensor, indices: Tensor, shape: torch.Size, form: str) -> None:
    if values.dim() != 2 or indices.shape != shape or indices.dtype != torch.int32:
        raise ValueError(
            f"a selection is values [N, k] with int32 indices {form}, not values {list(values.shape)} with "
            f"{indices.dtype} indices {list(indices.shape)}"
        )


@dataclass(frozen=True)
class AwakeRows:
    """The rows of a parameter [O, *] that an optimizer's step has a gradient for; the others are asleep.

    Attributes:
        indices: Which they are [k], int64, ascending.
        values: Their gradients [k, *].
        every_row: Whether sleeping rows move as well, with a gradient of zeros.
        row_step: The step until which each row's state is up to date [O], float32, and then made so; None: all are.
        narrow: A bfloat16 copy of the parameter, that is to get what moves; None: there is none.
    """

    indices: Tensor
    values: Tensor
    every_row: bool = False
    row_step: Tensor | None = None
    narrow: Tensor | None = None

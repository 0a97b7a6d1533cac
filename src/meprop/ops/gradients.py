"""Gradients of a parameter [O, *] for the step of an optimizer: some rows, all of them, or a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from meprop.ops import native
from meprop.ops.products import grad_weight, native_declines_selection, row_sparse_tensor
from meprop.ops.rounding import Places
from meprop.selection import RowSelection, in_columns

PARAMETER = "param"
"""Stands for the parameter itself among the names of its state."""

ROW_DECAY = "_row_decay"
"""How the name of a state ends that says how far another state, whose name comes before it, decays in each row [O]."""

ROW_WEIGHT_DECAY = "_row_weight_decay"
"""How the name of a state ends that says what weight decay adds to another state in each row [O], as a multiple of the
row's weights, or of their squares."""

OF_ROWS = (ROW_DECAY, ROW_WEIGHT_DECAY)
"""How the names of the states end that have one number for each row [O]."""


@dataclass(frozen=True)
class GradientRows:
    """The rows of a parameter [O, *] for which a step has a gradient.

    Attributes:
        indices: The indices of the rows [k], int64, ascending. None for all rows, which then have no `decays`. The
            parameter may have any shape then, also [].
        values: The gradients of the rows [k, *].
        every_row: Whether the other rows move as well, with a gradient of zeros.
        decays: By what this step multiplies each row of a state, or of the parameter (`PARAMETER`), before the gradient
            acts [O]. The factors differ, as rows have missed steps. A state that is not named here decays as in one
            step of torch's optimizer.
    """

    indices: Tensor | None
    values: Tensor
    every_row: bool = False
    decays: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of_step(self, every_row: bool, decays: Mapping[str, Tensor]) -> GradientRows:
        """This gradient, with what a step does to other rows and to states that have missed steps."""
        return replace(self, every_row=every_row, decays=decays)

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """Raises a ValueError if the shapes of a parameter, of its state [O, *], and of this gradient do not fit."""
        fits = self.values.shape == (weight.shape if self.indices is None else (len(self.indices), *weight.shape[1:]))
        fits = fits and all(each is None or each.shape == weight.shape for each in state)
        if not fits or not _decays_fit(self.decays, weight):
            tensors = (self.values, *state, *self.decays.values())
            found = [list(tensor.shape) for tensor in tensors if tensor is not None]
            raise ValueError(
                f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
            )

    def decay(self, name: str, otherwise: float, at: Places, dimensions: int) -> Tensor | float:
        """The factors of the rows `at` as a column of so many dimensions, or the one of all rows."""
        return _decay(self.decays.get(name), otherwise, at, dimensions)


@dataclass(frozen=True)
class GradientProduct:
    """The gradient of a linear map's weight [O, I] as the product that it is, which is not formed yet.

    A native step forms parts of it in the cache, and never writes them to memory.

    Attributes:
        selection: What is kept of the output gradient [N, O].
        x: The input [N, I].
        indices: The indices of the rows with an entry [k], int64, ascending, if the others do not move. None if all
            rows move, which then have no `decays`.
        decays: As of `GradientRows`.
    """

    selection: RowSelection
    x: Tensor
    indices: Tensor | None = None
    decays: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def of_rows(self) -> RowSelection:
        """What is kept of the output features that `indices` names [N, k]. Without these, of all of them."""
        return self.selection if self.indices is None else in_columns(self.selection, self.indices)

    def formed(self) -> Tensor:
        """The gradient [O, I]. Without all rows it is a coalesced sparse COO tensor."""
        if self.indices is None:
            return grad_weight(self.selection, self.x)
        empty = len(self.indices) == 0
        rows = self.x.new_empty(0, self.x.shape[1]) if empty else grad_weight(self.of_rows, self.x)
        return row_sparse_tensor(self.indices, rows, self.selection.width)

    def of_step(self, every_row: bool, decays: Mapping[str, Tensor]) -> GradientProduct:
        """As of `GradientRows`."""
        return replace(self, indices=None if every_row else self.indices, decays=decays)

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """The same as that of `GradientRows`."""
        expected, rows = (self.selection.width, self.x.shape[1]), self.selection.rows
        fits = all(each is None or each.shape == expected for each in (weight, *state))
        if len(self.x) != rows or not fits or not _decays_fit(self.decays, weight):
            found = [list(each.shape) for each in (*state, *self.decays.values()) if each is not None]
            raise ValueError(
                f"a parameter {list(weight.shape)} and its state {found} do not go with a selection "
                f"[{rows}, {self.selection.width}] and an input {list(self.x.shape)}; give it a new optimizer"
            )

    def decay(self, name: str, otherwise: float, at: Places, dimensions: int) -> Tensor | float:
        """As of `GradientRows`."""
        return _decay(self.decays.get(name), otherwise, at, dimensions)

    def declines(self) -> str | None:
        """Why native code cannot form the product. None if it can."""
        if len(self.x) == 0:
            return "an input without rows, which is not read"
        return native.declines(self.x, dtypes=native.FLOAT32) or native_declines_selection(self.selection)


def _decays_fit(decays: Mapping[str, Tensor], weight: Tensor) -> bool:
    return all(decay.shape == weight.shape[:1] for decay in decays.values())


def _decay(decay: Tensor | None, otherwise: float, at: Places, dimensions: int) -> Tensor | float:
    return otherwise if decay is None else decay[at].view(-1, *[1] * (dimensions - 1))


Gradient = GradientRows | GradientProduct
"""The gradient of a parameter."""

"""Gradients of a parameter [O, *] for the step of an optimizer: some rows, all of them, or a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from meprop.ops import native
from meprop.ops.products import grad_weight, native_declines_selection
from meprop.ops.rounding import Places
from meprop.selection import RowSelection

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

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """Raises a ValueError if the shapes of a parameter, of its state [O, *], and of this gradient do not fit."""
        fits = self.values.shape == (weight.shape if self.indices is None else (len(self.indices), *weight.shape[1:]))
        fits = fits and all(decay.shape == weight.shape[:1] for decay in self.decays.values())
        fits = fits and all(each is None or each.shape == weight.shape for each in state)
        if not fits:
            tensors = (self.values, *state, *self.decays.values())
            found = [list(tensor.shape) for tensor in tensors if tensor is not None]
            raise ValueError(
                f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
            )

    def decay(self, name: str, otherwise: float, at: Places, dimensions: int) -> Tensor | float:
        """The factors of the rows `at` as a column of so many dimensions, or the one of all rows."""
        decay = self.decays.get(name)
        return otherwise if decay is None else decay[at].view(-1, *[1] * (dimensions - 1))


@dataclass(frozen=True)
class GradientProduct:
    """The gradient of a linear map's weight [O, I] as the product that it is, which is not formed yet.

    A native step forms parts of it in the cache, and never writes them to memory.

    Attributes:
        selection: What is kept of the output gradient [N, O].
        x: The input [N, I].
    """

    selection: RowSelection
    x: Tensor

    def formed(self) -> Tensor:
        """The gradient [O, I]."""
        return grad_weight(self.selection, self.x)

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """The same as that of `GradientRows`."""
        expected, rows = (self.selection.width, self.x.shape[1]), self.selection.rows
        if len(self.x) != rows or any(each is not None and each.shape != expected for each in (weight, *state)):
            found = [list(each.shape) for each in state if each is not None]
            raise ValueError(
                f"a parameter {list(weight.shape)} and its state {found} do not go with a selection "
                f"[{rows}, {self.selection.width}] and an input {list(self.x.shape)}; give it a new optimizer"
            )

    def decay(self, _name: str, otherwise: float, _at: Places, _dimensions: int) -> float:
        """The factor of all rows. None has missed a step."""
        return otherwise

    def declines(self) -> str | None:
        """Why native code cannot form the product. None if it can."""
        if len(self.x) == 0:
            return "an input without rows, which is not read"
        return native.declines(self.x, dtypes=native.FLOAT32) or native_declines_selection(self.selection)


Gradient = GradientRows | GradientProduct
"""The gradient of a parameter."""

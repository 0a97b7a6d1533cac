"""How much of an output gradient's energy, its sum of squares, is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from meprop.selection import ColumnSelection, Selection, WholeRows

__all__ = ["Energy"]


@dataclass(eq=False)
class Energy:
    """Sums of squares of output gradients.

    Attributes:
        kept: The sum of g^2 over the entries that were kept. Entries count as they are in the gradient, whatever a rule
            makes of them: drawn ones before they are scaled, and what all rows share not at all.
        whole: The sum of g^2 over all entries.
    """

    kept: float = 0.0
    whole: float = 0.0

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in the copy of a model that is being measured: nobody asks for the energy of the copy."""
        return type(None), ()

    def add(self, grad_NO: Tensor, selection: Selection) -> None:
        """Adds an output gradient [N, O] of any floating dtype, and what is kept of it. Sums are formed in float64."""
        squares = grad_NO.detach().double().square()
        if isinstance(selection, WholeRows):
            kept = squares[selection.numbers]
        else:
            rows = slice(None) if isinstance(selection, ColumnSelection) else selection.row_numbers()
            kept = squares[rows, selection.indices.long()]
        self.kept += kept.sum().item()
        self.whole += squares.sum().item()

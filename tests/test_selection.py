"""The two selections: what they refuse. What they hold is tested with the rules that make them."""

import pytest
import torch

import meprop
from meprop import ops
from meprop.ops import native


@pytest.mark.parametrize(
    ("kind", "values", "indices"),
    [
        (meprop.RowSelection, (2, 3), torch.zeros(2, 3, dtype=torch.int64)),
        (meprop.RowSelection, (2, 3), torch.zeros(3, dtype=torch.int32)),
        (meprop.RowSelection, (2, 3), torch.zeros(2, 2, dtype=torch.int32)),
        (meprop.RowSelection, (3,), torch.zeros(3, dtype=torch.int32)),
        (meprop.ColumnSelection, (2, 3), torch.zeros(3, dtype=torch.int64)),
        (meprop.ColumnSelection, (2, 3), torch.zeros(2, 3, dtype=torch.int32)),
        (meprop.ColumnSelection, (2, 3), torch.zeros(4, dtype=torch.int32)),
    ],
)
def test_what_does_not_fit_is_refused(kind, values, indices):
    with pytest.raises(ValueError, match=r"a selection is values \[N, k\] with int32 indices"):
        kind(torch.zeros(values), indices, 10)


@pytest.mark.skipif(not native.levels(), reason="the reference leaves it to torch")
def test_matrices_that_do_not_go_with_the_selection_are_refused():
    """They would be read beyond their end."""
    selection = meprop.TopK(2).select(torch.randn(4, 9))
    with pytest.raises(ValueError, match=r"\[4, 9\].*\[3, 5\]"):
        ops.grad_weight(selection, torch.randn(3, 5))
    with pytest.raises(IndexError, match="output features"):
        ops.grad_input(
            meprop.RowSelection(torch.ones(1, 1), torch.tensor([[8]], dtype=torch.int32), 9), torch.ones(8, 5)
        )

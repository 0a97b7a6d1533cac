"""The two selections: what they refuse, and the count of what they hold, which is tested with the rules."""

import pytest
import torch

import meprop
from cases import GRADIENTS, SELECTIONS, gradient
from meprop import ops
from meprop.ops import native
from meprop.policy import Activity


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
            meprop.RowSelection(torch.ones(1, 1), torch.tensor([[9]], dtype=torch.int32), 9), torch.ones(9, 5)
        )


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_hits_are_those_of_a_literal_count(rows, width, k, kind, scope):
    activity = Activity.of_units(width)
    expected = torch.zeros(width, dtype=torch.int64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        selection = meprop.TopK(k, scope=scope).select(gradient(kind, rows, width, dtype))
        activity.count(selection)
        for values in selection.to_dense():
            expected += values != 0
    assert torch.equal(activity.hits, expected)
    assert activity.examples == 3 * rows
    activity.reset()
    assert activity.hits.sum() == activity.examples == 0


def test_a_selected_zero_is_no_hit_and_nan_is_one():
    nan = float("nan")
    activity = Activity.of_units(4)
    activity.count(meprop.TopK(3).select(torch.tensor([[0.0, -0.0, 2.0, 0.0], [nan, 0.0, 0.0, 1.0]])))
    assert activity.hits.tolist() == [1, 0, 1, 1]
    activity.count(meprop.TopK(2, scope="batch").select(torch.tensor([[1.0, 0.0, 0.0, 0.0], [nan, 0.0, 2.0, 0.0]])))
    assert activity.hits.tolist() == [3, 0, 2, 1]


def test_what_is_shared_among_all_rows_is_not_selected():
    activity = Activity.of_units(3)
    activity.count(meprop.CompensatedTopK(1).select(torch.tensor([[4.0, 1.0, 1.0], [1.0, 5.0, 1.0]])))
    assert activity.hits.tolist() == [1, 1, 0]


def test_a_unit_with_several_gates_is_hit_once_a_row():
    gates = [meprop.TopK(1).select(torch.tensor(rows)) for rows in ([[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [2.0, 0.0]])]
    assert ops.count_hits(gates).tolist() == [2, 1]

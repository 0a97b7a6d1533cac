"""The two selections: what they hold, what they refuse, several side by side, and the count of what is hit."""

import pytest
import torch
from torch import Tensor

import meprop
from cases import GRADIENTS, SELECTIONS, gradient
from meprop import ops
from meprop.ops import native
from meprop.record import Activity
from meprop.selection import Selection, side_by_side


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


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("values", "indices", "starts", "message"),
    [
        ((5,), int32(5), torch.tensor([0, 2, 5], dtype=torch.int32), r"starts is \[N \+ 1\], int64"),
        ((5,), int32(5), torch.tensor([[0, 5]]), r"starts is \[N \+ 1\], int64, not \[1, 2\]"),
        ((0,), int32(0), torch.zeros(0, dtype=torch.int64), r"starts is .* not \[0\]"),
        ((5,), int32(4), torch.tensor([0, 5]), r"values \[E\] with int32 indices \[E\]"),
        ((5,), int32(5).long(), torch.tensor([0, 5]), r"values \[E\] with int32 indices \[E\]"),
        ((1, 5), int32(1, 5), torch.tensor([0, 5]), r"values \[E\] with int32 indices \[E\]"),
    ],
)
def test_starts_that_do_not_fit_are_refused(values, indices, starts, message):
    with pytest.raises(ValueError, match=message):
        meprop.RowSelection(torch.zeros(values), indices, 10, starts=starts)


def test_what_is_shared_has_the_width_of_the_gradient():
    entries = torch.zeros(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32), 10
    columns = torch.zeros(2, 3), torch.tensor([0, 1, 2], dtype=torch.int32), 10
    for shape in ((9,), (1, 10), (2, 10)):
        for kind, arguments in ((meprop.RowSelection, entries), (meprop.ColumnSelection, columns)):
            with pytest.raises(ValueError, match=r"shared is \[O\] = \[10\]"):
                kind(*arguments, shared=torch.zeros(shape))


def ragged(rows: int, width: int, seed: int = 0, shared: bool = False) -> tuple[meprop.RowSelection, Tensor]:
    """About a third of the entries, other numbers of them in each row, none in the first; and the same, dense."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator) ** 2
    mask[:1] = False
    dense = torch.randn(rows, width, generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)])
    added = torch.randn(width, generator=generator) if shared else None
    selection = meprop.RowSelection(dense[mask], mask.nonzero()[:, 1].int(), width, added, starts)
    kept = dense.masked_fill(~mask, 0.0)
    return selection, kept if added is None else kept + added


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (7, 1), (9, 33), (2, 1000)])
def test_a_row_has_the_entries_between_its_start_and_the_next(rows, width, shared):
    selection, dense = ragged(rows, width, shared=shared)
    torch.testing.assert_close(selection.to_dense(), dense, rtol=0, atol=0)
    assert selection.rows == rows
    assert selection.density == len(selection.indices) / (rows * width)
    counts = selection.row_numbers().bincount(minlength=rows)
    assert counts.tolist() == selection.starts.diff().tolist()
    assert (selection.row_numbers().diff() >= 0).all()


def test_no_rows_with_starts():
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    selection = meprop.RowSelection(*empty, 7, starts=torch.zeros(1, dtype=torch.int64))
    assert (selection.rows, selection.density) == (0, 0.0)
    assert selection.to_dense().shape == (0, 7)


# ---------------------------------------------------------------- side by side


def parts_of(kind: str) -> list[Selection]:
    """Of 6 rows each, and of other widths."""
    torch.manual_seed(0)
    gradients = [torch.randn(6, width) for width in (9, 4, 17)]
    if kind == "columns":
        return [meprop.TopK(k, scope="batch").select(grad) for k, grad in zip((2, 1, 5), gradients, strict=True)]
    if kind == "columns, shared":
        parts = parts_of("columns")
        parts[1] = meprop.ColumnSelection(parts[1].values, parts[1].indices, 4, shared=torch.randn(4))
        return parts
    if kind == "k of each row":
        return [meprop.TopK(k).select(grad) for k, grad in zip((2, 1, 5), gradients, strict=True)]
    if kind == "k of each row, shared":
        return [meprop.TopK(2).select(gradients[0]), meprop.CompensatedTopK(1).select(gradients[1])]
    if kind == "with starts":
        return [ragged(6, width, seed=width)[0] for width in (9, 4, 17)]
    return [meprop.TopK(2).select(gradients[0]), ragged(6, 4, shared=True)[0], meprop.TopK(5).select(gradients[2])]


@pytest.mark.parametrize(
    "kind", ["columns", "columns, shared", "k of each row", "k of each row, shared", "with starts", "with starts and k"]
)
def test_side_by_side_is_the_parts_one_after_the_other(kind):
    parts = parts_of(kind)
    whole = side_by_side(parts)
    assert type(whole) is type(parts[0])
    assert torch.equal(whole.to_dense(), torch.cat([part.to_dense() for part in parts], dim=1))
    assert whole.width == sum(part.width for part in parts)
    assert (whole.shared is not None) == ("shared" in kind or kind == "with starts and k")
    if isinstance(whole, meprop.ColumnSelection) or whole.starts is None:
        assert (whole.indices.diff() > 0).all()
    else:
        places = whole.row_numbers() * whole.width + whole.indices
        assert (places.diff() > 0).all()  # ascending in each row, and the rows one after the other


def test_the_last_rows_of_parts_side_by_side_may_be_empty():
    indices, starts = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1, 2, 2, 2])
    part = meprop.RowSelection(torch.tensor([4.0, 5.0]), indices, 3, None, starts)
    whole = side_by_side([part, part])
    assert whole.starts.tolist() == [0, 2, 4, 4, 4]
    assert whole.to_dense().tolist() == [[4.0, 0.0, 0.0] * 2, [0.0, 0.0, 5.0] * 2, [0.0] * 6, [0.0] * 6]


@pytest.mark.parametrize("kind", ["k of each row", "ragged"])
def test_columns_beside_entries_of_rows_become_entries_of_rows(kind):
    parts = [parts_of(kind)[0], parts_of("columns")[1]]
    whole = side_by_side(parts)
    assert isinstance(whole, meprop.RowSelection)
    assert torch.equal(whole.to_dense(), torch.cat([part.to_dense() for part in parts], dim=1))


def test_only_parts_of_the_same_rows_lie_side_by_side():
    rows = parts_of("k of each row")
    for parts in ([rows[0], meprop.TopK(1).select(torch.ones(5, 3))], []):
        with pytest.raises(ValueError, match="selections side by side are of the same rows, not"):
            side_by_side(parts)


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


def test_hits_of_entries_with_starts():
    selection, dense = ragged(9, 33)
    activity = Activity.of_units(33)
    activity.count(selection)
    assert torch.equal(activity.hits, (dense != 0).sum(dim=0))
    assert activity.examples == 9


def test_hits_of_examples_that_have_several_rows_each():
    selection, dense = ragged(12, 5)
    for each in (selection, meprop.TopK(2).select(dense), meprop.TopK(2, scope="batch").select(dense)):
        activity = Activity.of_units(5)
        activity.count(each, positions=4)
        assert torch.equal(activity.hits, (each.to_dense() != 0).view(3, 4, 5).any(dim=1).sum(dim=0))
        assert activity.examples == 3


def test_what_is_shared_among_all_rows_is_not_selected():
    activity = Activity.of_units(3)
    activity.count(meprop.CompensatedTopK(1).select(torch.tensor([[4.0, 1.0, 1.0], [1.0, 5.0, 1.0]])))
    assert activity.hits.tolist() == [1, 1, 0]


def test_a_unit_with_several_gates_is_hit_once_a_row():
    gates = [meprop.TopK(1).select(torch.tensor(rows)) for rows in ([[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [2.0, 0.0]])]
    assert ops.count_hits(gates).tolist() == [2, 1]

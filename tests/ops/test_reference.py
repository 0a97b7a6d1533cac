"""The oracle against Python loops over scalars: nothing is shared with it but the definition."""

import math

import pytest
import torch

from cases import ALL_DTYPES, GRADIENTS, SELECTIONS, gradient
from meprop.ops import reference
from meprop.selection import ColumnSelection, RowSelection


def larger(a: float, b: float) -> bool:
    return (math.isnan(a) and not math.isnan(b)) or abs(a) > abs(b)


def kept_by_definition(row: list[float], k: int) -> list[int]:
    """An entry is kept if fewer than k others beat it: larger ones, and equal ones of lower index."""

    def beaten(i: int) -> int:
        return sum(larger(v, row[i]) or (j < i and not larger(row[i], v)) for j, v in enumerate(row))

    return [i for i in range(len(row)) if beaten(i) < k]


SMALL = [case for case in SELECTIONS if case[0] * case[1] ** 2 < 50_000]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SMALL)
def test_topk_rows_keeps_what_the_definition_says(rows, width, k, kind, dtype):
    grad = gradient(kind, rows, width, dtype)
    values, indices = reference.topk_rows(grad, k)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [kept_by_definition(row, k) for row in grad.tolist()]
    torch.testing.assert_close(values, grad.gather(1, indices.long()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SMALL)
def test_topk_columns_keeps_the_largest_sums(rows, width, k, kind):
    grad = gradient(kind, rows, width, torch.float32)
    values, indices = reference.topk_columns(grad, k)
    scores = [
        math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for column in grad.abs().t().tolist()
    ]
    assert indices.tolist() == kept_by_definition(scores, k)
    expected = torch.tensor(scores, dtype=torch.float64)
    torch.testing.assert_close(reference.column_scores(grad), expected, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(values, grad[:, indices.long()], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_topk_channels_keeps_the_largest_sums(kind):
    """Those of the columns of a matrix with a row for each position."""
    matrix = gradient(kind, 12, 17, torch.float32)
    grad = matrix.view(2, 3, 2, 17).movedim(-1, 1)
    values, indices = reference.topk_channels(grad, 5)
    expected, expected_indices = reference.topk_columns(matrix, 5)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected.view(2, 3, 2, 5).movedim(-1, 1), rtol=0, atol=0, equal_nan=True)


def test_products_equal_sums_over_scalars():
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    values, indices = reference.topk_rows(grad, 2)
    grad_input, grad_weight = torch.zeros(3, 4).double(), torch.zeros(6, 4).double()
    for n in range(3):
        for v, o in zip(values[n].tolist(), indices[n].tolist(), strict=True):
            for i in range(4):
                grad_input[n, i] += v * weight[o, i]
                grad_weight[o, i] += v * x[n, i]
    selection = RowSelection(values, indices, 6)
    torch.testing.assert_close(reference.grad_input(selection, weight), grad_input)
    torch.testing.assert_close(reference.grad_weight(selection, x), grad_weight)


def test_an_unselected_row_of_the_weight_is_not_read():
    values, indices = reference.topk_rows(torch.tensor([[0.0, 2.0, 1.0]]), 1)
    weight = torch.tensor([[float("inf")], [3.0], [float("nan")]])
    assert reference.grad_input(RowSelection(values, indices, 3), weight).tolist() == [[6.0]]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_column_products_equal_dense_products_of_the_kept_columns(dtype):
    generator = torch.Generator().manual_seed(2)
    grad, weight, x = (torch.randn(shape, generator=generator).to(dtype) for shape in [(5, 9), (9, 4), (5, 4)])
    values, indices = reference.topk_columns(grad, 3)
    kept = torch.zeros(5, 9, dtype=torch.float64)
    kept[:, indices.long()] = grad[:, indices.long()].double()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    grad_input = reference.grad_input(ColumnSelection(values, indices, 9), weight)
    grad_weight = reference.grad_weight(ColumnSelection(values, indices, 9), x)
    assert grad_input.dtype == grad_weight.dtype == dtype
    torch.testing.assert_close(grad_input.double(), kept @ weight.double(), **tolerance)
    torch.testing.assert_close(grad_weight.double(), kept.t() @ x.double(), **tolerance)

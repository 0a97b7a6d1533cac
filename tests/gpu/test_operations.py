"""Every operation that has kernels, against its literal reference on the CPU."""

import pytest
import torch
from torch import Tensor

import meprop
from cases import GRADIENTS, LAYOUTS, SELECTIONS, bits, gradient
from meprop import ops, optim
from meprop.ops import triton
from meprop.ops.rows import choose_rows
from meprop.ops.topk import largest
from meprop.selection import ColumnSelection, Entries, PlainTopK, RowSelection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def skip_what_is_interpreted_wrongly(kind: str, dtype: torch.dtype) -> None:
    if kind == "denormal" and dtype is torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter reads denormal bfloat16 as zeros")


def served(operation, *args) -> str:
    """The name of the backend that serves a call."""
    name, _ = operation.explain(*args)
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_the_largest_columns_are_the_references(rows, width, k, kind, dtype, device):
    skip_what_is_interpreted_wrongly(kind, dtype)
    grad = gradient(kind, rows, width, dtype)
    there = grad.to(device)
    assert served(ops.topk_columns, there, k) == "triton"
    expected, found = ops.topk_columns.literally(grad, k), ops.topk_columns(there, k)
    assert found.indices.tolist() == expected.indices.tolist()
    assert torch.equal(bits(found.values.cpu()), bits(expected.values))
    scores = ops.column_scores.literally(grad)
    torch.testing.assert_close(ops.column_scores(there).cpu(), scores, rtol=1e-13, atol=0, equal_nan=True)


def test_scores_that_are_nearly_equal(device):
    """They differ in any of the digits of float64."""
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        count = int(torch.randint(1, 3000, (), generator=generator))
        k = int(torch.randint(1, count + 1, (), generator=generator))
        steps = torch.randint(0, 1 << (number % 8 + 1), (count,), generator=generator).double()
        scores = 1 + steps * 2.0 ** -(number % 6 * 10 + 2)
        found = triton.kernels().largest(scores.to(device), k)
        assert found.tolist() == largest(scores, k).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_every_layout(layout, device):
    grad = LAYOUTS[layout](gradient("normal", 37, 130, torch.bfloat16).to(device))
    expected = ops.topk_columns.literally(grad.cpu(), 9)
    found = ops.topk_columns(grad, 9)
    assert found.indices.tolist() == expected.indices.tolist()
    assert torch.equal(found.values.cpu(), expected.values)


def test_more_columns_than_one_program_chooses_from(device):
    grad = gradient("normal", 3, 40_000, torch.float32)
    found = ops.topk_columns(grad.to(device), 1000)
    assert found.indices.tolist() == ops.topk_columns.literally(grad, 1000).indices.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), [(max(1, rows), width, k) for rows, width, k in SELECTIONS])
def test_drawn_rows_are_the_references(rows, width, k, kind, dtype, device):
    skip_what_is_interpreted_wrongly(kind, dtype)
    grad, k = gradient(kind, rows, width, dtype), min(rows, k)
    for start in (0, 5_000_000, (1 << 24) - 1):
        expected = ops.draw_whole_rows.literally(grad, k, torch.tensor(start))
        args = grad.to(device), k, torch.tensor(start, device=device)
        assert served(ops.draw_whole_rows, *args) == "triton"
        found = ops.draw_whole_rows(*args)
        assert found.numbers.tolist() == expected.numbers.tolist()
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).smallest_normal}
        torch.testing.assert_close(found.values.cpu(), expected.values, **tolerance, equal_nan=True)


def test_more_rows_than_one_program_chooses_from(device):
    grad = gradient("rows of all scales", 40_000, 3, torch.float32)
    expected = ops.draw_whole_rows.literally(grad, 1000, torch.tensor(77))
    found = ops.draw_whole_rows(grad.to(device), 1000, torch.tensor(77, device=device))
    assert found.numbers.tolist() == expected.numbers.tolist()


def test_rows_are_chosen_as_literally(device):
    """Of norms with some large ones, some equal ones, zeros, and of all ranges."""
    generator = torch.Generator().manual_seed(0)
    kernels = triton.kernels()
    for number in range(60):
        count = int(torch.randint(1, 700, (), generator=generator))
        k = int(torch.randint(1, count + 1, (), generator=generator))
        norms = torch.randn(count, generator=generator).mul(number % 7).exp().double()
        norms[torch.rand(count, generator=generator) < 0.1 * (number % 4)] = (0.0, 1.0, 7.0)[number % 3]
        start = torch.randint(0, 1 << 24, (), generator=generator)
        kept, factors = choose_rows(norms, k, start)
        numbers, found = kernels.choose_rows(norms.to(device), k, start.to(device))
        assert numbers.tolist() == kept.tolist()
        torch.testing.assert_close(found.cpu().double(), factors, rtol=1e-6, atol=0)


def test_rows_are_spread_among_zeros(device):
    rows = gradient("normal", 7, 33, torch.bfloat16)
    numbers = torch.tensor([0, 3, 4, 9, 10, 11, 19], dtype=torch.int32)
    expected = ops.spread_rows.literally(rows, numbers, 20)
    assert torch.equal(ops.spread_rows(rows.to(device), numbers.to(device), 20).cpu(), expected)


def selections(grad: Tensor) -> dict[str, ColumnSelection | RowSelection]:
    shared = gradient("normal", 1, grad.shape[1], grad.dtype, seed=9)[0].to(grad.device)
    columns, rows = ops.topk_columns.literally(grad, 5), ops.topk_rows.literally(grad, 5)
    entries = ops.choose_entries.literally(grad, Entries("largest", 4))
    return {
        "columns": columns,
        "columns and shared": ColumnSelection(columns.values, columns.indices, columns.width, shared),
        "rows": rows,
        "rows and shared": RowSelection(rows.values, rows.indices, rows.width, shared),
        "entries": entries,
    }


@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", selections(torch.ones(3, 9)))
def test_products_are_those_of_float64(kind, dtype, row_sparse, device):
    if row_sparse and kind != "columns":
        pytest.skip("only columns leave rows of a weight out")
    grad, weight, x = (gradient("normal", *size, dtype) for size in ((65, 48), (48, 40), (65, 40)))
    selection = selections(grad.to(device))[kind]
    args = selection, grad.to(device), weight.to(device), x.to(device), True, row_sparse
    assert served(ops.linear_backward, *args) == "triton"
    of_input, of_weight, of_bias = (each.cpu() for each in ops.linear_backward(*args))
    kept = selection.to_dense().cpu().double()
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}
    assert of_weight.is_sparse == row_sparse
    for found, expected in (
        (of_input, kept @ weight.double()),
        (of_weight.to_dense(), kept.t() @ x.double()),
        (of_bias, grad.double().sum(dim=0)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **tolerance)


def test_indices_and_weights_of_every_layout(device):
    grad, weight = gradient("normal", 5, 9, torch.float32), gradient("normal", 9, 7, torch.float32)
    indices = torch.tensor([1, 4, 7])
    values = grad[:, indices]
    strided = torch.tensor([1, 8, 4, 8, 7], dtype=torch.int32, device=device)[::2]
    for each in (weight, weight.t().contiguous().t()):
        selection = ColumnSelection(values.to(device), strided, 9)
        assert served(ops.grad_input, selection, each.to(device)) == "triton"
        found = ops.grad_input(selection, each.to(device))
        torch.testing.assert_close(found.cpu(), values @ weight[indices], rtol=1e-5, atol=1e-5)


UNIFIED = meprop.TopK(2, scope="batch")


@pytest.mark.parametrize(
    ("rule", "sparse_grad"), [(UNIFIED, False), (UNIFIED, True), (meprop.Sampled(0.5, scope="rows"), False)], ids=repr
)
def test_a_layer_without_inputs(rule, sparse_grad, device):
    layer = meprop.nn.Linear(0, 9, rule=rule, sparse_grad=sparse_grad).to(device)
    optimizer = optim.Adam(layer.parameters(), sparse_rows="lazy")
    layer(torch.ones(4, 0, device=device)).sum().backward()
    assert layer.weight.grad.shape == (9, 0)
    assert layer.weight.grad.is_sparse == sparse_grad
    assert layer.bias.grad.tolist() == [4.0] * 9
    optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_scores_columns_and_sums_them(dtype, device):
    grad, weight, x = (gradient("normal", *size, dtype) for size in ((300, 200), (200, 40), (300, 40)))
    topk = ops.linear_backward(PlainTopK(9, "batch"), *(each.to(device) for each in (grad, weight, x)), True, False)
    expected = ops.linear_backward.literally(
        PlainTopK(9, "batch"), grad.double(), weight.double(), x.double(), True, False
    )
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 400 * torch.finfo(dtype).eps}
    for found, exact in zip(topk, expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), exact, **tolerance)


@pytest.mark.parametrize("kind", ["normal", "rows of all scales", "ties"])
@pytest.mark.parametrize("keep", ["largest", "energy", "noise", "drawn"])
def test_entries_of_a_whole_gradient_are_the_references(keep, kind, device):
    """Plain torch serves them on a GPU."""
    key = torch.tensor(0x1234_5678_9ABC_DEF) if keep in ("noise", "drawn") else None
    entries = Entries(keep, 5 if keep in ("largest", "drawn") else 0, 0.5, key=key)
    grad = gradient(kind, 64, 90, torch.float32)
    expected = ops.choose_entries.literally(grad, entries)
    there = entries._replace(key=None if key is None else key.to(device))
    found = ops.choose_entries(grad.to(device), there)
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.values.cpu(), expected.values)

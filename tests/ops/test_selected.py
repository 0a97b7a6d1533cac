"""One native call for any selection, against the literal reference, and that against loops over scalars."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, bits, gradient
from meprop import ops
from meprop.ops import reference
from meprop.selection import ColumnSelection, PlainTopK, RowSelection, Selection, side_by_side

kernels = ops.backend("native")

shared_fixture = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# (rows N, inputs I, output features O)
SHAPES = [(0, 5, 7), (1, 1, 1), (3, 0, 5), (5, 3, 1), (7, 65, 64), (13, 130, 40), (10, 300, 129), (64, 37, 33)]
KINDS = ["k of each row", "ragged", "a row of everything", "no entries", "columns", "no columns"]


def ragged(grad: torch.Tensor, counts: torch.Tensor, shared: torch.Tensor | None = None) -> RowSelection:
    """The largest entries of each row of grad [N, O], as many as counts [N] says."""
    kept = [reference.topk_rows(row[None], int(k)) for row, k in zip(grad, counts, strict=True) if k > 0]
    values = torch.cat([grad.new_empty(0), *(values[0] for values, _ in kept)])
    indices = torch.cat([torch.empty(0, dtype=torch.int32), *(indices[0] for _, indices in kept)])
    starts = torch.zeros(len(grad) + 1, dtype=torch.int64)
    starts[1:] = counts.cumsum(0)
    return RowSelection(values, indices, grad.shape[1], shared, starts)


def selection_of(kind: str, grad: torch.Tensor, with_shared: bool) -> Selection:
    rows, width = grad.shape
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(width, generator=generator).to(grad.dtype) if with_shared else None
    k = (width + 2) // 3
    if kind == "k of each row":
        return RowSelection(*reference.topk_rows(grad, k), width, shared)
    if kind == "columns":
        return ColumnSelection(*reference.topk_columns(grad, k), width, shared)
    if kind == "no columns":
        return ColumnSelection(grad[:, :0], torch.empty(0, dtype=torch.int32), width, shared)
    counts = torch.randint(0, width + 1, (rows,), generator=generator)
    if kind == "ragged":
        counts[::3] = 0
    elif kind == "no entries":
        counts[:] = 0
    else:
        counts[: rows // 2] = 0
        counts[rows // 2 : rows // 2 + 1] = width
    return ragged(grad, counts, shared)


def problem(shape, dtype, kind="normal"):
    rows, inputs, width = shape
    return (
        gradient(kind, rows, width, dtype),
        gradient("normal", width, inputs, dtype, seed=1),
        gradient("normal", rows, inputs, dtype, seed=2),
    )


def in_double(selection: Selection) -> Selection:
    shared = None if selection.shared is None else selection.shared.double()
    parts = (selection.values.double(), selection.indices, selection.width, shared)
    return ColumnSelection(*parts) if isinstance(selection, ColumnSelection) else RowSelection(*parts, selection.starts)


def assert_close_to_exact(result: torch.Tensor, selection: Selection, other: torch.Tensor, transposed: bool) -> None:
    """A sum of m terms in float32 errs by at most m roundings of the sum of their magnitudes; then comes one of dtype.

    The shared part has been summed to one term before, and rounded; its own sum is in float64.
    """
    exact_of = reference.grad_weight if transposed else reference.grad_input
    exact = exact_of(in_double(selection), other.double())
    dense = in_double(selection).to_dense()
    if selection.shared is not None:  # a term of its own, not a part of the others
        dense = torch.cat([dense - selection.shared.double(), selection.shared.double().expand(dense.shape)], dim=1)
        other = other if transposed else torch.cat([other, other])
    dense = dense.t() if transposed else dense
    magnitudes = dense.abs() @ other.double().abs()
    if transposed and selection.shared is not None:
        magnitudes = magnitudes[: selection.width] + magnitudes[selection.width :]
    terms = (selection.rows if transposed else selection.width) + 3
    eps = torch.finfo(torch.float32).eps
    bound = terms * eps * magnitudes + torch.finfo(result.dtype).eps * (exact.abs() + terms * eps * magnitudes)
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= bound).all()


# ---------------------------------------------------------------- the oracle


def by_scalars(selection: Selection, weight: torch.Tensor, x: torch.Tensor):
    """Gradients of input and weight, and hits, entry by entry."""
    rows, width, inputs = selection.rows, selection.width, weight.shape[1]
    entries = []
    if isinstance(selection, ColumnSelection):
        for n in range(rows):
            entries += [
                (n, o, v) for o, v in zip(selection.indices.tolist(), selection.values[n].tolist(), strict=True)
            ]
    elif selection.starts is None:
        for n in range(rows):
            pairs = zip(selection.indices[n].tolist(), selection.values[n].tolist(), strict=True)
            entries += [(n, o, v) for o, v in pairs]
    else:
        for n in range(rows):
            for i in range(int(selection.starts[n]), int(selection.starts[n + 1])):
                entries.append((n, int(selection.indices[i]), float(selection.values[i])))
    grad_input, grad_weight = torch.zeros(rows, inputs).double(), torch.zeros(width, inputs).double()
    hits = [0] * width
    shared = [] if selection.shared is None else selection.shared.tolist()
    for n, o, v in entries + [(n, o, s) for n in range(rows) for o, s in enumerate(shared)]:
        for i in range(inputs):
            grad_input[n, i] += v * float(weight[o, i])
            grad_weight[o, i] += v * float(x[n, i])
    for _, o, v in entries:
        hits[o] += v != 0 or math.isnan(v)
    return grad_input, grad_weight, hits


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (4, 2, 1), (6, 3, 5)])
def test_the_reference_sums_over_scalars(shape, kind, with_shared):
    grad, weight, x = problem(shape, torch.float64)
    grad[::2, ::2] = 0.0
    selection = selection_of(kind, grad, with_shared)
    hits = torch.ones(shape[2], dtype=torch.int64)
    found = reference.linear_backward(selection, grad, weight, x, needs_bias=True, row_sparse=False, hits=hits)
    grad_input, grad_weight, counted = by_scalars(selection, weight, x)
    torch.testing.assert_close(found[0], grad_input)
    torch.testing.assert_close(found[1], grad_weight)
    torch.testing.assert_close(found[2], grad.sum(dim=0))
    assert hits.tolist() == [count + 1 for count in counted]


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_the_reference_makes_top_k_within_each_block(scope, blocks):
    grad, weight, x = problem((5, 3, 12), torch.float64, "ties")
    k = 2
    one = reference.topk_rows if scope == "example" else reference.topk_columns
    kind = RowSelection if scope == "example" else ColumnSelection
    width = 12 // blocks
    expected = side_by_side([kind(*one(grad[:, b * width : (b + 1) * width], k), width) for b in range(blocks)])
    topk = PlainTopK(k, scope, blocks)
    found = reference.linear_backward(topk, grad, weight, x, needs_bias=False, row_sparse=False)
    given = reference.linear_backward(expected, grad, weight, x, needs_bias=False, row_sparse=False)
    assert torch.equal(found[0], given[0])
    assert torch.equal(found[1], given[1])


# ---------------------------------------------------------------- native


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_selection_in_one_call(level, poisoned, shape, kind, with_shared, dtype):
    grad, weight, x = problem(shape, dtype)
    selection = selection_of(kind, grad, with_shared)
    hits = torch.ones(shape[2], dtype=torch.int64)
    call = {"needs_bias": True, "row_sparse": False}
    assert ops.linear_backward.explain(selection, grad, weight, x, hits=hits, **call) == ("native", {})
    grad_input, grad_weight, grad_bias = kernels.linear_backward(selection, grad, weight, x, hits=hits, **call)
    assert grad_input.dtype == grad_weight.dtype == grad_bias.dtype == dtype
    assert_close_to_exact(grad_input, selection, weight, transposed=False)
    assert_close_to_exact(grad_weight, selection, x, transposed=True)
    torch.testing.assert_close(grad_bias, grad.double().sum(0).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-30)
    assert torch.equal(hits, 1 + ops.count_hits([selection]))
    # each part alone is the same to the bit
    assert torch.equal(bits(kernels.grad_input(selection, weight)), bits(grad_input))
    assert torch.equal(bits(kernels.grad_weight(selection, x)), bits(grad_weight))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("kind", sorted(GRADIENTS))
@pytest.mark.parametrize("layout", ["contiguous", "part of a wider one"])
@pytest.mark.parametrize(("rows", "width", "k", "blocks"), [(9, 60, 4, 3), (1, 8, 1, 8), (40, 51, 17, 3), (0, 6, 1, 2)])
def test_top_k_within_blocks(level, poisoned, rows, width, k, blocks, layout, kind, scope, dtype):
    """To the bit what the reference's selection gives, hits as well."""
    grad, weight, x = problem((rows, 19, width), dtype, kind)
    grad = LAYOUTS[layout](grad)
    parts = [selection_of_scope(block, k, scope) for block in grad.chunk(blocks, dim=1)]
    hits, expected_hits = (torch.zeros(width, dtype=torch.int64) for _ in range(2))
    call = {"needs_bias": True, "row_sparse": False}
    found = kernels.linear_backward(PlainTopK(k, scope, blocks), grad, weight, x, hits=hits, **call)
    expected = kernels.linear_backward(side_by_side(parts), grad, weight, x, hits=expected_hits, **call)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
    assert torch.equal(hits, expected_hits)
    assert torch.equal(hits, ops.count_hits([side_by_side(parts)]))


def selection_of_scope(grad: torch.Tensor, k: int, scope: str) -> Selection:
    if scope == "example":
        return RowSelection(*reference.topk_rows(grad, k), grad.shape[1])
    return ColumnSelection(*reference.topk_columns(grad, k), grad.shape[1])


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_rows_only_of_columns_in_blocks(level, poisoned, dtype):
    grad, weight, x = problem((9, 70, 24), dtype)
    topk, call = PlainTopK(2, "batch", 3), {"needs_bias": False}
    _, rows, _ = kernels.linear_backward(topk, grad, weight, x, row_sparse=True, **call)
    _, dense, _ = kernels.linear_backward(topk, grad, weight, x, row_sparse=False, **call)
    assert rows.is_coalesced()
    assert len(rows.values()) == 6
    assert torch.equal(rows.to_dense(), dense)


@pytest.mark.parametrize("kind", ["some nan", "some inf", "zeros", "mostly zero"])
@pytest.mark.parametrize("selected", KINDS)
def test_special_values(level, poisoned, selected, kind):
    grad, weight, x = problem((9, 20, 50), torch.float32, kind)
    selection = selection_of(selected, grad, with_shared=True)
    hits, expected_hits = (torch.zeros(50, dtype=torch.int64) for _ in range(2))
    call = {"needs_bias": True, "row_sparse": False}
    found = kernels.linear_backward(selection, grad, weight, x, hits=hits, **call)
    expected = reference.linear_backward(selection, grad, weight, x, hits=expected_hits, **call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(hits, expected_hits)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_nan_is_a_hit_and_zero_is_none(level, dtype):
    values = torch.tensor([[0.0, float("nan"), -0.0, 1e-30]], dtype=dtype)
    indices, grad, weight = torch.arange(4, dtype=torch.int32), torch.zeros(1, 4, dtype=dtype), torch.ones(4, 2)
    for selection in (RowSelection(values, indices[None], 4), ColumnSelection(values, indices, 4)):
        hits = torch.zeros(4, dtype=torch.int64)
        kernels.linear_backward(selection, grad, weight.to(dtype), None, needs_bias=False, row_sparse=False, hits=hits)
        assert hits.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", KINDS)
def test_memory_layouts(level, poisoned, kind, layout, dtype):
    grad, weight, x = problem((9, 70, 33), dtype)
    selection = selection_of(kind, grad, with_shared=True)
    call = {"needs_bias": True, "row_sparse": False}
    expected = kernels.linear_backward(selection, grad, weight, x, **call)
    laid = [LAYOUTS[layout](tensor) for tensor in (grad, weight, x)]
    found = kernels.linear_backward(selection, *laid, **call)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "blocks of rows", "blocks of columns"])
def test_threads_do_not_change_a_bit(level, threads, kind, dtype):
    """Large enough that four threads get work, with panels that do not divide evenly among them."""
    grad, weight, x = problem((150, 333, 258), dtype, "rows of all scales")
    blocks = {"blocks of rows": PlainTopK(20, "example", 3), "blocks of columns": PlainTopK(20, "batch", 3)}
    choice = blocks[kind] if kind in blocks else selection_of(kind, grad, with_shared=True)
    results = []
    for count in (1, 2, 4, 2):
        torch.set_num_threads(count)
        hits = torch.zeros(258, dtype=torch.int64)
        gradients = kernels.linear_backward(choice, grad, weight, x, needs_bias=True, row_sparse=False, hits=hits)
        results.append([*gradients, hits])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(map(bits, results[0][:3]), map(bits, other[:3]), strict=True))
        assert torch.equal(results[0][3], other[3])


@shared_fixture
@given(data=st.data())
def test_random_ragged_selections(level, data):
    rows, inputs = data.draw(st.integers(0, 20), "rows"), data.draw(st.integers(1, 200), "inputs")
    width = data.draw(st.integers(1, 90), "width")
    dtype = data.draw(st.sampled_from(NATIVE_DTYPES), "dtype")
    counts = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows), "counts"))
    grad, weight, x = problem((rows, inputs, width), dtype, data.draw(st.sampled_from(["normal", "ties"]), "kind"))
    shared = gradient("normal", 1, width, dtype, seed=4)[0] if data.draw(st.booleans(), "shared") else None
    selection = ragged(grad, counts.long(), shared)
    hits = torch.zeros(width, dtype=torch.int64)
    grad_input, grad_weight, _ = kernels.linear_backward(
        selection, grad, weight, x, needs_bias=False, row_sparse=False, hits=hits
    )
    assert_close_to_exact(grad_input, selection, weight, transposed=False)
    assert_close_to_exact(grad_weight, selection, x, transposed=True)
    assert torch.equal(hits, ops.count_hits([selection]))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("starts", "indices"),
    [
        ([1, 1, 2], [0, 1]),  # does not begin with 0
        ([0, 2, 1], [0, 1]),  # descends
        ([0, 1, 3], [0, 1]),  # ends beyond the entries
        ([0, 1, 1], [0, 1]),  # ends before them
        ([0, 2**62, 2], [0, 1]),
        ([0, -1, 2], [0, 1]),
        ([0, 2, 2], [1, 1]),
        ([0, 1, 2], [0, 8]),
        ([0, 0, 2], [-1, 3]),
    ],
    ids=str,
)
def test_starts_and_indices_that_are_not_there_raise(level, starts, indices):
    indices = torch.tensor(indices, dtype=torch.int32)
    selection = RowSelection(torch.ones(2), indices, 8, starts=torch.tensor(starts))
    grad, weight, x = torch.ones(2, 8), torch.ones(8, 4), torch.ones(2, 4)
    with pytest.raises(IndexError, match="ascend"):
        ops.linear_backward(selection, grad, weight, x, needs_bias=False, row_sparse=False)


@pytest.mark.parametrize(
    "topk", [PlainTopK(0, "example"), PlainTopK(3, "batch", 4), PlainTopK(2, "example", 3)], ids=str
)
def test_top_k_that_does_not_fit_raises(topk):
    for backend in (kernels, reference):
        with pytest.raises(ValueError, match="out of range"):
            backend.linear_backward(topk, torch.ones(2, 8), torch.ones(8, 4), None, needs_bias=False, row_sparse=False)


@pytest.mark.parametrize("serve", [ops.linear_backward, kernels.linear_backward, reference.linear_backward])
def test_what_is_not_row_sparse_is_refused(serve):
    grad, x = torch.ones(2, 8), torch.ones(2, 4)
    columns = ColumnSelection(grad[:, :1], torch.zeros(1, dtype=torch.int32), 8, torch.ones(8))
    rows = RowSelection(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 8)
    for choice in (columns, rows, PlainTopK(1, "example")):
        with pytest.raises(ValueError, match="not row-sparse"):
            serve(choice, grad, None, x, needs_bias=False, row_sparse=True)


@pytest.mark.parametrize("wrong", ["grad", "weight", "x", "hits"])
@pytest.mark.parametrize("backend", [kernels, reference])
def test_shapes_that_do_not_go_together_are_refused(wrong, backend):
    tensors = {"grad": torch.ones(2, 8), "weight": torch.ones(8, 4), "x": torch.ones(2, 4)}
    tensors["hits"] = torch.zeros(8, dtype=torch.int64)
    tensors[wrong] = tensors[wrong][:1]
    rows = RowSelection(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match=r"\[2, 8\] does not go with"):
        backend.linear_backward(
            rows,
            *(tensors[name] for name in ("grad", "weight", "x")),
            needs_bias=True,
            row_sparse=False,
            hits=tensors["hits"],
        )


@pytest.mark.parametrize("starts", [[0, 2, 3], [1, 2, 4], [0, 5, 4], [-1, 2, 4], [0, 2, 5]])
def test_the_reference_refuses_starts_that_are_not_those_of_the_entries(starts):
    rows = RowSelection(torch.ones(4), torch.tensor([0, 1, 0, 1]).int(), 8, starts=torch.tensor(starts))
    with pytest.raises(IndexError, match="its starts go from 0"):
        reference.linear_backward(rows, torch.ones(2, 8), torch.ones(8, 4), None, needs_bias=False, row_sparse=False)


@pytest.mark.parametrize("indices", [[1, 0], [1, 1], [0, 8], [-1, 0]])
def test_the_reference_refuses_indices_that_do_not_ascend_within_the_features(indices):
    columns = ColumnSelection(torch.ones(2, 2), torch.tensor(indices).int(), 8)
    with pytest.raises(IndexError, match="must ascend"):
        reference.linear_backward(columns, torch.ones(2, 8), torch.ones(8, 4), None, needs_bias=False, row_sparse=False)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("inputs", [1, 33, 700])
@pytest.mark.parametrize("empty", ["some", "most", "all"])
def test_rows_without_entries_add_nothing(level, dtype, inputs, empty):
    torch.manual_seed(0)
    rows, outputs, each = 120, 50, 10
    has_entries = torch.rand(rows) < {"some": 0.6, "most": 0.1, "all": 0.0}[empty]
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = (has_entries * each).cumsum(0)
    indices = torch.rand(int(has_entries.sum()), outputs).topk(each).indices.sort(dim=1).values.flatten()
    selection = RowSelection(torch.randn(int(starts[-1])).to(dtype), indices.int(), outputs, starts=starts)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    x[~has_entries] = float("nan")
    of_input, of_weight, _ = ops.linear_backward(selection, torch.empty(0), weight, x, False, False)
    kept = selection.to_dense().double()
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(of_input.double(), kept @ weight.double(), **tolerance)
    torch.testing.assert_close(of_weight.double(), kept.t() @ x.double().nan_to_num(0.0), **tolerance)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize(
    ("rows", "used", "outputs", "inputs"), [(120, 30, 50, 1400), (200, 900, 1100, 300), (64, 200, 800, 16500)]
)
def test_outputs_without_entries_change_no_bit(level, dtype, rows, used, outputs, inputs):
    """In the last one the rows of the weight that the entries name exceed the caches, each use counted."""
    torch.manual_seed(0)
    each = 20
    columns = torch.randperm(outputs)[:used].sort().values
    is_used = torch.isin(torch.arange(outputs), columns)
    has_entries = torch.arange(rows) % 7 != 0
    places = torch.rand(int(has_entries.sum()), used).topk(each).indices.sort(dim=1).values.flatten()
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = (has_entries * each).cumsum(0)
    values = torch.randn(len(places)).to(dtype)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    weight[~is_used], x[~has_entries] = float("nan"), float("nan")
    hits = torch.zeros(outputs, dtype=torch.int64)
    of_all = RowSelection(values, columns[places].int(), outputs, starts=starts)
    of_used = RowSelection(values, places.int(), used, starts=starts)
    of_input, of_weight, _ = ops.linear_backward(of_all, torch.empty(0), weight, x, False, False, hits)
    alone_of_input, alone_of_weight, _ = ops.linear_backward(of_used, torch.empty(0), weight[columns], x, False, False)
    assert torch.equal(of_input, alone_of_input)
    assert torch.equal(of_weight[is_used], alone_of_weight)
    assert of_weight[~is_used].count_nonzero() == 0
    assert torch.equal(hits, ops.count_hits([of_all]))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_outputs_without_entries_have_their_part_of_what_is_shared(level, dtype):
    torch.manual_seed(0)
    rows, used, outputs, inputs, each = 120, 30, 50, 1400, 10
    indices = torch.rand(rows, used).topk(each).indices.sort(dim=1).values
    values, shared = torch.randn(rows, each).to(dtype), torch.randn(outputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    selection = RowSelection(values, indices.int(), outputs, shared)
    found, _, _ = ops.linear_backward(selection, torch.empty(0), weight, None, False, False)
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found.double(), selection.to_dense().double() @ weight.double(), **tolerance)

"""The native entry points on random sizes, strides, threads and indices: an error that is named, or the reference.

`MEPROP_FUZZ_EXAMPLES` is the number of examples of each test. Addresses are those of tensors that are large enough.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, bits, gradient
from meprop import ops
from meprop.ops import native
from meprop.selection import ColumnSelection, PlainTopK, RowSelection

pytestmark = pytest.mark.usefixtures("threads")  # restores them
fuzz = settings(
    max_examples=int(os.environ.get("MEPROP_FUZZ_EXAMPLES", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes, widths, teams, numbers = st.integers(0, 12), st.integers(1, 70), st.integers(1, 5), st.integers(-3, 75)
matrices = st.tuples(
    st.sampled_from(sorted(GRADIENTS)), sizes, widths, st.sampled_from(NATIVE_DTYPES), st.sampled_from(sorted(LAYOUTS))
)


def drawn(matrix):
    kind, rows, width, dtype, layout = matrix
    return LAYOUTS[layout](gradient(kind, rows, width, dtype))


def close(found, expected, dtype):
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 40, equal_nan=True)


@fuzz
@given(matrix=matrices, k=numbers, scope=st.sampled_from(["example", "batch"]), team=teams)
def test_topk(level, team, matrix, k, scope):
    torch.set_num_threads(team)
    grad = drawn(matrix)
    operation = ops.topk_rows if scope == "example" else ops.topk_columns
    if not 1 <= k <= grad.shape[1]:
        with pytest.raises(ValueError, match=f"k={k} "):
            operation(grad, k)
        return
    found, expected = operation(grad, k), operation.literally(grad, k)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(bits(found.values), bits(expected.values))


@fuzz
@given(rows=numbers, width=numbers, ld=numbers, k=numbers, team=numbers, codes=st.tuples(*[st.integers(-1, 2)] * 2))
def test_sizes_of_topk_are_checked_before_memory_is_read(level, rows, width, ld, k, team, codes):
    """The memory is as large as any of these sizes needs it to be."""
    grad = torch.randn(76 * 76)
    values, indices = torch.full((76 * 76,), 7.0), torch.full((76 * 76,), 7, dtype=torch.int32)
    valid = rows >= 0 and 1 <= k <= width and ld >= 0 and team >= 1
    valid = valid and codes[0] in (0, 1) and codes[1] in (0, 1)
    arguments = (*codes, grad.data_ptr(), ld, rows, width, k, values.data_ptr(), indices.data_ptr(), team)
    if not valid:
        with pytest.raises(ValueError, match=r"out of range|unknown"):
            native.extension().topk(*arguments)
        assert (values == 7).all()
        return
    native.extension().topk(*arguments)
    assert (indices[rows * k if codes[1] == 0 else k :] == 7).all()


@fuzz
@given(matrix=matrices, inputs=sizes, k=numbers, blocks=st.integers(-1, 4), scope=st.booleans(), team=teams)
def test_linear_backward_that_selects(level, team, matrix, inputs, k, blocks, scope):
    torch.set_num_threads(team)
    grad = drawn(matrix)
    rows, width = grad.shape
    weight, x = (gradient("normal", size, inputs, grad.dtype) for size in (width, rows))
    call = PlainTopK(k, "example" if scope else "batch", blocks), grad, weight, x, True, False
    if blocks < 1 or width % blocks or not 1 <= k <= width // blocks:
        with pytest.raises(ValueError, match="out of range"):
            ops.linear_backward(*call)
        return
    assume(bool((grad.abs() < 1e30).all()))  # so that no sum overflows, whose order would then show
    scale = grad.double().abs().max().clamp(min=1) if grad.numel() else torch.tensor(1.0)
    for found, expected in zip(ops.linear_backward(*call), ops.linear_backward.literally(*call), strict=True):
        close(found.double() / scale, expected.double() / scale, grad.dtype)


@fuzz
@given(data=st.data(), rows=sizes, width=widths, inputs=sizes, by_row=st.booleans(), team=teams)
def test_indices_of_a_selection(level, team, data, rows, width, inputs, by_row):
    torch.set_num_threads(team)
    k = data.draw(st.integers(0, min(6, width)))
    index_rows = rows if by_row else 1
    indices = data.draw(st.lists(st.integers(-1, width), min_size=index_rows * k, max_size=index_rows * k))
    indices = torch.tensor(indices, dtype=torch.int32).view(index_rows, k)
    if data.draw(st.booleans()):
        indices = indices.sort(dim=1).values
    values, weight, x = torch.randn(rows, k), torch.randn(width, inputs), torch.randn(rows, inputs)
    selection = RowSelection(values, indices, width) if by_row else ColumnSelection(values, indices[0], width)
    call = selection, torch.randn(rows, width), weight, x, False, False
    try:
        expected = ops.linear_backward.literally(*call)
    except IndexError:
        expected = None
    if expected is None:
        with pytest.raises(IndexError, match="ascend"):
            ops.linear_backward(*call)
        return
    found = ops.linear_backward(*call)
    close(found[0], expected[0], torch.float32)
    close(found[1], expected[1], torch.float32)


@fuzz
@given(data=st.data(), count=st.integers(0, 6), extra=st.integers(-2, 4), team=teams)
def test_starts_of_a_selection(level, team, data, count, extra):
    torch.set_num_threads(team)
    width = 9
    starts = torch.tensor([0, *data.draw(st.lists(st.integers(-1, count + 1), max_size=5)), count + min(extra, 0)])
    starts = starts.sort().values if data.draw(st.booleans()) else starts
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count)), dtype=torch.int32)
    selection = RowSelection(torch.randn(count), indices, width, starts=starts)
    rows = selection.rows
    call = selection, torch.randn(rows, width), torch.randn(width, 5), torch.randn(rows, 5), False, False
    results = []
    for run in (ops.linear_backward.literally, ops.linear_backward):
        try:
            results.append(run(*call))
        except IndexError:
            results.append(None)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None and results[1] is not None:
        close(results[1][0], results[0][0], torch.float32)
        close(results[1][1], results[0][1], torch.float32)


@fuzz
@given(indices=st.lists(st.integers(-2, 12), max_size=8), every_row=st.booleans(), team=teams)
def test_rows_of_an_optimizers_step(level, team, indices, every_row):
    torch.set_num_threads(team)
    at = torch.tensor(indices, dtype=torch.int64)
    rows = ops.GradientRows(at, torch.randn(len(at), 5), every_row)
    weight, buffer = torch.randn(10, 5), torch.randn(10, 5)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False}
    before = weight.clone(), buffer.clone()
    if not ops.ascending.literally(at, 10):
        with pytest.raises(IndexError, match="ascend"):
            ops.sgd_rows(weight, buffer, rows, **options)
        assert torch.equal(weight, before[0])
        return
    ops.sgd_rows(weight, buffer, rows, **options)
    ops.sgd_rows.literally(*before, rows, **options)
    close(weight, before[0], torch.float32)
    close(buffer, before[1], torch.float32)

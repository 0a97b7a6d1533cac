"""Every native kernel, at every instruction-set level, against the oracle."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, SELECTIONS, bits, gradient
from meprop import ops
from meprop.ops import native, reference
from meprop.ops.topk import memory_format
from meprop.selection import ColumnSelection, PlainTopK, RowSelection, Selection

kernels = ops.backend("native")

# Hypothesis runs many examples within one fixture's lifetime, which suits a level.
shared_fixture = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same_selection(grad: torch.Tensor, k: int) -> None:
    values, indices = kernels.topk_rows(grad, k)
    expected_values, expected_indices = reference.topk_rows(grad, k)
    assert values.shape == indices.shape == (grad.shape[0], k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(bits(values), bits(expected_values))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_topk_rows(level, poisoned, rows, width, k, kind, dtype):
    assert_same_selection(gradient(kind, rows, width, dtype), k)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_topk_rows_of_any_memory_layout(level, poisoned, layout, dtype):
    assert_same_selection(LAYOUTS[layout](gradient("ties", 9, 61, dtype)), 7)


def test_topk_rows_of_an_expanded_gradient(level):
    assert_same_selection(torch.ones(()).expand(5, 40), 3)
    assert_same_selection(torch.randn(1, 40).expand(5, 40), 3)


@shared_fixture
@given(data=st.data())
def test_topk_rows_of_any_shape(level, data):
    width = data.draw(st.integers(1, 300), "width")
    rows = data.draw(st.integers(0, 12), "rows")
    k = data.draw(st.integers(1, width), "k")
    kind = data.draw(st.sampled_from(sorted(GRADIENTS)), "kind")
    dtype = data.draw(st.sampled_from(NATIVE_DTYPES), "dtype")
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")
    assert_same_selection(LAYOUTS[layout](gradient(kind, rows, width, dtype, seed=width)), k)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_do_not_change_the_selection(level, threads, count):
    grad = gradient("rows of all scales", 300, 513, torch.float32)
    torch.set_num_threads(count)
    assert_same_selection(grad, 20)


def test_neither_the_row_before_nor_the_padding_leaks_into_a_row(level):
    """A row's selection depends on that row alone, though the guess comes from the row before."""
    grad = torch.cat([gradient(kind, 6, 200, torch.float32) for kind in sorted(GRADIENTS)])
    _, together = kernels.topk_rows(grad, 11)
    alone = torch.cat([kernels.topk_rows(row[None], 11)[1] for row in grad])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_column_scores_are_what_topk_columns_chooses_by(level, poisoned, threads, rows, width, k, dtype):
    for number, kind in enumerate(GRADIENTS):
        torch.set_num_threads(1 + 2 * (number % 2))
        grad = gradient(kind, rows, width, dtype)
        scores = kernels.column_scores(grad)
        torch.testing.assert_close(scores, reference.column_scores(grad), rtol=1e-14, atol=0, equal_nan=True)
        assert torch.equal(reference.topk_columns(scores[None], k)[1], reference.topk_columns(grad, k)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_column_scores_of_any_memory_layout(level, poisoned, layout):
    grad = LAYOUTS[layout](gradient("ties", 9, 61, torch.float32))
    assert torch.equal(kernels.column_scores(grad), reference.column_scores(grad))


CHANNEL_LAYOUTS = {
    "contiguous": lambda grad: grad.contiguous(),
    "channels last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "neither": lambda grad: grad.transpose(1, 3).contiguous().transpose(1, 3),
    "negative": lambda grad: torch._neg_view(-grad),
}


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(
    ("examples", "width", "sizes", "k"), [(3, 37, (5, 7), 6), (0, 9, (1, 2), 9), (1, 2, (1, 1), 1)]
)
def test_topk_channels(level, poisoned, examples, width, sizes, k, kind, layout, dtype):
    matrix = gradient(kind, examples * sizes[0] * sizes[1], width, dtype)
    grad = CHANNEL_LAYOUTS[layout](matrix.view(examples, *sizes, width).movedim(-1, 1))
    values, indices = kernels.topk_channels(grad, k)
    expected_values, expected_indices = reference.topk_channels(grad, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(bits(values), bits(expected_values))
    assert memory_format(values) == memory_format(expected_values)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_threads_do_not_change_the_channels(level, threads, dtype):
    grad = gradient("rows of all scales", 4 * 600, 90, dtype).view(4, 600, 90).movedim(-1, 1)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(kernels.topk_channels(grad, 20)[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---------------------------------------------------------------- products

# (rows N, inputs I, output features O, kept k): empty, single, odd, narrower and wider than a panel, everything kept
PRODUCTS = [
    (0, 5, 7, 3),
    (1, 1, 2, 1),
    (3, 0, 5, 2),
    (5, 3, 33, 32),
    (4, 64, 17, 2),
    (7, 65, 63, 8),
    (13, 130, 40, 40),
    (10, 784, 500, 20),
    (64, 300, 129, 5),
]


def product_bound(selected: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a product summed in float32 and rounded to dtype may lie from the exact one, element by element.

    A sum of m terms in any order errs by at most m float32 roundings of the sum of their magnitudes; then one of dtype.
    """
    magnitudes = selected.double().abs() @ other.double().abs()
    terms = (selected != 0).sum(dim=1, keepdim=True) + 1
    return terms * torch.finfo(torch.float32).eps * magnitudes + torch.finfo(dtype).eps * magnitudes


def assert_close_to_exact(result: torch.Tensor, selected: torch.Tensor, other: torch.Tensor) -> None:
    error = (result.double() - selected.double() @ other.double()).abs()
    assert (error <= product_bound(selected, other, result.dtype)).all()


def problem(rows, inputs, width, dtype, kind="normal"):
    return (
        gradient(kind, rows, width, dtype),
        gradient("normal", width, inputs, dtype, seed=1),
        gradient("normal", rows, inputs, dtype, seed=2),
    )


def selection_of(grad: torch.Tensor, k: int, scope: str) -> Selection:
    if scope == "example":
        return RowSelection(*reference.topk_rows(grad, k), grad.shape[1])
    return ColumnSelection(*reference.topk_columns(grad, k), grad.shape[1])


def topk_backward(grad, k, scope, weight, x, needs_bias=False, row_sparse=False):
    """The gradients of input, weight and bias, by one native call that makes the selection as well."""
    topk = PlainTopK(k, scope)
    return kernels.linear_backward(topk, grad, weight, x, needs_bias=needs_bias, row_sparse=row_sparse)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize(("rows", "inputs", "width", "k"), PRODUCTS)
def test_the_whole_backward_pass(level, poisoned, rows, inputs, width, k, scope, dtype):
    grad, weight, x = problem(rows, inputs, width, dtype)
    selection = selection_of(grad, k, scope)
    selected_NO = selection.to_dense()

    grad_input, grad_weight, grad_bias = topk_backward(grad, k, scope, weight, x, needs_bias=True)
    assert grad_input.dtype == grad_weight.dtype == grad_bias.dtype == dtype
    assert_close_to_exact(grad_input, selected_NO, weight)
    assert_close_to_exact(grad_weight, selected_NO.t(), x)
    torch.testing.assert_close(grad_bias, grad.double().sum(0).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-30)

    # each part alone, and with the selection given, is the same to the bit
    part = topk_backward(grad, k, scope, weight, None)
    assert torch.equal(bits(part[0]), bits(grad_input))
    assert part[1:] == (None, None)
    part = topk_backward(grad, k, scope, None, x)
    assert torch.equal(bits(part[1]), bits(grad_weight))
    assert part[0] is None
    assert torch.equal(bits(kernels.grad_input(selection, weight)), bits(grad_input))
    assert torch.equal(bits(kernels.grad_weight(selection, x)), bits(grad_weight))
    if scope == "batch":
        _, rows_only, _ = topk_backward(grad, k, scope, None, x, row_sparse=True)
        assert torch.equal(rows_only.indices()[0], selection.indices.long())
        assert torch.equal(bits(rows_only.values()), bits(grad_weight[selection.indices.long()]))
        assert torch.equal(bits(kernels.grad_weight_rows(selection.values, x)), bits(rows_only.values()))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["some nan", "some inf", "zeros", "mostly zero"])
@pytest.mark.parametrize("scope", ["example", "batch"])
def test_products_of_special_values(level, poisoned, scope, kind, dtype):
    grad, weight, x = problem(9, 20, 50, dtype, kind)
    expected = selection_of(grad, 6, scope)
    grad_input, grad_weight, grad_bias = topk_backward(grad, 6, scope, weight, x, needs_bias=True)
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps, "equal_nan": True}
    torch.testing.assert_close(grad_input, reference.grad_input(expected, weight), **close)
    torch.testing.assert_close(grad_weight, reference.grad_weight(expected, x), **close)
    torch.testing.assert_close(grad_bias, grad.double().sum(0).to(dtype), **close)


def test_what_is_not_selected_is_not_read(level):
    """Rows of the weight that no example selected may hold anything."""
    grad = torch.zeros(4, 30)
    grad[:, 3:6] = torch.randn(4, 3)
    weight = torch.full((30, 70), float("nan"))
    weight[3:6] = torch.randn(3, 70)
    for scope in ("example", "batch"):
        grad_input, *_ = topk_backward(grad, 3, scope, weight, None)
        assert grad_input.isfinite().all()


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_expanded_matrices(level, scope):
    """Each row the same memory: a leading dimension of 0."""
    grad, weight, x = (matrix[:1].expand(matrix.shape) for matrix in problem(6, 70, 30, torch.float32))
    selection = selection_of(grad, 4, scope)
    grad_input, grad_weight, _ = topk_backward(grad, 4, scope, weight, x)
    torch.testing.assert_close(grad_input, reference.grad_input(selection, weight))
    torch.testing.assert_close(grad_weight, reference.grad_weight(selection, x))


def test_negated_views():
    grad, weight, x = problem(6, 70, 30, torch.float32)
    expected = topk_backward(-grad, 4, "example", -weight, -x, needs_bias=True)
    negative = [torch._neg_view(tensor) for tensor in (grad, weight, x)]
    got = topk_backward(negative[0], 4, "example", *negative[1:], needs_bias=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@shared_fixture
@given(data=st.data())
def test_products_of_any_shape_and_layout(level, data):
    rows, inputs = data.draw(st.integers(0, 20), "rows"), data.draw(st.integers(1, 200), "inputs")
    width = data.draw(st.integers(1, 90), "width")
    k = data.draw(st.integers(1, width), "k")
    dtype = data.draw(st.sampled_from(NATIVE_DTYPES), "dtype")
    scope = data.draw(st.sampled_from(["example", "batch"]), "scope")
    grad, weight, x = (
        LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](matrix) for matrix in problem(rows, inputs, width, dtype)
    )
    selection = selection_of(grad, k, scope)
    grad_input, grad_weight, _ = topk_backward(grad, k, scope, weight, x)
    assert_close_to_exact(grad_input, selection.to_dense(), weight)
    assert_close_to_exact(grad_weight, selection.to_dense().t(), x)


# Large enough that four threads get work, with panels that do not divide evenly among them.
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["example", "batch"])
def test_threads_do_not_change_a_bit(level, threads, scope, dtype):
    grad, weight, x = problem(150, 333, 257, dtype, "rows of all scales")
    results = []
    for count in (1, 2, 4, 2):
        torch.set_num_threads(count)
        results.append(topk_backward(grad, 20, scope, weight, x, needs_bias=True))
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_python_threads_at_once():
    problems = [problem(60, 100 + 30 * i, 200, torch.float32) for i in range(6)]

    def run(grad, weight, x):
        return [topk_backward(grad, 9, "example", weight, x, needs_bias=True) for _ in range(20)][-1]

    alone = [run(*each) for each in problems]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda each: run(*each), problems))
    for expected, got in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_forked_process_neither_hangs_nor_errs():
    """A fork has none of the OpenMP threads that its parent has started; a DataLoader's worker is one."""
    grad, weight, x = problem(150, 333, 257, torch.float32)
    expected = topk_backward(grad, 20, "example", weight, x, needs_bias=True)
    child = os.fork()
    if child == 0:
        got = topk_backward(grad, 20, "example", weight, x, needs_bias=True)
        torch.set_num_threads(1)  # torch's own operations do hang
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)) else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    assert os.waitstatus_to_exitcode(done[1]) == 0


@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}], ids=str)
def test_fewer_threads_than_asked_for(limit):
    code = (
        "import torch\nfrom meprop import ops\nfrom meprop.selection import PlainTopK\ntorch.manual_seed(0)\n"
        "grad, weight, x = torch.randn(150, 257), torch.randn(257, 333), torch.randn(150, 333)\n"
        "results = []\n"
        "for threads in (1, 4):\n"
        "    torch.set_num_threads(threads)\n"
        "    for scope in ('example', 'batch'):\n"
        "        topk = PlainTopK(20, scope)\n"
        "        results += ops.linear_backward(topk, grad, weight, x, needs_bias=True, row_sparse=False)\n"
        "assert all(torch.equal(a, b) for a, b in zip(results[:6], results[6:]))"
    )
    done = run_python(code, **limit)
    assert done.returncode == 0, done.stderr


def test_one_openmp_runtime_in_the_process():
    """A process of its own: scikit-learn, which other tests import, brings another runtime."""
    assert native.reason_missing() is None
    maps = run_python("import meprop.ops.native; print(open('/proc/self/maps').read())").stdout
    runtimes = {Path(line.split()[-1]).resolve() for line in maps.splitlines() if re.search(r"lib[gi]?omp[^/]*$", line)}
    assert len(runtimes) == 1, runtimes


# ---------------------------------------------------------------- refusals

TOPK = dict.fromkeys(["dtype", "scope", "grad"], 0) | {"grad_ld": 8, "rows": 1, "outputs": 8, "k": 2}
TOPK |= {"values": 0, "indices": 0, "threads": 1}
BACKWARD = dict.fromkeys(["dtype", "scope"], 0) | {"k": 2, "blocks": 1, "select": 1}
BACKWARD |= dict.fromkeys(["values", "indices", "starts", "entries", "shared"], 0)
BACKWARD |= {"rows": 1, "outputs": 8, "grad": 0, "grad_ld": 8, "inputs": 4, "weight": 0, "weight_ld": 4}
BACKWARD |= {"x": 0, "x_ld": 4} | dict.fromkeys(["grad_input", "grad_weight", "grad_bias"], 0)
BACKWARD |= {"weight_rows_only": 0, "hits": 0, "threads": 1}


SCORES = dict.fromkeys(["dtype", "scope", "grad"], 0) | {"grad_ld": 8, "rows": 1, "outputs": 8, "scores": 0}
SCORES |= {"threads": 1}


@pytest.mark.parametrize(
    "wrong", [{"rows": -1}, {"outputs": 0}, {"grad_ld": -8}, {"threads": 0}, {"dtype": 7}], ids=str
)
def test_impossible_scores_raise_before_memory_is_touched(wrong):
    with pytest.raises(ValueError, match=r"out of range|unknown dtype or scope"):
        native._extension.column_scores(*(SCORES | wrong).values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": -1},
        {"outputs": 0},
        {"outputs": -8},
        {"outputs": 2**31},  # indices would not fit
        {"k": 0},
        {"k": -2},
        {"k": 9},
        {"grad_ld": -8},
        {"threads": 0},
        {"threads": -1},
        {"threads": 2**40},
        {"dtype": 7},
        {"scope": 2},
        {"rows": 2**31},  # so would these
        {"rows": 2**30, "grad_ld": 2**40},  # the last offset overflows
    ],
    ids=str,
)
@pytest.mark.parametrize("function", ["topk", "linear_backward"])
def test_impossible_sizes_raise_before_memory_is_touched(function, wrong):
    arguments = (TOPK if function == "topk" else BACKWARD) | wrong
    with pytest.raises(ValueError, match=r"out of range|unknown dtype or scope"):
        getattr(native._extension, function)(*arguments.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": -1},
        {"weight_ld": -1},
        {"x_ld": -4},
        {"inputs": 2**62},
        {"weight_ld": 2**61},
        {"rows": 2**30, "x_ld": 2**40},
        {"blocks": 0},
        {"blocks": -2},
        {"blocks": 3},  # no equal blocks
        {"blocks": 8},  # of which none has two features
        {"k": 9, "select": 0},
        {"k": -1, "select": 0},
        {"blocks": 2, "select": 0},
        {"starts": 8, "entries": -1, "select": 0},
        {"starts": 8, "entries": 2**62, "select": 0},
        {"starts": 8},  # of a selection that is yet to be made
        {"shared": 8},
        {"weight_rows_only": 1},  # of entries by row
        {"scope": 1, "weight_rows_only": 1, "shared": 8, "select": 0},
    ],
    ids=str,
)
def test_impossible_matrices_raise_before_memory_is_touched(wrong):
    with pytest.raises(ValueError, match="out of range"):
        native._extension.linear_backward(*(BACKWARD | wrong).values())


def test_integers_beyond_64_bits_and_missing_arguments_raise():
    with pytest.raises(OverflowError):
        native._extension.topk(*(TOPK | {"grad": 2**70}).values())
    with pytest.raises(TypeError, match="expected 10 integers"):
        native._extension.topk(0)
    with pytest.raises(TypeError):
        native._extension.topk(*(TOPK | {"k": "2"}).values())


def test_scratch_beyond_memory_raises():
    """2^31 rows' worth of selection: more than any address space serves, and asked for before anything is read."""
    huge = {"rows": 2**31 - 1, "outputs": 2**31 - 65, "k": 2**31 - 65, "grad_ld": 0, "select": 1}
    with pytest.raises((MemoryError, ValueError)):
        native._extension.linear_backward(*(BACKWARD | huge).values())


@pytest.mark.parametrize("indices", [[[0, 8]], [[-1, 3]], [[3, 3]], [[4, 3]], [[2**31 - 1, 0]]], ids=str)
def test_a_selection_with_bad_indices_raises(indices):
    values, indices = torch.randn(1, 2), torch.tensor(indices, dtype=torch.int32)
    for selected in (indices, indices[0]):
        selection = RowSelection(values, selected, 8) if selected.dim() == 2 else ColumnSelection(values, selected, 8)
        with pytest.raises(IndexError, match="ascend"):
            kernels.grad_weight(selection, torch.randn(1, 4))
        with pytest.raises(IndexError, match="ascend"):
            kernels.grad_input(selection, torch.randn(8, 4))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_meprop_isa_forces_a_level_and_refuses_an_unknown_one():
    show = "import meprop; print(meprop.backend_info()['isa'], meprop.backend_info()['forced'])"
    assert run_python(show, MEPROP_ISA="scalar").stdout.split() == ["scalar", "scalar"]
    refused = run_python(show, MEPROP_ISA="sse9")
    assert refused.returncode != 0
    assert "MEPROP_ISA='sse9'" in refused.stderr
    assert "scalar" in refused.stderr

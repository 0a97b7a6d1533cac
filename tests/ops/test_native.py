"""Every native kernel, at every instruction-set level, against the oracle."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, SELECTIONS, bits, gradient
from meprop.ops import native, reference

# Hypothesis runs many examples within one fixture's lifetime, which suits a level.
shared_fixture = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same_selection(grad: torch.Tensor, k: int) -> None:
    values, indices = native.topk_rows(grad, k)
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
    _, together = native.topk_rows(grad, 11)
    alone = torch.cat([native.topk_rows(row[None], 11)[1] for row in grad])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 0, 8, -1, 8, 2, 0, 0, 1),  # rows
        (0, 0, 8, 1, 0, 1, 0, 0, 1),  # width
        (0, 0, 8, 1, 8, 0, 0, 0, 1),  # k
        (0, 0, 8, 1, 8, 9, 0, 0, 1),  # k above width
        (0, 0, -8, 1, 8, 2, 0, 0, 1),  # leading dimension
        (0, 0, 8, 1, 8, 2, 0, 0, 0),  # threads
        (7, 0, 8, 1, 8, 2, 0, 0, 1),  # dtype
        (0, 0, 2**62, 2**62, 8, 2, 0, 0, 1),  # the last offset overflows
        (0, 0, 8, 1, 2**31, 2, 0, 0, 1),  # indices would not fit
    ],
)
def test_impossible_sizes_raise_before_memory_is_touched(arguments):
    assert native._extension is not None
    with pytest.raises(ValueError, match=r"out of range|unknown dtype"):
        native._extension.topk_rows(*arguments)


def test_integers_beyond_64_bits_and_missing_arguments_raise():
    assert native._extension is not None
    with pytest.raises(OverflowError):
        native._extension.topk_rows(0, 2**70, 8, 1, 8, 2, 0, 0, 1)
    with pytest.raises(TypeError, match="expected 9 integers"):
        native._extension.topk_rows(0)


def test_unserved_tensors_are_declined_with_the_reason():
    assert "float16" in str(native.declines(torch.zeros(1, dtype=torch.float16)))
    assert "meta" in str(native.declines(torch.zeros(1, device="meta")))
    assert native.declines(torch.zeros(1)) is None


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

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

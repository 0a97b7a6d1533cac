"""TopK: how k is read, what it refuses, what it answers."""

import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import meprop
from cases import ALL_DTYPES, GRADIENTS, SELECTIONS, gradient
from meprop import rules
from meprop.ops import reference


@pytest.mark.parametrize("k", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False])
def test_an_impossible_k_is_refused_with_what_was_got_and_what_is_allowed(k):
    with pytest.raises(ValueError, match=rf"k={k!r}.*at least 1.*at most 1") as error:
        meprop.TopK(k)
    assert repr(k) in str(error.value)


@pytest.mark.parametrize("k", ["20", None, 1j, [20]])
def test_a_k_that_is_no_number_is_refused(k):
    with pytest.raises(TypeError, match="k is"):
        meprop.TopK(k)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match=r"scope='row'.*'example' or 'batch'"):
        meprop.TopK(3, scope="row")


@given(share=st.floats(0, 1, exclude_min=True), features=st.integers(1, 10_000))
def test_a_float_is_a_share_of_the_features(share, features):
    assert meprop.TopK(share).count(features) == max(1, round(share * features))


@given(count=st.integers(1, 10_000), features=st.integers(1, 10_000))
def test_an_int_is_a_count(count, features):
    assert meprop.TopK(count).count(features) == min(count, features)


def test_other_numbers_are_read_as_python_reads_them():
    assert meprop.TopK(torch.tensor(3).item()) == meprop.TopK(3)
    assert meprop.TopK(Fraction(1, 4)) == meprop.TopK(0.25)
    assert meprop.TopK(1).count(10) == 1
    assert meprop.TopK(1.0).count(10) == 10


def test_equal_rules_are_equal_and_can_be_keys():
    assert len({meprop.TopK(3), meprop.TopK(3), meprop.TopK(3, scope="batch")}) == 2


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_select_answers_as_the_oracle(rows, width, k, kind, dtype):
    grad = gradient(kind, rows, width, dtype)
    for scope, oracle in [("example", reference.topk_rows), ("batch", reference.topk_columns)]:
        selection = meprop.TopK(k, scope=scope).select(grad)
        _, indices = oracle(grad, k)
        assert torch.equal(selection.indices, indices)
        assert selection.density == k / width
        kept = torch.zeros(rows, width, dtype=torch.bool).scatter_(1, indices.long().expand(rows, k), value=True)
        expected = torch.where(kept, grad, torch.zeros_like(grad))
        torch.testing.assert_close(selection.to_dense(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (3, 0)])
def test_select_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match=r"\[N, O\]"):
        meprop.TopK(1).select(torch.zeros(shape))


def test_select_refuses_integers():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        meprop.TopK(1).select(torch.zeros(2, 3, dtype=torch.int64))


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(rules).failed == 0
    assert doctest.testmod(rules).attempted >= 3

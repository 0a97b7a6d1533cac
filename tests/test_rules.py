"""TopK and RandomK: how k is read, what they refuse, what they answer."""

import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode

import meprop
from cases import ALL_DTYPES, GRADIENTS, SELECTIONS, gradient
from meprop import rules
from meprop.ops import reference

RULES = pytest.mark.parametrize("rule", [meprop.TopK, meprop.CompensatedTopK, meprop.RandomK])


@RULES
@pytest.mark.parametrize("k", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False])
def test_an_impossible_k_is_refused_with_what_was_got_and_what_is_allowed(rule, k):
    with pytest.raises(ValueError, match=rf"k={k!r}.*at least 1.*at most 1") as error:
        rule(k)
    assert repr(k) in str(error.value)


@RULES
@pytest.mark.parametrize("k", ["20", None, 1j, [20]])
def test_a_k_that_is_no_number_is_refused(rule, k):
    with pytest.raises(TypeError, match="k is"):
        rule(k)


@RULES
def test_an_unknown_scope_is_refused(rule):
    with pytest.raises(ValueError, match=r"scope='row'.*'example', 'batch' or 'global'"):
        rule(3, scope="row")


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
    assert len({meprop.TopK(3), meprop.TopK(3), meprop.TopK(3, scope="batch"), meprop.RandomK(3)}) == 3
    # How measurements of a rule are remembered.
    assert repr(meprop.RandomK(3)) == "RandomK(k=3, scope='example')"


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


@RULES
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (3, 0)])
def test_select_refuses_what_is_no_matrix(rule, shape):
    with pytest.raises(ValueError, match=r"\[N, O\]"):
        rule(1).select(torch.zeros(shape))


@RULES
def test_select_refuses_integers(rule):
    with pytest.raises(TypeError, match=r"torch\.int64"):
        rule(1).select(torch.zeros(2, 3, dtype=torch.int64))


class Own(torch.Tensor):
    """A tensor of somebody's own, of which nobody may read the memory without asking."""


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_select_asks_torch_of_tensors_that_are_not_plain(scope):
    grad, rule = torch.randn(4, 30), meprop.TopK(3, scope=scope)
    found, expected = rule.select(grad.as_subclass(Own)), rule.select(grad)
    assert type(found.values) is Own
    assert torch.equal(found.indices.as_subclass(torch.Tensor), expected.indices)
    assert torch.equal(found.values.as_subclass(torch.Tensor), expected.values)
    with FakeTensorMode() as mode:  # without any memory
        fake = rule.select(mode.from_tensor(grad))
    assert isinstance(fake.values, FakeTensor)
    assert (fake.values.shape, fake.indices.shape) == (expected.values.shape, expected.indices.shape)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "k"), SELECTIONS)
def test_random_k_keeps_k_different_entries_as_they_are(rows, width, k, dtype):
    grad = gradient("some nan", rows, width, dtype)
    for scope, form in [("example", (rows, k)), ("batch", (k,))]:
        selection = meprop.RandomK(k, scope=scope).select(grad)
        assert selection.indices.shape == form
        assert selection.indices.dtype == torch.int32
        assert (selection.indices.diff() > 0).all()  # ascending, so no entry is kept twice
        assert ((selection.indices >= 0) & (selection.indices < width)).all()
        expected = grad.gather(1, selection.indices.long().expand(rows, k))
        torch.testing.assert_close(selection.values, expected, rtol=0, atol=0, equal_nan=True)


def test_random_k_draws_every_set_equally_often_whatever_the_values():
    torch.manual_seed(0)
    draws = 30_000
    grad = torch.tensor([[1e6, 0.0, -1e6, 1.0, math.nan, 0.0]]).expand(draws, 6)
    counts = torch.zeros(6, 6)
    first, second = meprop.RandomK(2).select(grad).indices.long().T
    counts.index_put_((first, second), torch.ones(draws), accumulate=True)
    expected = draws / 15  # sets of 2 among 6
    observed = counts[torch.triu_indices(6, 6, offset=1).unbind()]
    assert observed.sum() == draws
    # Chi-squared with 14 degrees of freedom: above 36.1 once in a thousand seeds, and this seed is fixed.
    assert ((observed - expected) ** 2 / expected).sum() < 36.1


def test_random_k_draws_anew_for_each_row_and_call_and_repeats_with_the_seed():
    grad = torch.ones(64, 100)
    for scope in ("example", "batch"):
        rule = meprop.RandomK(5, scope=scope)
        torch.manual_seed(3)
        first, second = rule.select(grad).indices, rule.select(grad).indices
        torch.manual_seed(3)
        assert torch.equal(rule.select(grad).indices, first)
        assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert len(meprop.RandomK(5).select(grad).indices.unique(dim=0)) > 60


def test_random_k_of_everything_is_the_dense_layer_and_draws_nothing():
    x, grad = torch.randn(4, 8), torch.randn(4, 6)
    layers = [meprop.nn.Linear(8, 6, rule=meprop.RandomK(6)), torch.nn.Linear(8, 6)]
    layers[1].load_state_dict(layers[0].state_dict())
    state = torch.get_rng_state()
    gradients = [torch.autograd.grad(layer(x), layer.weight, grad)[0] for layer in layers]
    assert torch.equal(*gradients)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_propagates_what_random_k_keeps_and_nothing_else():
    x, grad = torch.randn(4, 8, requires_grad=True), torch.randn(4, 6)
    layer = meprop.nn.Linear(8, 6, rule=meprop.RandomK(2))
    torch.manual_seed(5)
    kept = layer.rule.select(grad).to_dense()
    torch.manual_seed(5)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    torch.testing.assert_close(grad_x, kept @ layer.weight)
    torch.testing.assert_close(grad_weight, kept.T @ x)
    torch.testing.assert_close(grad_bias, grad.sum(0))


def test_the_examples_in_the_docstrings_run():
    for module in (rules.topk, rules.compensated, rules.random, rules.blocks):
        results = doctest.testmod(module, extraglobs={name: getattr(meprop, name) for name in ("TopK", "InBlocks")})
        assert results.failed == 0
        assert results.attempted >= 2


# ---------------------------------------------------------------- CompensatedTopK


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compensated_top_k_is_top_k_and_the_mean_of_what_it_leaves_out(dtype):
    grad = torch.randn(30, 17, dtype=dtype)
    top = meprop.TopK(4).select(grad)
    selection = meprop.CompensatedTopK(4).select(grad)
    assert torch.equal(selection.values, top.values)
    assert torch.equal(selection.indices, top.indices)
    dense = selection.to_dense()
    torch.testing.assert_close(dense, top.to_dense() + (grad - top.to_dense()).mean(dim=0))
    torch.testing.assert_close(dense.sum(dim=0), grad.sum(dim=0))  # what it is for


def test_compensated_top_k_of_no_rows():
    selection = meprop.CompensatedTopK(2).select(torch.empty(0, 5))
    assert selection.to_dense().shape == (0, 5)
    assert selection.shared.tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_top_k_sums_half_precision_in_single(dtype):
    """In half precision a sum of so many ones would stop at 256, or at 2048."""
    grad = torch.ones(4096, 3, dtype=dtype)
    assert meprop.CompensatedTopK(1).select(grad).shared.tolist() == [0.0, 1.0, 1.0]


def test_compensated_top_k_is_not_for_columns():
    with pytest.raises(ValueError, match="exact_sum=True with scope='batch'"):
        meprop.CompensatedTopK(2, scope="batch")
    with pytest.raises(ValueError, match="sparse_grad=True"):
        meprop.nn.Linear(5, 5, rule=meprop.CompensatedTopK(2), sparse_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (6,), (2, 5)])
def test_gradients_of_compensated_top_k_are_those_of_the_dense_form(batch, dtype):
    x, weight = torch.randn(*batch, 9), torch.randn(20, 9)
    bias, grad = torch.randn(20), torch.randn(*batch, 20)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    rule = meprop.CompensatedTopK(3)
    meprop.functional.linear(*leaves, rule=rule).backward(grad.to(dtype))
    whole = grad.to(dtype).reshape(-1, 20)
    kept, rows = rule.select(whole).to_dense().double(), leaves[0].detach().reshape(-1, 9).double()
    expected = [(kept @ leaves[1].detach().double()).view(x.shape), kept.t() @ rows, whole.double().sum(dim=0)]
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for leaf, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact, **tolerance)


def test_compensated_top_k_in_an_lstm_and_under_compile():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    layer = meprop.nn.LSTM(5, 6, rule=meprop.CompensatedTopK(2), dtype=torch.float64)
    layer(x)[0].sum().backward()
    assert (layer.weight_hh_l0.grad != 0).all()  # what is shared reaches every row

    linear = meprop.nn.Linear(5, 6, rule=meprop.CompensatedTopK(2))
    y = x[0].float()
    linear(y).pow(2).sum().backward()
    eager, linear.weight.grad = linear.weight.grad, None
    torch.compile(linear, backend="aot_eager", fullgraph=True)(y).pow(2).sum().backward()
    torch.testing.assert_close(linear.weight.grad, eager)


# ---------------------------------------------------------------- within blocks


@pytest.mark.parametrize(
    "rule",
    [meprop.TopK(2), meprop.TopK(2, scope="batch"), meprop.CompensatedTopK(2)],
    ids=["example", "batch", "compensated"],
)
def test_in_blocks_is_the_rule_of_each_block_side_by_side(rule):
    grad = gradient("ties", 5, 21, torch.float64)
    selection = meprop.InBlocks(rule, 3).select(grad)
    expected = torch.cat([rule.select(block).to_dense() for block in grad.chunk(3, dim=1)], dim=1)
    assert torch.equal(selection.to_dense(), expected)
    assert selection.indices.shape[-1] == meprop.InBlocks(rule, 3).count(21) == 6
    assert (selection.indices.diff() > 0).all()


def test_in_blocks_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="22 output features are not 3 equal blocks"):
        meprop.InBlocks(meprop.TopK(2), 3).select(torch.zeros(5, 22))
    for blocks, error in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match=f"blocks={blocks}"):
            meprop.InBlocks(meprop.TopK(2), blocks)
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        meprop.InBlocks(0.05, 3)
    with pytest.raises(ValueError, match="scope='batch'"):
        meprop.nn.Linear(7, 21, rule=meprop.InBlocks(meprop.TopK(2), 3), sparse_grad=True)


@pytest.mark.parametrize("inner", [meprop.TopK(1), meprop.TopK(1, scope="batch"), meprop.CompensatedTopK(1)], ids=str)
def test_blocks_in_blocks_are_smaller_blocks(inner):
    """Also where a rule that is a plain top-k is not asked for its selection."""
    nested, flat = meprop.InBlocks(meprop.InBlocks(inner, 2), 3), meprop.InBlocks(inner, 6)
    assert nested.as_topk(24) == flat.as_topk(24)
    grad, x = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(nested.select(grad).to_dense(), flat.select(grad).to_dense())
    layer = meprop.nn.Linear(7, 24, rule=nested, dtype=torch.float64)
    (weight_gradient,) = torch.autograd.grad(layer(x), layer.weight, grad)
    torch.testing.assert_close(weight_gradient, flat.select(grad).to_dense().t() @ x)


# ---------------------------------------------------------------- what every rule says of itself


class EveryOther(meprop.Rule):
    """One that answers `select` and nothing else."""

    def select(self, grad_output_NO: torch.Tensor) -> meprop.ColumnSelection:
        indices = torch.arange(0, grad_output_NO.shape[1], 2, dtype=torch.int32)
        return meprop.ColumnSelection(grad_output_NO[:, ::2], indices, grad_output_NO.shape[1])


def test_a_rule_that_only_selects_says_nothing_else():
    rule = EveryOther()
    assert (rule.scope, rule.count(7), rule.density(7), rule.as_topk(7)) == (None, None, None, None)
    assert not rule.keeps_all(7)
    assert not rule.communicates
    blocks = meprop.InBlocks(rule, 2)
    assert (blocks.scope, blocks.count(8), blocks.density(8), blocks.as_topk(8)) == (None, None, None, None)
    assert not blocks.communicates


def test_density_is_the_share_that_is_kept():
    assert meprop.TopK(3).density(12) == 0.25
    assert meprop.TopK(40).density(12) == 1.0
    assert meprop.InBlocks(meprop.TopK(1), 3).density(12) == 0.25
    kept = {features: meprop.TopK(6).keeps_all(features) for features in (5, 6, 7)}
    assert kept == {5: True, 6: True, 7: False}
    assert [meprop.InBlocks(meprop.TopK(6), 2).keeps_all(features) for features in (12, 14)] == [True, False]


def test_in_blocks_communicates_where_its_rule_does():
    class Talking(EveryOther):
        @property
        def communicates(self) -> bool:
            return True

    assert meprop.InBlocks(Talking(), 2).communicates
    assert not meprop.InBlocks(meprop.TopK(1), 2).communicates


def test_rules_are_known_by_name():
    found = rules.named()
    assert {
        "topk": meprop.TopK,
        "compensated": meprop.CompensatedTopK,
        "random": meprop.RandomK,
    }.items() <= found.items()
    for name, rule in found.items():
        assert rule.name == name
        assert rule.label
        assert rule(0.5, scope="example").count(10) == 5
    found.clear()
    assert rules.named()  # it is a copy


def test_two_rules_cannot_have_one_name():
    with pytest.raises(ValueError, match=r"rule name 'topk' of .*Impostor is already that of TopK"):

        class Impostor(EveryOther):
            name = "topk"

    assert rules.named()["topk"] is meprop.TopK

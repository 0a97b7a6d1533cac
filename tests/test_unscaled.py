"""UnscaledK draws what Sampled does, and leaves it as it is."""

from __future__ import annotations

import pytest
import torch

import meprop
from cases import ALL_DTYPES, GRADIENTS, SELECTIONS, bits, gradient

SCOPES = ("example", "global", "batch")


def drawn(rule, grad, seed=0):
    torch.manual_seed(seed)
    return rule.select(grad)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_entries_are_those_of_sampled_with_their_own_values(kind, scope, dtype):
    for rows, width, k in SELECTIONS:
        if k == width:  # everything
            continue
        grad = gradient(kind, rows, width, dtype)
        ours = drawn(meprop.UnscaledK(k, scope), grad)
        theirs = drawn(meprop.Sampled(k, scope, exact_sum=False), grad)
        assert type(ours) is type(theirs)
        assert torch.equal(ours.indices, theirs.indices)
        columns = ours.indices.long()
        if scope == "batch":
            expected = grad[:, columns]
        else:
            assert torch.equal(ours.starts, theirs.starts)
            expected = grad[ours.row_numbers(), columns]
        assert torch.equal(bits(ours.values), bits(expected))


def test_small_entries_come_up_as_rarely_and_stay_small():
    grad = torch.tensor([[8.0, -1.0, 1.0, 2.0]]).expand(40_000, 4)
    mean = drawn(meprop.UnscaledK(2), grad).to_dense().mean(0)
    # 8 is kept for certain. The others are kept with a probability of their share in 4.
    torch.testing.assert_close(mean, torch.tensor([8.0, -0.25, 0.25, 1.0]), atol=0.03, rtol=0)
    assert not meprop.UnscaledK(2).unbiased


@pytest.mark.parametrize("scope", ["example", "global"])
def test_the_exact_sum_is_that_of_the_batch(scope):
    grad = gradient("normal", 9, 33, torch.float64)
    dense = drawn(meprop.UnscaledK(4, scope, exact_sum=True), grad).to_dense()
    torch.testing.assert_close(dense.sum(0), grad.sum(0))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_layers_gradients_are_those_of_what_it_keeps(scope):
    x, grad = torch.randn(6, 40, dtype=torch.float64), gradient("normal", 6, 30, torch.float64)
    x.requires_grad_()
    layer = meprop.nn.Linear(40, 30, rule=meprop.UnscaledK(3, scope), dtype=torch.float64)
    kept = drawn(layer.rule, grad).to_dense()
    torch.manual_seed(0)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, kept @ layer.weight)
    torch.testing.assert_close(layer.weight.grad, kept.T @ x)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))

"""The budget of a whole model: its shares, what their product bounds, and which layers have one."""

import doctest
from math import prod

import pytest
import torch
from torch import nn

import meprop
from meprop import budgets, speed

RULE = meprop.Sampled(noise=0.25)


def deep(layers=3, width=40):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


@pytest.mark.parametrize("total", [0.01, 0.25, 5.0])
@pytest.mark.parametrize("layers", [1, 2, 30])
def test_the_product_over_the_layers_is_the_total(layers, total):
    model = deep(layers)
    meprop.convert(model, RULE, min_features=5)
    shares = meprop.share_noise(model, total)
    assert list(shares) == [str(number) for number in range(layers)]
    assert prod(1 + share for share in shares.values()) - 1 == pytest.approx(total)
    assert [layer.rule.noise for layer in model] == list(shares.values())


def test_the_noise_of_the_lowest_gradient_is_within_the_total():
    """Of random layers, over many draws; with the budget at each layer instead it is well above."""
    torch.manual_seed(1)
    model, x, grad = deep(6, 64), torch.randn(50, 64), torch.randn(50, 64)
    (exact,) = torch.autograd.grad(model(x), [model[0].weight], grad)

    def noise(total):
        meprop.convert(model, meprop.Sampled(noise=0.5, ceiling=1, exact_sum=False), min_features=5, when="always")
        if total is not None:
            meprop.share_noise(model, total)
        draws = [torch.autograd.grad(model(x), [model[0].weight], grad)[0] for _ in range(100)]
        return float(sum((draw - exact).square().sum() for draw in draws) / len(draws) / exact.square().sum())

    shared, whole = noise(0.5), noise(None)
    assert 0.25 < shared < 0.6
    assert whole > 3 * shared


def test_only_what_passes_through_the_layers_below_has_a_share():
    model = deep(6)
    rules = [
        *(RULE, meprop.Sampled(3), meprop.PerProduct(input=RULE, weight=meprop.Sampled(noise=1.0))),
        *(meprop.PerProduct(input=None, weight=RULE), meprop.InBlocks(RULE, 2), meprop.TopK(3)),
    ]
    for layer, rule in zip(model, rules, strict=True):
        meprop.convert(layer, rule, min_features=5)
    shares = meprop.share_noise(model, 1.0)
    share = 2 ** (1 / 3) - 1
    assert shares == pytest.approx({"0": share, "2": share, "4": share})
    assert model[2].rule.input.noise == model[4].rule.rule.noise == shares["0"]
    assert model[2].rule.weight == meprop.Sampled(noise=1.0)
    assert [model[place].rule for place in (1, 3, 5)] == [rules[1], rules[3], rules[5]]


def test_attention_counts_twice_and_an_lstm_once_for_each_of_its_layers():
    model = nn.ModuleList([nn.MultiheadAttention(40, 4), nn.LSTM(40, 40, num_layers=3, bidirectional=True)])
    meprop.convert(model, RULE, min_features=5)
    assert meprop.share_noise(model, 1.0) == pytest.approx(dict.fromkeys("01", 2 ** (1 / 5) - 1))


def test_a_layer_that_was_measured_dense_leaves_its_share_to_the_others():
    model = deep(3)
    meprop.convert(model, RULE, min_features=5)
    model[1].decision = speed.Decision(False, 5, 1.0, 2.0)
    assert meprop.share_noise(model, 0.21) == pytest.approx({"0": 0.1, "2": 0.1})
    assert model[1].rule == RULE


@pytest.mark.parametrize(
    ("rule", "total", "error", "message"),
    [
        (RULE, 0, ValueError, "total=0 is out of range"),
        (RULE, True, ValueError, "total=True is a bool"),
        (RULE, "all", TypeError, "total='all' is of type str"),
        (meprop.TopK(3), 0.5, ValueError, "no sparse layer has a budget of noise; call meprop.convert"),
    ],
)
def test_wrong_budgets_are_refused(rule, total, error, message):
    model = deep(2)
    meprop.convert(model, rule, min_features=5)
    with pytest.raises(error, match=message):
        meprop.share_noise(model, total)


def test_a_model_is_asked_for():
    with pytest.raises(TypeError, match="model is of type int"):
        meprop.share_noise(3, 0.5)


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(budgets)
    assert results.failed == 0
    assert results.attempted >= 5
